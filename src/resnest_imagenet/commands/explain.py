"""resnest-explain: where a network finds a class in images, and how its split attention weighs."""

from resnest_imagenet.commands.launch import report_skipped, run_command
from resnest_imagenet.config import ExplainConfig
from resnest_imagenet.errors import printable


def run(config: ExplainConfig) -> None:
    """Write the pictures and say where they are; images that were skipped raise a DataError after it."""
    from resnest_imagenet.inference.explain import explain_images

    written, faults = explain_images(config)
    for line in written:
        print(printable(line), flush=True)
    report_skipped(faults)


def main() -> None:
    """Entry of resnest-explain."""
    run_command("explain", ExplainConfig, run)


if __name__ == "__main__":
    main()
