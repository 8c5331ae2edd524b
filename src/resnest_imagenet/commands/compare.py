"""resnest-compare: several networks on the same images."""

from resnest_imagenet.commands.launch import run_command
from resnest_imagenet.config import CompareConfig


def run(config: CompareConfig) -> None:
    """Compare and print the tables."""
    from resnest_imagenet.evaluation.compare import compare_networks, format_comparison

    print(format_comparison(compare_networks(config)))


def main() -> None:
    """Entry of resnest-compare."""
    run_command("compare", CompareConfig, run)


if __name__ == "__main__":
    main()
