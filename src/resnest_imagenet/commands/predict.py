"""resnest-predict: the likeliest classes of images, the class of each of their pixels, or the objects in them."""

import os
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from resnest_imagenet.commands.evaluate import (
    require_classifier,
    take_box_protocol,
    take_own_protocol,
    take_region_protocol,
)
from resnest_imagenet.commands.launch import report_skipped, run_command
from resnest_imagenet.config_reading import PredictConfig
from resnest_imagenet.errors import ConfigError
from resnest_imagenet.files import require_writable, write_atomically

if TYPE_CHECKING:
    import torch

    from resnest_imagenet.data.folder import ImageFolder
    from resnest_imagenet.inference.predict import Prediction
    from resnest_imagenet.weights.load import Weights

TABLES = (".csv", ".json")  # the suffixes of out for networks of classification and of detection
FEATURES = ".npz"  # and for features


def run(config: PredictConfig) -> None:
    """Predict and print the table; images that were skipped raise a DataError after it."""
    from resnest_imagenet.inference.predict import format_judgement, format_predictions
    from resnest_imagenet.weights.detection import DETECTION
    from resnest_imagenet.weights.segmentation import SEGMENTATION

    weights, images, device = read_inputs(config)
    if weights.task == SEGMENTATION:
        text, skipped = segment_images(config, weights, images, device)
    elif weights.task == DETECTION:
        text, skipped = detect_objects(config, weights, images, device)
    elif config.features is not None:
        text, skipped = extract_vectors(config, weights, images, device)
    else:
        predictions, skipped = predict_images(config, weights, images, device)
        judgement = format_judgement(predictions)
        text = format_predictions(predictions) + (f"\n\n{judgement}" if judgement else "")
    print(text, flush=True)
    report_skipped(skipped)


def read_inputs(config: PredictConfig) -> tuple["Weights", "ImageFolder", "torch.device"]:
    """Return the weights, of any task, the images and the device, after what can be refused before."""
    from resnest_imagenet.inference.images import list_images, prepare_inference
    from resnest_imagenet.weights.detection import DETECTION
    from resnest_imagenet.weights.load import TASK, read_weights
    from resnest_imagenet.weights.published_rcnn import adopt_rcnn
    from resnest_imagenet.weights.segmentation import SEGMENTATION

    name = config.model.name if config.model else None
    table = config.out if config.out is not None and Path(config.out).suffix in (*TABLES, FEATURES) else None
    device = prepare_inference([name], config.loader.name, config.device, {"out": table})
    images = list_images(config.images)
    weights = adopt_rcnn(read_weights(config.ckpt, config.weights, (TASK, SEGMENTATION, DETECTION)))
    if config.score is not None and weights.task != DETECTION:
        raise ConfigError(f"score is of detection: {config.ckpt} is of {weights.task}")
    require_classifier("tta", config.tta, weights)
    require_classifier("features", config.features, weights)
    return weights, images, device


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
        tta=config.tta,
        loader=config.loader.name,
        workers=config.loader.workers,
    )
    if config.out is not None:
        with write_atomically(Path(config.out)) as file:
            file.write(encode_predictions(predictions, Path(config.out).suffix).encode(errors="surrogateescape"))
    return predictions, skipped


def extract_vectors(
    config: PredictConfig, weights: "Weights", images: "ImageFolder", device: "torch.device"
) -> tuple[str, list[str]]:
    """Write the features of images into `config.out`; return a line about them, and a line per skipped image."""
    from resnest_imagenet.inference.classifier import open_classifier
    from resnest_imagenet.inference.features import extract_features, write_features

    assert config.features is not None and config.out is not None
    name = config.model.name if config.model else None
    protocol = take_own_protocol(config.protocol).list_changes()
    classifier = open_classifier(weights, name, crop=config.crop, protocol=protocol, device=device)
    features = extract_features(
        classifier,
        images,
        config.features,
        batch_size=config.batch_size,
        precision=config.precision,
        loader=config.loader.name,
        workers=config.loader.workers,
    )
    if not features.files:
        return f"{config.out}: not written, no image can be used", list(features.skipped)
    description = {
        "layer": config.features,
        "model": classifier.name,
        "ckpt": classifier.source,
        "protocol": classifier.transform.protocol,
    }
    with write_atomically(Path(config.out)) as file:
        write_features(file, features, description)
    count, channels = features.vectors.shape
    return f"{config.out}: {config.features} of {count:,} images, {channels:,} channels", list(features.skipped)


