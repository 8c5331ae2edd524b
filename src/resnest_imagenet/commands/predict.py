"""resnest-predict: the likeliest classes of images."""

from resnest_imagenet.commands.launch import report_skipped, run_command
from resnest_imagenet.config import PredictConfig


def run(config: PredictConfig) -> None:
    """Predict and print the table; images that were skipped raise a DataError after it."""
    from resnest_imagenet.inference.predict import format_predictions, predict_images

    predictions, faults = predict_images(config)
    print(format_predictions(predictions), flush=True)
    report_skipped(faults)


def main() -> None:
    """Entry of resnest-predict."""
    run_command("predict", PredictConfig, run)


if __name__ == "__main__":
    main()
