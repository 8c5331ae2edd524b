"""resnest-predict: the likeliest classes of images."""

import sys

from resnest_imagenet.commands.launch import run_command
from resnest_imagenet.config import PredictConfig
from resnest_imagenet.errors import DataError


def run(config: PredictConfig) -> None:
    """Predict and print the table; images that were left out raise a DataError after it."""
    from resnest_imagenet.evaluation.predict import format_predictions, predict_images

    predictions, faults = predict_images(config)
    print(format_predictions(predictions), flush=True)
    for fault in faults:
        print(f"{fault}; left out", file=sys.stderr)
    if faults:
        raise DataError(f"images left out: {len(faults)}")


def main() -> None:
    """Entry of resnest-predict."""
    run_command("predict", PredictConfig, run)


if __name__ == "__main__":
    main()
