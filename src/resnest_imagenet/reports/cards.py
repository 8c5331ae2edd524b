"""What came of a run, at a glance: its state, best figure, worst class, calibration, duration, date, and data."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from resnest_imagenet.evaluation.events import TOP1, format_seconds
from resnest_imagenet.evaluation.intervals import describe_confidence, judge_confidence, wilson_interval
from resnest_imagenet.evaluation.mistakes import calibration_error, count_confusions, measure_classes
from resnest_imagenet.evaluation.score import title_metric
from resnest_imagenet.models.imagenet_classes import short_class_names
from resnest_imagenet.reports.runs import Run

_TONES = {"finished": "good", "failed": "bad"}
_REASON = 200  # characters of an error
_LAST_TIME = 1e11  # in seconds: later ones have no date


@dataclass(frozen=True)
class Card:
    """A figure with its subject.

    Attributes:
        label: the subject.
        value: the figure, in few words.
        note: what it needs besides; "" for nothing.
        tone: "good", "bad" or "".
    """

    label: str
    value: str
    note: str = ""
    tone: str = ""


def list_cards(run: Run) -> list[Card]:
    """Return the cards of a run, those without a figure skipped."""
    cards = (*_describe_state(run), *_describe_best(run), *_describe_predictions(run), *_describe_others(run))
    return [*cards, *_describe_time(run), *_describe_data(run)]


def _describe_state(run: Run) -> Iterator[Card]:
    state = run.status.get("state")
    if not isinstance(state, str):
        return
    told = run.status.get("reason" if state == "finished" else "error")  # as train.patience=5
    reason = told if isinstance(told, str) else ""
    reason = reason if len(reason) <= _REASON else f"{reason[:_REASON]} ..."
    if state == "running":
        reason = "it runs still, or its process was killed"
    progress = describe_progress(run)
    note = "; ".join(filter(None, (progress and f"epochs: {progress}", reason)))
    yield Card("state", state, note, _TONES.get(state, ""))


def _describe_best(run: Run) -> Iterator[Card]:
    best = run.best
    if best is None:
        for result in run.measured[:1]:
            yield Card("top-1", f"{result.top1:.2f} %", _add_interval(result.top1, result.count, result.protocol))
        return
    value, title = best[run.metric], title_metric(run.metric)
    name = f"best {title}"
    note = f"after epoch {best['epoch']} of {read_length(run)}"
    count = best.get("count")
    if run.metric == TOP1 and type(count) is int and count > 0:
        note = _add_interval(value, count, note)
    yield Card(name, f"{value:.2f} %" if title != run.metric or run.metric == TOP1 else f"{value:.4g}", note)


def _add_interval(percent: float, count: int, note: str) -> str:
    if count < 1:  # a results file of others
        return note
    low, high = wilson_interval(min(max(percent / 100, 0.0), 1.0), count)
    return f"95 % interval {100 * low:.1f} to {100 * high:.1f}; {note}"


def _describe_predictions(run: Run) -> Iterator[Card]:
    if not run.predictions:
        return
    predictions = run.predictions[0]
    evaluation, names = predictions.evaluation, short_class_names(predictions.classes)
    figures = measure_classes(count_confusions(evaluation, len(names)))
    if not np.isnan(figures.recall).all() and len(names) > 1:
        worst = int(np.nanargmin(figures.recall))
        shares = f"recall {figures.recall[worst]:.1f} %, precision {figures.precision[worst]:.1f} %"
        yield Card("worst class", names[worst], f"{shares}, {figures.images[worst]:,} images")
    _, chance = judge_confidence(evaluation)
    note = f"calibration error {calibration_error(evaluation):.3f}; chance of {evaluation.count:,} images: {chance:.3f}"
    yield Card("confidence", describe_confidence(evaluation), note)


def _describe_others(run: Run) -> Iterator[Card]:
    """Yield the worst class of other tasks."""
    for regions in run.regions[:1]:
        iou = np.where(regions.regions.is_present, regions.regions.iou, np.inf)
        worst = int(iou.argmin())
        if np.isfinite(iou[worst]):
            yield Card("worst class", regions.classes[worst], f"IoU {iou[worst]:.2f} %")
    rows = [row for row in run.boxes.ap if row.kind == "box" and row.values["ap"] is not None] if run.boxes else []
    if rows:
        row = min(rows, key=lambda row: row.values["ap"] or 0)
        yield Card("worst class", row.name, f"AP {row.values['ap']:.2f} %, {row.values['objects'] or 0:,.0f} objects")


def _describe_time(run: Run) -> Iterator[Card]:
    times = [event["time"] for event in run.evaluations if _is_time(event.get("time"))]
    if run.steps:
        of_steps = run.steps["time"]
        times += of_steps[(of_steps > 0) & (of_steps < _LAST_TIME)].tolist()
    ended = run.status.get("time") if _is_time(run.status.get("time")) else max(times, default=None)
    if len(times) > 1:
        yield Card("duration", format_seconds(max(times) - min(times)), "from the first report to the last")
    if ended is not None:
        date, clock = (time.strftime(form, time.gmtime(ended)) for form in ("%Y-%m-%d", "%H:%M UTC"))
        yield Card("date", date, clock)


def _is_time(value: Any) -> bool:
    return isinstance(value, int | float) and 0 < value < _LAST_TIME


def _describe_data(run: Run) -> Iterator[Card]:
    count = (run.best or {}).get("count") or next((result.count for result in run.measured), None)
    num_classes = run.config.get("model.num_classes") or next((result.num_classes for result in run.measured), None)
    if type(count) is int:
        note = f"{num_classes:,} classes" if type(num_classes) is int else ""
        yield Card("evaluated on", f"{count:,} images", note)


def describe_progress(run: Run) -> str:
    """Return the epochs before a run's last evaluation, or the steps if the run counts steps; "" without any."""
    if not run.evaluations:
        return ""
    last, steps = run.evaluations[-1], run.config.get("train.steps")
    if steps is not None:
        return f"{last['epoch']} ({last['step']} of {steps} steps)"
    return f"{last['epoch']} of {read_length(run)}"


def read_length(run: Run) -> Any:
    """Return the epochs that a run is to have, as its configuration has them; those of the last evaluation without."""
    epochs = run.config.get("train.epochs")
    if epochs is None and run.evaluations and run.config.get("train.steps") is not None:
        return run.evaluations[-1]["epoch"]
    return "?" if epochs is None else epochs
