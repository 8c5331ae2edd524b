"""resnest-info: the costs of networks."""

from resnest_imagenet.commands.launch import run_command
from resnest_imagenet.config_reading import InfoConfig


def run(config: InfoConfig) -> None:
    """Print the costs."""
    from resnest_imagenet.reports.info import describe_networks, format_costs

    models = config.models or ([config.model.name] if config.model else [])
    report = describe_networks(
        models,
        config.crop,
        config.batch_size,
        precision=config.precision,
        device=config.device,
        latency=config.latency,
        rounds=config.rounds,
    )
    print(format_costs(report, config.format))


def main() -> None:
    """Entry of resnest-info."""
    run_command("info", InfoConfig, run)


if __name__ == "__main__":
    main()
