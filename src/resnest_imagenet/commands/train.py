"""resnest-train: train a network on a folder of images."""

from resnest_imagenet.commands.launch import run_command
from resnest_imagenet.config import TrainConfig


def run(config: TrainConfig) -> None:
    """Import torch only now, and train."""
    from resnest_imagenet.training.train import train

    train(config)


def main() -> None:
    """Entry of resnest-train and of torchrun -m resnest_imagenet.commands.train."""
    run_command("train", TrainConfig, run)


if __name__ == "__main__":
    main()
