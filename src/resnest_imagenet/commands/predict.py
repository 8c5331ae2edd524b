"""resnest-predict: the likeliest classes of images, or the class of each of their pixels."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

from resnest_imagenet.commands.evaluate import take_own_protocol, take_region_protocol
from resnest_imagenet.commands.launch import report_skipped, run_command
from resnest_imagenet.config import PredictConfig
from resnest_imagenet.errors import ConfigError
from resnest_imagenet.files import replacing, require_writable

if TYPE_CHECKING:
    import torch

    from resnest_imagenet.data.folder import ImageFolder
    from resnest_imagenet.inference.predict import Prediction
    from resnest_imagenet.weights.load import Weights

TABLES = (".csv", ".json")  # the suffixes of out for networks of classification


def run(config: PredictConfig) -> None:
    """Predict and print the table; images that were skipped raise a DataError after it."""
    from resnest_imagenet.inference.predict import format_predictions
    from resnest_imagenet.weights.segmentation import SEGMENTATION

    weights, images, device = read_inputs(config)
    if weights.task == SEGMENTATION:
        text, skipped = segment_images(config, weights, images, device)
    else:
        predictions, skipped = predict_images(config, weights, images, device)
        text = format_predictions(predictions)
    print(text, flush=True)
    report_skipped(skipped)


def read_inputs(config: PredictConfig) -> tuple["Weights", "ImageFolder", "torch.device"]:
    """Return the weights, of any task, the images and the device, after what can be refused before."""
    from resnest_imagenet.inference.images import list_images, prepare_inference
    from resnest_imagenet.weights.load import TASK, read_weights
    from resnest_imagenet.weights.segmentation import SEGMENTATION

    name = config.model.name if config.model else None
    table = config.out if config.out is not None and Path(config.out).suffix in TABLES else None
    device = prepare_inference([name], config.loader.name, config.device, {"out": table})
    images = list_images(config.images)
    return read_weights(config.ckpt, config.weights, (TASK, SEGMENTATION)), images, device


def predict_images(
    config: PredictConfig, weights: "Weights", images: "ImageFolder", device: "torch.device"
) -> tuple[list["Prediction"], list[str]]:
    """Predict, and write `config.out` if it is set; return what `predict` returns."""
    from resnest_imagenet.inference.classifier import open_classifier
    from resnest_imagenet.inference.predict import encode_predictions, predict

    if config.out is not None and Path(config.out).suffix not in TABLES:
        raise ConfigError(f"out={config.out} ends neither in .csv nor in .json")
    name = config.model.name if config.model else None
    protocol = take_own_protocol(config.protocol).list_changes()
    predictions, skipped = predict(
        open_classifier(weights, name, crop=config.crop, protocol=protocol, device=device),
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


def segment_images(
    config: PredictConfig, weights: "Weights", images: "ImageFolder", device: "torch.device"
) -> tuple[str, list[str]]:
    """Segment, and write pictures into `config.out` if it is set; return the table, and a line per skipped image."""
    from tqdm import tqdm

    from resnest_imagenet.inference.segment import format_shares, segment
    from resnest_imagenet.inference.segmenter import open_segmenter
    from resnest_imagenet.reports.mask_pictures import name_masks, write_mask

    out = _choose_folder(config, images)
    segmenter = open_segmenter(weights, protocol=take_region_protocol(config.protocol), device=device)
    segmented = segment(segmenter, images, precision=config.precision)
    lines = []
    progress = tqdm(segmented, unit="image", disable=None, dynamic_ncols=True, leave=False)
    for name, image in zip(name_masks(segmented.files), progress, strict=True):
        if out is not None:
            write_mask(out / name, image, segmenter.palette)
        lines.append(format_shares(image, segmenter.classes, config.top))
    if out is not None and lines:
        lines.append(f"masks, colours and overlays in {out}: {len(segmented)} of each")
    return "\n".join(lines), list(segmented.skipped)


def _choose_folder(config: PredictConfig, images: "ImageFolder") -> Path | None:
    """Return the folder of the masks, or None; refuse the options of classification."""
    given = {
        "crop": config.crop is not None,
        "model": config.model is not None,
        "loader": config.loader.name != "auto" or config.loader.workers is not None,
    }
    if any(given.values()):
        first = next(name for name, is_given in given.items() if is_given)
        raise ConfigError(
            f"{first} is of classification: {config.ckpt} is of segmentation, and sees images at their own size, "
            "one at a time; protocol=slide or published has windows"
        )
    if config.out is None:
        return None
    out = Path(os.path.abspath(config.out))
    if out.suffix in TABLES:
        raise ConfigError(f"out={config.out}: masks need a folder, and a table is of classification")
    if any(out in Path(images.name(index)).parents for index in range(len(images))):
        raise ConfigError(f"out={config.out} holds images to segment: choose another folder")
    require_writable(out / "masks", "out")
    return out


def main() -> None:
    """Entry of resnest-predict."""
    run_command("predict", PredictConfig, run)


if __name__ == "__main__":
    main()
