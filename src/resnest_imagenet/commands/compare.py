"""resnest-compare: several networks on the same images."""

from resnest_imagenet.commands.launch import report_skipped, run_command
from resnest_imagenet.config import CompareConfig


def run(config: CompareConfig) -> None:
    """Compare and print the tables; images that were skipped raise a DataError after it."""
    from resnest_imagenet.inference.compare import compare_networks, format_comparison

    comparison = compare_networks(config)
    print(format_comparison(comparison), flush=True)
    report_skipped(list(comparison.skipped))


def main() -> None:
    """Entry of resnest-compare."""
    run_command("compare", CompareConfig, run)


if __name__ == "__main__":
    main()
