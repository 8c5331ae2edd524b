"""resnest-info: what networks cost."""

from resnest_imagenet.commands.launch import run_command
from resnest_imagenet.config import InfoConfig


def run(config: InfoConfig) -> None:
    """Print the costs."""
    from resnest_imagenet.reports.info import describe_networks, format_costs

    costs, device = describe_networks(config)
    print(format_costs(costs, device, config))


def main() -> None:
    """Entry of resnest-info."""
    run_command("info", InfoConfig, run)


if __name__ == "__main__":
    main()
