"""Figures that were measured here, read from results files and run folders."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from resnest_imagenet.earlier import upgrade_recipe
from resnest_imagenet.errors import ConfigError
from resnest_imagenet.evaluation.events import TOP1, name_metric, read_events, require_numbers
from resnest_imagenet.evaluation.results import (
    BOX_AP,
    MASK_AP,
    MIOU,
    BoxResults,
    Measured,
    MeasuredBoxes,
    MeasuredRegions,
    RegionResults,
    Result,
    Results,
)
from resnest_imagenet.files import RESULTS, read_matching, require_exists, require_file
from resnest_imagenet.models.rcnn_options import name_detector

MAX_BYTES = 10**6  # of a file of options
COCO = "coco"  # the layout of data on which detectors are evaluated
_OF_REGIONS = b'"task": "segmentation"'  # stands in its results files
_OF_BOXES = b'"task": "detection"'
ALL_METRICS = (TOP1, MIOU, BOX_AP, MASK_AP)


def read_measured(patterns: list[str], recipes: dict[str, dict[str, Any]]) -> tuple[list[Measured], list[str]]:
    """Read results files and run folders of classification; see `read_all_measured`."""
    results, skipped = read_all_measured(patterns, recipes, (TOP1,))
    return [result for result in results if isinstance(result, Measured)], skipped


def read_all_measured(
    patterns: list[str], recipes: dict[str, dict[str, Any]], metrics: Sequence[str] = ALL_METRICS
) -> tuple[list[Result], list[str]]:
    """Read results files and run folders.

    A run folder stands for the results files in it or, if it has none, for its last evaluation.

    Args:
        patterns: paths, or patterns with *; files that match a pattern but are not results are skipped.
        recipes: the values of each recipe by its name: a run's description lists the values that it changed.
        metrics: of the evaluations to read; others are not results.

    Returns:
        The figures, and a line for each path that was skipped.

    Raises:
        ConfigError: a path does not exist or holds no results.
    """
    measured: dict[Path, list[Result]] = {}
    contents, skipped = read_matching(patterns, lambda path: dict(_read(path, recipes, metrics)))
    for by_file in contents:  # a file may be given twice: by its path and by its folder
        measured |= by_file
    return [result for results in measured.values() for result in results], skipped


def _read(
    path: Path, recipes: dict[str, dict[str, Any]], metrics: Sequence[str]
) -> Iterator[tuple[Path, list[Result]]]:
    """Yield the files of a path with the figures in them."""
    require_exists(path, "results", RESULTS)
    if path.is_file():
        yield path, _read_results(path, recipes, metrics)
        return
    files = list_results(path, metrics)
    for file in files:
        yield file, _read_results(file, recipes, metrics)
    if not files:
        yield path, [_read_run(path, recipes, metrics)]


def list_results(folder: Path, metrics: Sequence[str]) -> list[Path]:
    """Return the files of resnest-eval out=... in a folder that have one of these metrics."""
    files = [path for path in sorted(folder.glob("*.json")) if path.is_file()]
    try:
        contents = [path.read_bytes() for path in files]
    except OSError as error:
        raise ConfigError(f"{error.filename}: cannot be read ({error.strerror})") from error
    # A file that begins with a list holds detections.
    results = [
        (path, content)
        for path, content in zip(files, contents, strict=True)
        if not content.startswith(b"[") and b'"results"' in content
    ]
    return [path for path, content in results if _guess_metric(content) in metrics]


def _guess_metric(content: bytes) -> str:
    """Return the metric of a results file by its task, without parsing it."""
    if _OF_BOXES in content:
        return MASK_AP if f'"{MASK_AP}"'.encode() in content else BOX_AP
    return MIOU if _OF_REGIONS in content else TOP1


class _PlainLoader(yaml.SafeLoader):
    """Refuses aliases: the trainer writes none, and with them a small file can become a huge value."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it has an alias")
        return super().compose_node(parent, index)


def read_values(path: Path) -> dict[str, Any]:
    """Return the content of a YAML or JSON file that the trainer wrote to a run folder.

    Raises:
        ConfigError: it cannot be read, or holds something else.
    """
    require_file(path)
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError("too large")
        content = yaml.load(path.read_text(), _PlainLoader)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: not what resnest-train writes")
    return content


def _read_results(path: Path, recipes: dict[str, dict[str, Any]], metrics: Sequence[str]) -> list[Result]:
    try:
        content = _RESULTS.validate_json(path.read_bytes())
        if content.training is None:
            recipe = f"weights {content.ckpt}"
        else:
            recipe = _describe(content.training, recipes, content.epoch or 0, None)
            # A reader expects the moving average if there is one.
            if content.training.get("ema_decay") is not None and not content.is_average:
                recipe += ", not the moving average"
    except (OSError, ValidationError, LookupError, TypeError) as error:
        raise ConfigError(f"results={path}: not a file of resnest-eval out=...") from error
    metric = _metric_of(content)
    if metric not in metrics:
        raise ConfigError(_refuse_metric(metric, path, metrics))
    return list(_list_measured(content, recipe, str(path)))


_AnyResults = Results | RegionResults | BoxResults
_RESULTS: TypeAdapter[_AnyResults] = TypeAdapter(_AnyResults)


def _metric_of(content: _AnyResults) -> str:
    """Return the name of the value by which the best network of the results' task is chosen."""
    if isinstance(content, BoxResults):
        return BOX_AP if all(boxes.mask_ap is None for boxes in content.results) else MASK_AP
    return MIOU if isinstance(content, RegionResults) else TOP1


