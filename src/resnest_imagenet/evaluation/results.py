"""Accuracies that were measured, read from results files and run folders."""

import glob
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from resnest_imagenet.errors import ConfigError


@dataclass(frozen=True)
class Measured:
    """One accuracy that was measured here.

    Attributes:
        model: a name of models/zoo.py.
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


def read_measured(patterns: list[str], recipes: dict[str, dict[str, Any]]) -> list[Measured]:
    """Read results files (of resnest-eval out=...) and run folders.

    A run folder stands for the results files in it, or without any for the evaluation after its last epoch.

    Args:
        patterns: paths, or patterns with * that may find none.
        recipes: the values of each recipe by its name: what a run changed is named.

    Raises:
        ConfigError: for a path that is not there, or is neither.
    """
    found: list[Measured] = []
    for pattern in patterns:
        paths = [Path(path) for path in sorted(glob.glob(pattern))]
        if not paths and not glob.has_magic(pattern):
            raise ConfigError(f"results={pattern}: no such file or run folder")
        for path in paths:
            if path.is_file():
                found += _read_results(path, recipes)
            elif (path / "config.yaml").is_file():
                files = [file for file in sorted(path.glob("*.json")) if "results" in _read_json(file)]
                found += [one for file in files for one in _read_results(file, recipes)] or _read_run(path, recipes)
            elif not glob.has_magic(pattern):
                raise ConfigError(f"results={path}: neither a results file nor a run folder")
    return found


def _read_results(path: Path, recipes: dict[str, dict[str, Any]]) -> list[Measured]:
    content = _read_json(path)
    try:
        recipe = f"weights {content['ckpt']}" if content["recipe"] is None else _describe(content["recipe"], recipes)
        return [
            Measured(
                content["model"],
                r["crop"],
                r["top1"],
                r["count"],
                content["num_classes"],
                recipe,
                r["protocol"],
                str(path),
            )
            for r in content["results"]
        ]
    except (KeyError, TypeError) as error:
        raise ConfigError(f"results={path}: not written by resnest-eval out=... (lacks {error})") from error


def _read_run(folder: Path, recipes: dict[str, dict[str, Any]]) -> list[Measured]:
    config = yaml.safe_load((folder / "config.yaml").read_text())
    metrics = folder / "metrics.jsonl"
    events = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
    evaluations = [event for event in events if event["event"] == "eval"]
    if not evaluations:
        return []
    last, model, recipe = evaluations[-1], config["model"], _describe(config["train"], recipes)
    if last["epoch"] < config["train"]["epochs"]:
        recipe += f", after {last['epoch']} epochs"
    crop, top1, count, protocol = config["eval"]["crop"], last["top1"], last["count"], last["protocol"]
    return [Measured(model["name"], crop, top1, count, model["num_classes"], recipe, protocol, str(metrics))]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"results={path}: not a readable JSON file") from error
    return content if isinstance(content, dict) else {}


def _describe(options: dict[str, Any], recipes: dict[str, dict[str, Any]]) -> str:
    """Name the recipe, and the values that a run set otherwise."""
    name = options["recipe"]
    published = recipes.get(name, {})
    changed = [f"{key}={options.get(key)}" for key, value in published.items() if options.get(key) != value]
    return ", ".join([name if published else f"{name} (unknown)", *changed])
