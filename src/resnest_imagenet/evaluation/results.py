"""Accuracies that were measured: the file they are written to, and what is read back from files and run folders."""

import glob
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from resnest_imagenet.config import Options
from resnest_imagenet.errors import ConfigError
from resnest_imagenet.evaluation.events import parse_events

MAX_BYTES = 10**6  # of a file of options
MAX_DRAWN = 1e40  # more than float32 holds, and less than breaks a chart's axis


class CropResult(Options):
    """Accuracy under one protocol.

    Attributes:
        crop: side of the images the model saw, in pixels.
        top1, top5: percent.
        correct1, correct5, count: the integers behind them.
        protocol: how the images were resized and cropped.
    """

    crop: int
    top1: float
    top5: float
    correct1: int
    correct5: int
    count: int
    protocol: str


class Results(Options):
    """A results file, of resnest-eval out=...

    Attributes:
        model: name of the network.
        ckpt: what was evaluated.
        is_average: whether it was the moving average of the weights.
        num_classes: of the model.
        epoch, training: epochs done and all training options, where the checkpoint knows them.
        results: one for each crop.
    """

    model: str
    ckpt: str
    is_average: bool
    num_classes: int
    epoch: int | None
    training: dict[str, Any] | None
    results: list[CropResult]


@dataclass(frozen=True)
class Measured:
    """One accuracy that was measured here.

    Attributes:
        model: name of the network.
        crop: side of the images in pixels.
        top1: percent.
        count, num_classes: of the images it was measured on; ImageNet's are 50000 and 1000.
        recipe: what the weights were trained with, or where they come from.
        protocol: how the images were resized and cropped.
        source: the file that says so.
    """

    model: str
    crop: int
    top1: float
    count: int
    num_classes: int
    recipe: str
    protocol: str
    source: str


def read_measured(patterns: list[str], recipes: dict[str, dict[str, Any]]) -> tuple[list[Measured], list[str]]:
    """Read results files and run folders.

    A run folder stands for the results files in it, or without any for its last evaluation.

    Args:
        patterns: paths, or patterns with * of which what is no result is left out.
        recipes: the values of each recipe by its name: what a run changed is named.

    Returns:
        The accuracies, and a line for everything that was left out.

    Raises:
        ConfigError: for a path that is not there, or holds no results.
    """
    found: dict[Path, list[Measured]] = {}
    left_out = []
    for pattern in patterns:
        is_path = Path(pattern).exists() or not glob.has_magic(pattern)
        for path in [Path(pattern)] if is_path else [Path(name) for name in sorted(glob.glob(pattern))]:
            try:
                found |= dict(_read(path, recipes))
            except ConfigError as error:
                if is_path:
                    raise
                left_out.append(str(error))
    return [one for measured in found.values() for one in measured], left_out


def _read(path: Path, recipes: dict[str, dict[str, Any]]) -> Iterator[tuple[Path, list[Measured]]]:
    """Yield the files of a path with the accuracies in them."""
    if not path.exists():
        raise ConfigError(f"results={path}: no such file or run folder")
    if path.is_file():
        yield path, _read_results(path, recipes)
        return
    files = list_results(path)
    for file in files:
        yield file, _read_results(file, recipes)
    if not files:
        yield path, [_read_run(path, recipes)]


def list_results(folder: Path) -> list[Path]:
    """Return the files of resnest-eval out=... in a folder."""
    files = [path for path in sorted(folder.glob("*.json")) if path.is_file()]
    try:
        return [path for path in files if b'"results"' in path.read_bytes()]
    except OSError as error:
        raise ConfigError(f"{error.filename}: cannot be read ({error.strerror})") from error


class _PlainLoader(yaml.SafeLoader):
    """Reads values without aliases: the trainer writes none, and with them a small file becomes a huge value."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it has an alias")
        return super().compose_node(parent, index)


def read_values(path: Path) -> dict[str, Any]:
    """Return what the trainer wrote to a YAML or JSON file of a run folder.

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


def read_events(path: Path, numbers: dict[str, tuple[str, ...]]) -> list[dict[str, Any]]:
    """Return events of a metrics.jsonl; a line that was cut by the run's end is none.

    Args:
        path: of the file.
        numbers: what each kind of event must have, by the kind; others are passed over.

    Raises:
        ConfigError: it cannot be read, or holds something else.
    """
    require_file(path)
    try:
        events, damaged = parse_events(path)
        if damaged and not events:
            raise ValueError("no event")
        events = [event for event in events if event["event"] in numbers]
        for event in events:
            for name in numbers[event["event"]]:
                value = event[name]
                is_count = name in ("step", "epoch")  # from 1 on; a loss may be infinite
                if type(value) not in (int, float) or (is_count and not 0 < value < math.inf):
                    raise ValueError(f"{name}={value}")
                if MAX_DRAWN < abs(value) < math.inf:
                    raise ValueError(f"{name}={value}")
        return events
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise ConfigError(f"{path}: not what resnest-train writes") from error


def require_file(path: Path) -> None:
    """Raise a ConfigError for what is there and no file: a pipe or a device would be read without end."""
    if path.exists() and not path.is_file():
        raise ConfigError(f"{path}: not a file")


def _read_results(path: Path, recipes: dict[str, dict[str, Any]]) -> list[Measured]:
    try:
        content = Results.model_validate_json(path.read_bytes())
        if content.training is None:
            recipe = f"weights {content.ckpt}"
        else:
            recipe = _describe(content.training, recipes, content.epoch or 0)
            # Where there is a moving average, it is what a reader expects.
            if content.training.get("ema_decay") is not None and not content.is_average:
                recipe += ", not the moving average"
    except (OSError, ValidationError, LookupError, TypeError) as error:
        raise ConfigError(f"results={path}: not a file of resnest-eval out=...") from error
    return [
        Measured(content.model, r.crop, r.top1, r.count, content.num_classes, recipe, r.protocol, str(path))
        for r in content.results
    ]


def _read_run(folder: Path, recipes: dict[str, dict[str, Any]]) -> Measured:
    """Return the last evaluation of a run."""
    try:
        config = read_values(folder / "config.yaml")
        last = read_events(folder / "metrics.jsonl", {"eval": ("epoch", "crop", "top1", "count")})[-1]
        recipe = _describe(config["train"], recipes, last["epoch"])
        model, num_classes, protocol = config["model"]["name"], config["model"]["num_classes"], last["protocol"]
        if not (isinstance(model, str) and isinstance(num_classes, int) and isinstance(protocol, str)):
            raise TypeError(f"{model}, {num_classes}, {protocol}")
    except (ConfigError, LookupError, TypeError, AttributeError) as error:
        raise ConfigError(f"results={folder}: not a run folder with an evaluation") from error
    source = str(folder / "metrics.jsonl")
    return Measured(model, last["crop"], last["top1"], last["count"], num_classes, recipe, protocol, source)


def _describe(training: dict[str, Any], recipes: dict[str, dict[str, Any]], epoch: int) -> str:
    """Name the recipe, the values that a run set otherwise, and how far it was."""
    name = training["recipe"]
    published = recipes.get(name, {})
    changed = [f"{key}={training.get(key)}" for key, value in published.items() if training.get(key) != value]
    unfinished = [f"after {epoch} epochs"] if epoch < training["epochs"] else []
    return ", ".join([name if published else f"{name} (no recipe of this project)", *changed, *unfinished])