def _list_measured(content: _AnyResults, recipe: str, source: str) -> Iterator[Result]:
    model = content.model
    if isinstance(content, BoxResults):
        for boxes in content.results:
            num_classes = len(boxes.ap_per_class["box"])
            aps = boxes.box_ap, boxes.mask_ap
            network = model, content.detector, COCO
            yield MeasuredBoxes(*network, *aps, boxes.count, num_classes, recipe, boxes.protocol, source)
        return
    if isinstance(content, Results):
        for of_crop in content.results:
            top1, count, protocol = of_crop.top1, of_crop.count, of_crop.protocol
            num_classes, tta = content.num_classes, of_crop.tta
            yield Measured(model, of_crop.crop, top1, count, num_classes, recipe, protocol, source, tta)
        return
    for regions in content.results:
        figures = regions.miou, regions.pixel_accuracy, regions.count, len(regions.iou)
        yield MeasuredRegions(model, content.data, *figures, recipe, regions.protocol, source)


def _refuse_metric(metric: str, path: Path, metrics: Sequence[str]) -> str:
    return f"results={path}: its evaluations are of {metric}, not of {' or '.join(metrics)}"


def has_accuracy(evaluation: dict[str, Any]) -> bool:
    """Return whether an event of a run is an evaluation of a classifier, with its crop and its protocol."""
    return name_metric(evaluation) == TOP1 and {TOP1, "crop", "count", "protocol"} <= evaluation.keys()


def _read_run(folder: Path, recipes: dict[str, dict[str, Any]], metrics: Sequence[str]) -> Result:
    """Return the last evaluation of a run."""
    with _refusing_other_folders(folder):
        last = read_events(folder / "metrics.jsonl", {"eval": ("epoch",)})[-1]
    metric = name_metric(last)
    if metric not in metrics:
        raise ConfigError(_refuse_metric(metric, folder, metrics))
    return measure_run(folder, last, recipes)


def measure_run(folder: Path, evaluation: dict[str, Any], recipes: dict[str, dict[str, Any]]) -> Result:
    """Return the figures of an evaluation of a run, whose options are read from its folder.

    Raises:
        ConfigError: the folder or the evaluation lacks something.
    """
    with _refusing_other_folders(folder):
        config = read_values(folder / "config.yaml")
        return _measure_run(config, evaluation, recipes, str(folder / "metrics.jsonl"))


@contextmanager
def _refusing_other_folders(folder: Path) -> Iterator[None]:
    try:
        yield
    except (ConfigError, LookupError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"results={folder}: not a run folder with an evaluation") from error


def _measure_run(
    config: dict[str, Any], evaluation: dict[str, Any], recipes: dict[str, dict[str, Any]], source: str
) -> Result:
    require_numbers(evaluation, ("count",))
    recipe = _describe(config["train"], recipes, evaluation["epoch"], evaluation.get("step"))
    model, num_classes, protocol = config["model"]["name"], config["model"]["num_classes"], evaluation["protocol"]
    if not (isinstance(model, str) and isinstance(num_classes, int) and isinstance(protocol, str)):
        raise TypeError(f"{model}, {num_classes}, {protocol}")
    count = evaluation["count"]
    if name_metric(evaluation) == TOP1:
        require_numbers(evaluation, ("crop",))
        return Measured(model, evaluation["crop"], evaluation[TOP1], count, num_classes, recipe, protocol, source)
    data = config["data"]["kind"]
    if not isinstance(data, str):
        raise TypeError(f"{data}")
    if name_metric(evaluation) in (BOX_AP, MASK_AP):
        require_numbers(evaluation, (BOX_AP,))
        detector = name_detector(config["train"]["cascade"], config["train"]["masks"])
        figures = evaluation[BOX_AP], evaluation.get(MASK_AP), count, num_classes
        return MeasuredBoxes(model, detector, data, *figures, recipe, protocol, source)
    require_numbers(evaluation, ("pixel_accuracy",))
    regions = evaluation[MIOU], evaluation["pixel_accuracy"], count, num_classes
    return MeasuredRegions(model, data, *regions, recipe, protocol, source)


def _describe(training: dict[str, Any], recipes: dict[str, dict[str, Any]], epoch: int, step: int | None) -> str:
    """Return the recipe's name, the values that a run changed, and how far an unfinished run was.

    Args:
        training: the options of the training.
        recipes: the values of each recipe by its name.
        epoch: epochs done.
        step: steps done; None if they are unknown.

    Raises:
        LookupError, TypeError: these are not options of a training.
    """
    training = upgrade_recipe(training)
    name, epochs, steps = training["recipe"], training["epochs"], training.get("steps")
    if epochs is None and steps is None:
        raise TypeError("a run without a length")
    published = recipes.get(name, {})
    changed = [
        f"{key}={training.get(key)}"
        for key, value in published.items()
        # Only one of epochs and steps is set.
        if training.get(key) != value and not (key in ("epochs", "steps") and training.get(key) is None)
    ]
    unfinished = []
    if steps is not None and step is not None and step < steps:
        unfinished = [f"after {step} of {steps} steps"]
    elif epochs is not None and epoch < epochs:
        unfinished = [f"after {epoch} epochs"]
    return ", ".join([name if published else f"{name} (no recipe of this project)", *changed, *unfinished])
