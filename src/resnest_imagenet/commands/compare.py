"""resnest-compare: several networks on the same images."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from resnest_imagenet.commands.evaluate import take_box_protocol, take_own_protocol, take_region_protocol
from resnest_imagenet.commands.launch import report_skipped, run_command
from resnest_imagenet.config_reading import CompareConfig
from resnest_imagenet.errors import ConfigError, printable
from resnest_imagenet.files import write_atomically

if TYPE_CHECKING:
    import torch

    from resnest_imagenet.data.folder import ImageFolder
    from resnest_imagenet.inference.compare import Comparison
    from resnest_imagenet.inference.compare_masks import MaskComparison
    from resnest_imagenet.inference.compare_objects import ObjectComparison
    from resnest_imagenet.inference.segmenter import Segmenter
    from resnest_imagenet.weights.load import Weights


def run(config: CompareConfig) -> None:
    """Compare and print the tables; images that were skipped raise a DataError after it."""
    comparison = compare_networks(config)
    print(_format(comparison), flush=True)
    for path in filter(None, (config.csv, config.page)):
        print(printable(f"wrote {path}"), flush=True)
    report_skipped(list(comparison.skipped))


def _format(comparison: "Comparison | MaskComparison | ObjectComparison") -> str:
    from resnest_imagenet.inference.compare import Comparison, format_comparison
    from resnest_imagenet.inference.compare_masks import MaskComparison, format_masks

    if isinstance(comparison, Comparison):
        return format_comparison(comparison)
    if isinstance(comparison, MaskComparison):
        return format_masks(comparison)
    from resnest_imagenet.inference.compare_objects import format_objects_compared

    return format_objects_compared(comparison)


def compare_networks(config: CompareConfig) -> "Comparison | MaskComparison | ObjectComparison":
    """Compare, and write `config.csv` and `config.page` where they are set."""
    from resnest_imagenet.weights.load import TASK

    weights, device = _read_networks(config)
    task = weights[0].task
    if task == TASK:
        return _compare_classifiers(config, weights, device)
    _refuse_options(config, task)
    if task == "segmentation":
        return _compare_segmenters(config, weights, device)
    return _compare_detectors(config, weights, device)


def _read_networks(config: CompareConfig) -> tuple[list["Weights"], "torch.device"]:
    """Check the options; return the weights, all of one task, and the device.

    Raises:
        ConfigError: the weights are of different tasks.
        UserError: for other errors that a user can cause, as one line.
    """
    from resnest_imagenet.inference.images import prepare_inference
    from resnest_imagenet.weights.detection import DETECTION
    from resnest_imagenet.weights.load import TASK, read_weights
    from resnest_imagenet.weights.published_rcnn import adopt_rcnn
    from resnest_imagenet.weights.segmentation import SEGMENTATION

    outputs = {"csv": config.csv, "page": config.page}
    device = prepare_inference(config.models or [], config.loader.name, config.device, outputs)
    tasks = (TASK, SEGMENTATION, DETECTION)
    weights = [adopt_rcnn(read_weights(source, config.weights, tasks)) for source in config.ckpt]
    first = weights[0]
    for other in weights[1:]:
        if other.task != first.task:
            raise ConfigError(
                f"ckpt: {first.source} is of {first.task}, {other.source} of {other.task}: compare networks of one task"
            )
    for option, value in (("score", config.score), ("data.val_json", config.data.val_json)):
        if value is not None and first.task != DETECTION:
            raise ConfigError(f"{option} is of detection: {first.source} is of {first.task}")
    return weights, device


def _compare_classifiers(config: CompareConfig, weights: list["Weights"], device: "torch.device") -> "Comparison":
    """Compare networks of classification."""
    from resnest_imagenet.inference.classifier import open_classifier
    from resnest_imagenet.inference.compare import compare, encode_csv
    from resnest_imagenet.reports.compare_page import render_comparison

    protocol = take_own_protocol(config.protocol).list_changes()
    images = _list_classified_images(config, weights)
    names = config.models or [None] * len(weights)
    comparison = compare(
        [
            open_classifier(source, name, crop=config.crop, protocol=protocol, device=device)
            for source, name in zip(weights, names, strict=True)
        ],
        images,
        batch_size=config.batch_size,
        precision=config.precision,
        loader=config.loader.name,
        workers=config.loader.workers,
    )
    _write(config.csv, lambda: encode_csv(comparison))
    _write(config.page, lambda: render_comparison(comparison))
    return comparison


def _write(path: str | None, encode: Callable[[], str]) -> None:
    """Write a text into a file, if a path is set."""
    if path is not None:
        with write_atomically(Path(path)) as file:
            file.write(encode().encode(errors="surrogateescape"))


def _list_classified_images(config: CompareConfig, weights: list["Weights"]) -> "ImageFolder":
    """Return the images of a folder, or of a data set; where it has no such part, those of the networks' runs.

    Raises:
        ConfigError: the runs keep different images: each would be measured on some that another was trained with.
    """
    from resnest_imagenet.data.folder import ImageFolder
    from resnest_imagenet.data.parts import ClassifiedData
    from resnest_imagenet.inference.images import list_classified_images, open_own_val

    if config.images is not None:
        return list_classified_images(config.images)
    assert config.data.root is not None
    data = ClassifiedData("folder", config.data.root, val_dir=config.data.val_dir)
    parts = [(data.adopt((of_run.run or {}).get("data")), of_run) for of_run in weights]
    adopted = [(part, of_run) for part, of_run in parts if part != data]
    for part, of_run in adopted[1:]:
        if part != adopted[0][0]:
            raise ConfigError(
                f"{of_run.source} has other validation images than {adopted[0][1].source} ({part.describe_split()}, "
                f"{adopted[0][0].describe_split()}): set images to a folder that neither was trained with"
            )
    images = open_own_val(data, adopted[0][1] if adopted else weights[0])
    assert isinstance(images, ImageFolder)  # a run's list or split has files
    return images


def _compare_segmenters(config: CompareConfig, weights: list["Weights"], device: "torch.device") -> "MaskComparison":
    """Compare networks of segmentation."""
    from resnest_imagenet.inference.compare_masks import compare_masks, encode_mask_csv
    from resnest_imagenet.inference.segmenter import open_segmenter
    from resnest_imagenet.reports.compare_masks_page import render_mask_comparison

    protocol = take_region_protocol(config.protocol)
    segmenters = [open_segmenter(source, protocol=protocol, device=device) for source in weights]
    comparison = compare_masks(segmenters, _list_scenes(config, segmenters[0]), precision=config.precision)
    _write(config.csv, lambda: encode_mask_csv(comparison))
    _write(config.page, lambda: render_mask_comparison(comparison))
    return comparison


def _compare_detectors(config: CompareConfig, weights: list["Weights"], device: "torch.device") -> "ObjectComparison":
    """Compare detectors."""
    from resnest_imagenet.inference.compare_objects import compare_objects, encode_object_csv
    from resnest_imagenet.inference.detect import SCORE
    from resnest_imagenet.inference.detector import open_detector
    from resnest_imagenet.reports.compare_objects_page import render_object_comparison

    options, score = take_box_protocol(config.protocol), SCORE if config.score is None else config.score
    protocol = {**(options.model_dump() if options else {}), "min_score": score}
    detectors = [open_detector(source, protocol=protocol, device=device) for source in weights]
    comparison = compare_objects(detectors, _list_objects(config), score=score, precision=config.precision)
    _write(config.csv, lambda: encode_object_csv(comparison))
    _write(config.page, lambda: render_object_comparison(comparison))
    return comparison


def _list_objects(config: CompareConfig) -> "ImageFolder":
    """Return the images of any folder, or those of a data set in COCO's layout."""
    from resnest_imagenet.data.coco import open_coco
    from resnest_imagenet.data.folder import ImageFolder
    from resnest_imagenet.inference.images import list_images

    if config.images is not None:
        return list_images(config.images)
    assert config.data.root is not None
    val_dir = config.data.val_dir if config.data.val_dir != "val" else None  # COCO's own
    images = open_coco(config.data.root, "val", config.data.val_json, val_dir, masks=False).images
    assert isinstance(images, ImageFolder)  # objects are in no other source
    return images


def _refuse_options(config: CompareConfig, task: str) -> None:
    """Raise a ConfigError for the options of classification."""
    behaviour = {
        "segmentation": "sees images at their own size, one at a time; protocol=slide or published has windows",
        "detection": "sees images one at a time, at protocol.short_side=... of protocol=coco",
    }
    settings = {
        "crop": config.crop is not None,
        "models": config.models is not None,
        "loader": config.loader.name != "auto" or config.loader.workers is not None,
    }
    for name, is_set in settings.items():
        if is_set:
            raise ConfigError(f"{name} is of classification: {config.ckpt[0]} is of {task}, and {behaviour[task]}")


def _list_scenes(config: CompareConfig, segmenter: "Segmenter") -> "ImageFolder":
    """Return the images of any folder, or those of a data set in the layout that a network was trained on."""
    from resnest_imagenet.data.folder import ImageFolder
    from resnest_imagenet.data.scenes import open_scenes
    from resnest_imagenet.inference.images import list_images

    if config.images is not None:
        return list_images(config.images)
    assert config.data.root is not None
    images = open_scenes(segmenter.data_kind, config.data.root, config.data.val_dir).images
    assert isinstance(images, ImageFolder)  # scenes are in no other source
    return images


def main() -> None:
    """Entry of resnest-compare."""
    run_command("compare", CompareConfig, run)


if __name__ == "__main__":
    main()
