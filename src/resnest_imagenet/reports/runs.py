"""What runs did: read from their folders, drawn on one page."""

import glob
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resnest_imagenet import distributed
from resnest_imagenet.compute import name_device
from resnest_imagenet.config import ReportConfig
from resnest_imagenet.errors import ConfigError, UserError
from resnest_imagenet.evaluation.latency import measure_latency
from resnest_imagenet.evaluation.predictions import Predictions, read_predictions
from resnest_imagenet.evaluation.results import (
    Measured,
    list_results,
    read_events,
    read_measured,
    read_values,
    require_file,
)
from resnest_imagenet.files import replacing, require_writable
from resnest_imagenet.models.zoo import build_model, list_models
from resnest_imagenet.reports.table3 import PAPER

# What the page takes of each event.
_KEYS = {"train": ("step", "loss", "lr", "images_per_s", "data_wait"), "eval": ("step", "epoch", "top1")}


@dataclass(frozen=True)
class Run:
    """What a run folder holds; what is not there is empty.

    Attributes:
        name: the folder, as the user gave it.
        config: the options of resnest-train by their dotted names.
        steps, evaluations: the events of metrics.jsonl.
        status: status.json.
        environment: environment.json.
        measured: accuracies of resnest-eval out=..., or else the last one of the training.
        predictions: predictions.csv, by protocol.
    """

    name: str
    config: dict[str, Any]
    steps: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    status: dict[str, Any]
    environment: dict[str, Any]
    measured: list[Measured]
    predictions: list[Predictions]

    @property
    def model(self) -> str | None:
        """Name of the network, where the folder tells."""
        return self.config.get("model.name") or next((one.model for one in self.measured), None)

    @property
    def steps_per_epoch(self) -> float:
        """From the first evaluation; 1 before there is one: then steps stand for epochs."""
        return next((event["step"] / event["epoch"] for event in self.evaluations), 1)


def write_report(config: ReportConfig, recipes: dict[str, dict[str, Any]]) -> tuple[list[Run], list[str]]:
    """Write the page to `config.out`.

    Args:
        config: of resnest-report.
        recipes: the values of each recipe by its name: what a run changed is named.

    Returns:
        The runs on it, and a line for everything that a pattern matches and that is none.

    Raises:
        UserError: for what a user can cause, as one line.
    """
    from resnest_imagenet.reports.report import render_report

    require_writable(Path(config.out), "out")
    device = distributed.choose_device(config.device)
    runs, left_out = _find_runs(config.runs, recipes)
    latency: dict[str, float] = {}
    if config.latency:
        names = {row.model for row in PAPER} | {one.model for run in runs for one in run.measured}
        networks = {name: build_model(name) for name in sorted(names.intersection(list_models()))}
        latency = measure_latency(networks, config.crop, 1, device, rounds=5)
    with replacing(Path(config.out)) as file:
        page = render_report(runs, config.crop, latency, name_device(device))
        # Names of files come back as their bytes; no other half of a character is text.
        page = re.sub("[\ud800-\udc7f\udd00-\udfff]", "\ufffd", page)
        file.write(page.encode(errors="surrogateescape"))
    return runs, left_out


def _find_runs(patterns: list[str], recipes: dict[str, dict[str, Any]]) -> tuple[list[Run], list[str]]:
    runs: list[Run] = []
    left_out: list[str] = []
    seen: list[str] = []
    for pattern in patterns:
        is_path = Path(pattern).exists() or not glob.has_magic(pattern)
        for name in [pattern] if is_path else sorted(glob.glob(pattern)):
            if any(os.path.abspath(name) == each for each in seen):
                continue
            seen.append(os.path.abspath(name))
            try:
                runs.append(read_run(Path(name), recipes))
            except UserError as error:
                if is_path:
                    raise
                left_out.append(str(error))
    if not runs:
        raise ConfigError(f"runs={','.join(patterns)}: no run there")
    return runs, left_out


def read_run(folder: Path, recipes: dict[str, dict[str, Any]]) -> Run:
    """Read a run folder, or any folder with results of resnest-eval.

    Raises:
        ConfigError: there is nothing of the kind, or something that cannot be read.
    """
    if not folder.is_dir():
        raise ConfigError(f"runs={folder}: {'not a' if folder.exists() else 'no such'} folder")
    metrics, predictions = folder / "metrics.jsonl", folder / "predictions.csv"
    events = read_events(metrics, _KEYS) if metrics.exists() else []
    config = _flatten(_read(folder / "config.yaml"))
    if not isinstance(config.get("model.name", ""), str):
        raise ConfigError(f"{folder / 'config.yaml'}: not what resnest-train writes")
    evaluations = [event for event in events if event["event"] == "eval"]
    results = [str(path) for path in list_results(folder)]
    require_file(predictions)
    run = Run(
        name=str(folder).encode(errors="replace").decode(),  # charts cannot draw everything that a system can name
        config=config,
        steps=[event for event in events if event["event"] == "train"],
        evaluations=evaluations,
        status=_read(folder / "status.json"),
        environment=_read(folder / "environment.json"),
        measured=read_measured(results or ([str(folder)] if evaluations else []), recipes)[0],
        predictions=read_predictions(predictions) if predictions.exists() else [],
    )
    if not (run.steps or run.measured or run.predictions) and run.config:
        raise ConfigError(f"runs={folder}: it has reported nothing yet")
    if not (run.steps or run.measured or run.predictions):
        raise ConfigError(f"runs={folder}: neither a run folder nor one with results of resnest-eval")
    return run


def list_differences(runs: list[Run]) -> list[tuple[str, list[Any]]]:
    """Return the options that differ between runs, each with its values; run_dir is left out."""
    configs = [run.config for run in runs if run.config]
    names = dict.fromkeys(name for config in configs for name in config if name != "run_dir")
    values = ((name, [config.get(name, "") for config in configs]) for name in names)
    return [(name, each) for name, each in values if any(value != each[0] for value in each)]


def _read(path: Path) -> dict[str, Any]:
    """Return the content of a YAML or JSON file, {} where there is none."""
    return read_values(path) if path.exists() else {}


def _flatten(options: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in options.items():
        flat |= _flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat
