"""Reads runs from their folders."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from resnest_imagenet.errors import ConfigError
from resnest_imagenet.evaluation.box_files import BoxFiles, read_box_files
from resnest_imagenet.evaluation.events import TOP1, name_metric
from resnest_imagenet.evaluation.measured import has_accuracy, list_results, measure_run, read_measured, read_values
from resnest_imagenet.evaluation.predictions import Predictions, read_predictions
from resnest_imagenet.evaluation.region_files import NamedRegions, read_regions
from resnest_imagenet.evaluation.results import Measured
from resnest_imagenet.evaluation.step_reports import (
    StepReports,
    collect_reports,
    count_steps_per_epoch,
    read_run_events,
)
from resnest_imagenet.files import read_matching, require_file, require_folder
from resnest_imagenet.options import flatten

EVENTS = "metrics.jsonl"
_NUMBERS = ("step", "loss", "lr", "images_per_s", "data_wait")  # that a page shows


@dataclass(frozen=True)
class Run:
    """The content of a run folder; the value for a missing file is empty.

    Attributes:
        name: the folder, as the user gave it.
        config: the options of resnest-train by their dotted names.
        steps: the reports about steps, of metrics.jsonl.
        evaluations: its evaluations.
        status: status.json.
        environment: environment.json.
        measured: accuracies of resnest-eval out=..., or else the training's last one.
        predictions: predictions.csv, by protocol.
        regions: iou.csv and scenes.csv, by protocol.
        boxes: the files about the best detector; None without them.
        folder: the folder's path.
    """

    name: str
    config: dict[str, Any]
    steps: StepReports
    evaluations: list[dict[str, Any]]
    status: dict[str, Any]
    environment: dict[str, Any]
    measured: list[Measured]
    predictions: list[Predictions]
    regions: list[NamedRegions] = field(default_factory=list)
    boxes: BoxFiles | None = None
    folder: Path | None = None

    @property
    def model(self) -> str | None:
        """Name of the network, if the folder has it."""
        return self.config.get("model.name") or next((result.model for result in self.measured), None)

    @property
    def metric(self) -> str:
        """The value of an evaluation by which the best network is chosen."""
        return name_metric(self.evaluations[-1] if self.evaluations else self.status)

    @property
    def best(self) -> dict[str, Any] | None:
        """The evaluation of the best network; None without any."""
        return max(self.evaluations, key=lambda event: event[self.metric], default=None)

    @property
    def steps_per_epoch(self) -> float:
        """See `count_steps_per_epoch`."""
        return count_steps_per_epoch(self.steps, self.evaluations)


def find_runs(patterns: Sequence[str], recipes: dict[str, dict[str, Any]]) -> tuple[list[Run], list[str]]:
    """Read the runs of folders and patterns, each folder once.

    Args:
        patterns: run folders, or patterns such as "runs/*".
        recipes: the values of each recipe by its name: a run's description lists the values that it changed.

    Returns:
        The runs, at least one, and a line for each path that matches a pattern but is not a run.

    Raises:
        ConfigError: there is no run, or a folder that is given without a pattern is not a run.
    """
    runs, skipped = read_matching(patterns, lambda folder: read_run(folder, recipes))
    if not runs:
        raise ConfigError(f"runs={','.join(patterns)}: no run there")
    return runs, skipped


def read_run(folder: Path, recipes: dict[str, dict[str, Any]]) -> Run:
    """Read a run folder, or any folder with results of resnest-eval.

    Raises:
        ConfigError: it is not such a folder, or a file in it cannot be read.
    """
    require_folder(folder, "runs")
    metrics, predictions = folder / EVENTS, folder / "predictions.csv"
    steps, evaluations = read_run_events(metrics, _NUMBERS) if metrics.exists() else (collect_reports([], _NUMBERS), [])
    config = flatten(_read(folder / "config.yaml"))
    if not isinstance(config.get("model.name", ""), str):
        raise ConfigError(f"{folder / 'config.yaml'}: not what resnest-train writes")
    if len({name_metric(event) for event in evaluations}) > 1:
        raise ConfigError(f"{metrics}: its evaluations are not all of the same metric")
    measured, _ = read_measured([str(path) for path in list_results(folder, (TOP1,))], recipes)
    if not measured and evaluations and has_accuracy(evaluations[-1]):
        measured = [
            result for result in [measure_run(folder, evaluations[-1], recipes)] if isinstance(result, Measured)
        ]
    iou, scenes = folder / "iou.csv", folder / "scenes.csv"
    for path in (predictions, iou, scenes):
        require_file(path)
    run = Run(
        name=str(folder).encode(errors="replace").decode(),  # charts cannot draw every name that a system allows
        config=config,
        steps=steps,
        evaluations=evaluations,
        status=_read(folder / "status.json"),
        environment=_read(folder / "environment.json"),
        measured=measured,
        predictions=read_predictions(predictions) if predictions.exists() else [],
        regions=read_regions(iou, scenes) if iou.exists() and scenes.exists() else [],
        boxes=read_box_files(folder),
        folder=folder,
    )
    has_reported = run.steps or run.evaluations or run.measured or run.predictions or run.regions or run.boxes
    if not has_reported and run.config:
        raise ConfigError(f"runs={folder}: it has reported nothing yet")
    if not has_reported:
        raise ConfigError(f"runs={folder}: neither a run folder nor one with results of resnest-eval")
    return run


def list_figures(run: Run) -> list[tuple[str, Measured]]:
    """Return the accuracies of a classifier, each with the network that has it: the best one, or a file's.

    The best network's is that of its own evaluation; then come those of resnest-eval.
    """
    best, files = run.best, [result for result in run.measured if Path(result.source).name != EVENTS]
    figures = [(Path(result.source).name + (f", tta={result.tta}" if result.tta else ""), result) for result in files]
    if best is None or not has_accuracy(best) or type(best["count"]) is not int:
        return figures
    recipe = next((result.recipe for result in run.measured), str(run.config.get("train.recipe", "")))
    num_classes = run.config.get("model.num_classes") or 0
    own = Measured(
        run.model or "", best["crop"], best[TOP1], best["count"], num_classes, recipe, str(best["protocol"]), run.name
    )
    return [(f"best, epoch {best['epoch']}", own), *figures]


def list_differences(runs: list[Run]) -> list[tuple[str, list[Any]]]:
    """Return the options that differ between runs, each with its values; without run_dir."""
    configs = [run.config for run in runs if run.config]
    names = dict.fromkeys(name for config in configs for name in config if name != "run_dir")
    values = ((name, [config.get(name, "") for config in configs]) for name in names)
    return [(name, of_runs) for name, of_runs in values if any(value != of_runs[0] for value in of_runs)]


def _read(path: Path) -> dict[str, Any]:
    """Return the content of a YAML or JSON file, {} if there is none."""
    return read_values(path) if path.exists() else {}