def segment_images(
    config: PredictConfig, weights: "Weights", images: "ImageFolder", device: "torch.device"
) -> tuple[str, list[str]]:
    """Segment, and write pictures into `config.out` if it is set; return the table, and a line per skipped image."""
    from tqdm import tqdm

    from resnest_imagenet.inference.segment import format_shares, segment
    from resnest_imagenet.inference.segmenter import open_segmenter
    from resnest_imagenet.reports.mask_pictures import ENDS, name_masks, write_mask
    from resnest_imagenet.reports.picture_files import describe_older

    _refuse_options(
        config, weights, "sees images at their own size, one at a time; protocol=slide or published has windows"
    )
    if config.out is not None and Path(config.out).suffix in TABLES:
        raise ConfigError(f"out={config.out}: masks need a folder, and a table is of classification")
    out = None if config.out is None else _choose_folder(config.out, images)
    segmenter = open_segmenter(weights, protocol=take_region_protocol(config.protocol), device=device)
    segmented = segment(segmenter, images, precision=config.precision)
    lines, names = [], name_masks(segmented.files)
    progress = tqdm(segmented, unit="image", disable=None, dynamic_ncols=True, leave=False)
    for name, image in zip(names, progress, strict=True):
        if out is not None:
            write_mask(out / name, image, segmenter.palette)
        lines.append(format_shares(image, segmenter.classes, config.top))
    if out is not None and lines:
        older = describe_older(out, names, ENDS)
        lines.append(f"masks, colours and overlays in {out}: {len(segmented)} of each{older}")
    return "\n".join(lines), list(segmented.skipped)


def detect_objects(
    config: PredictConfig, weights: "Weights", images: "ImageFolder", device: "torch.device"
) -> tuple[str, list[str]]:
    """Find objects, and write them into `config.out` if it is set; return the table, and a line per skipped image."""
    from tqdm import tqdm

    from resnest_imagenet.inference.detect import SCORE, detect, format_objects
    from resnest_imagenet.inference.detector import open_detector
    from resnest_imagenet.reports.object_files import describe_written, open_files

    _refuse_options(config, weights, "sees images one at a time, at protocol.short_side=... of protocol=coco")
    given, score = take_box_protocol(config.protocol), SCORE if config.score is None else config.score
    protocol = {**(given.model_dump() if given else {}), "min_score": score}
    is_table = config.out is not None and Path(config.out).suffix in TABLES
    out = (
        config.out
        if config.out is None or is_table
        else _choose_folder(config.out, images, "; tables end in .csv or .json")
    )
    detector = open_detector(weights, protocol=protocol, device=device)
    detected = detect(detector, images, score=score, precision=config.precision)
    lines, num_objects = [], 0
    progress = tqdm(detected, unit="image", disable=None, dynamic_ncols=True, leave=False)
    with nullcontext() if out is None else open_files(Path(out), detected) as write:
        for image in progress:
            if write is not None:
                write(image)
            lines.append(format_objects(image, detector.classes, config.top))
            num_objects += len(image)
    counts = f"images: {len(detected)}, objects above {score:g}: {num_objects}"
    lines.append(counts if out is None else f"{out}: {counts}{describe_written(Path(out), detected)}")
    return "\n".join(lines), list(detected.skipped)


def _refuse_options(config: PredictConfig, weights: "Weights", what_it_does: str) -> None:
    """Refuse the options of classification for a network of another task."""
    given = {
        "crop": config.crop is not None,
        "model": config.model is not None,
        "loader": config.loader.name != "auto" or config.loader.workers is not None,
    }
    first = next((name for name, is_given in given.items() if is_given), None)
    if first is not None:
        raise ConfigError(f"{first} is of classification: {config.ckpt} is of {weights.task}, and {what_it_does}")


def _choose_folder(place: str, images: "ImageFolder", hint: str = "") -> Path:
    """Return the folder of the pictures; `hint` tells what out may be besides."""
    from resnest_imagenet.data.folder import IMAGE_SUFFIXES

    out = Path(os.path.abspath(place))
    if out.suffix.lower() in IMAGE_SUFFIXES:
        raise ConfigError(f"out={place}: pictures need a folder{hint}")
    if any(out in Path(images.name(index)).parents for index in range(len(images))):
        raise ConfigError(f"out={place} holds images that are asked about: choose another folder")
    require_writable(out / "pictures", "out")
    return out


def main() -> None:
    """Entry of resnest-predict."""
    run_command("predict", PredictConfig, run)


if __name__ == "__main__":
    main()
