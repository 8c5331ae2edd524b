"""resnest-predict: the likeliest classes of images."""

from pathlib import Path
from typing import TYPE_CHECKING

from resnest_imagenet.commands.launch import report_skipped, run_command
from resnest_imagenet.config import PredictConfig
from resnest_imagenet.errors import ConfigError
from resnest_imagenet.files import replacing

if TYPE_CHECKING:
    from resnest_imagenet.inference.predict import Prediction


def run(config: PredictConfig) -> None:
    """Predict and print the table; images that were skipped raise a DataError after it."""
    from resnest_imagenet.inference.predict import format_predictions

    predictions, skipped = predict_images(config)
    print(format_predictions(predictions), flush=True)
    report_skipped(skipped)


def predict_images(config: PredictConfig) -> tuple[list["Prediction"], list[str]]:
    """Predict, and write `config.out` if it is set; return what `predict` returns."""
    from resnest_imagenet.inference.classifier import open_classifier
    from resnest_imagenet.inference.images import list_images, prepare_inference
    from resnest_imagenet.inference.predict import encode_predictions, predict

    if config.out is not None and Path(config.out).suffix not in (".csv", ".json"):
        raise ConfigError(f"out={config.out} ends neither in .csv nor in .json")
    name = config.model.name if config.model else None
    device = prepare_inference([name], config.loader.name, config.device, {"out": config.out})
    images = list_images(config.images)
    protocol = config.protocol.list_changes()
    predictions, skipped = predict(
        open_classifier(config.ckpt, name, config.weights, config.crop, protocol, device),
        images,
        config.top,
        batch_size=config.batch_size,
        precision=config.precision,
        loader=config.loader.name,
        workers=config.loader.workers,
    )
    if config.out is not None:
        with replacing(Path(config.out)) as file:
            file.write(encode_predictions(predictions, Path(config.out).suffix).encode(errors="surrogateescape"))
    return predictions, skipped


def main() -> None:
    """Entry of resnest-predict."""
    run_command("predict", PredictConfig, run)


if __name__ == "__main__":
    main()
