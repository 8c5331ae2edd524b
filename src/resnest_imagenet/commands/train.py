"""resnest-train: train a network."""

from resnest_imagenet.commands.launch import run_command
from resnest_imagenet.config import TrainConfig


def run(config: TrainConfig) -> float:
    """Train, and return the best value of the metric, which a sweeper maximises; or print what a run would do."""
    if config.dry_run:
        from resnest_imagenet.distributed import launched_as
        from resnest_imagenet.training.dry_run import describe_run

        plan = describe_run(config)
        if launched_as().rank == 0:
            print(plan)
        return float("nan")  # to a sweeper
    from resnest_imagenet.training.train import train

    return train(config).best


def main() -> None:
    """Entry of resnest-train and of torchrun -m resnest_imagenet.commands.train."""
    run_command("train", TrainConfig, run)


if __name__ == "__main__":
    main()
