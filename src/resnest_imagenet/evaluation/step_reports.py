"""A run's reports about its steps, as columns: a long run has a million of them."""

import math
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from resnest_imagenet.evaluation.events import (
    MAX_DRAWN,
    Event,
    name_metric,
    refusing_other_content,
    require_numbers,
    stream_events,
)

_OPTIONAL = ("epoch", "time")  # earlier versions wrote reports without them
_NUMBERS = (int, float)
_CHUNK = 4096  # events that are in the memory at a time


@dataclass(frozen=True)
class StepReports:
    """The reports in their order.

    Attributes:
        columns: float64 (N,) by name; NaN where a report has no epoch or no time.
    """

    columns: Mapping[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.columns["step"])

    def __getitem__(self, name: str) -> np.ndarray:
        return self.columns[name]


def read_run_events(path: Path, names: Sequence[str]) -> tuple[StepReports, list[Event]]:
    """Return the reports and the evaluations of a metrics.jsonl, read once and line by line.

    Args:
        path: of the file.
        names: the numbers that each report must have, "step" among them. An evaluation must have its step, its epoch
            and the value of its metric.

    Raises:
        ConfigError: it cannot be read, or holds something else.
    """
    evaluations: list[Event] = []

    def select_reports() -> Iterator[Event]:
        for event in stream_events(path):
            if event["event"] == "train":
                yield event
            elif event["event"] == "eval":
                require_numbers(event, ("step", "epoch", name_metric(event)))
                evaluations.append(event)

    with refusing_other_content(path):
        return collect_reports(select_reports(), names), evaluations


def collect_reports(events: Iterable[Event], names: Sequence[str] = ("step",)) -> StepReports:
    """Return the numbers of reports as columns.

    Raises:
        LookupError, ValueError, OverflowError: a report lacks one of them, or charts cannot draw it.
    """
    columns = {name: array("d") for name in dict.fromkeys((*names, *_OPTIONAL))}
    rest = iter(events)
    while chunk := list(islice(rest, _CHUNK)):
        for name, column in columns.items():
            if name in names:
                values = [event[name] for event in chunk]
                if not set(_NUMBERS).issuperset(map(type, values)):
                    raise ValueError(f"{name}: not a number")
            else:
                values = [value if type(value := event.get(name)) in _NUMBERS else math.nan for event in chunk]
            column.extend(values)
    arrays = {name: np.array(column) for name, column in columns.items()}
    for name in names:
        _require_drawable(name, arrays[name])
    return StepReports(arrays)


def _require_drawable(name: str, values: np.ndarray) -> None:
    """Raise a ValueError as `require_numbers` does."""
    is_wrong = (np.abs(values) > MAX_DRAWN) & np.isfinite(values)
    if name == "step":
        is_wrong |= ~((values > 0) & np.isfinite(values))
    if is_wrong.any():
        raise ValueError(f"{name}={values[is_wrong][0]}")


def count_steps_per_epoch(reports: StepReports, evaluations: Sequence[Event]) -> float:
    """Return an epoch's steps: of the last report of the first epoch, or else by the first evaluation.

    It is 1 without either: a chart then has steps, not epochs. A run's last epoch may be shorter, and the first
    evaluation may come after it.
    """
    first_epoch = reports["step"][reports["epoch"] == 1]
    if len(first_epoch) and (evaluations or len(first_epoch) < len(reports)):  # the first epoch has ended
        return float(first_epoch.max())
    return next((event["step"] / event["epoch"] for event in evaluations), 1)
