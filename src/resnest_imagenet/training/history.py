"""The events of a run that resumes: those that remain in metrics.jsonl, and those that it will write again."""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from resnest_imagenet.evaluation.events import Event, scan_events
from resnest_imagenet.files import DAMAGED, write_atomically
from resnest_imagenet.training.state import TrainingState


@dataclass
class History:
    """The events of a run up to its state. Iterating reads them from the file: a long run has millions.

    Attributes:
        path: of metrics.jsonl.
        metric: chooses the best network.
        best: its best value so far.
        loss: the last loss; None before the first report.
        value: the metric of the last evaluation; None before it.
        best_epoch: epoch of the best value, from 1 on; None too where the file has lost it.
        dropped_files: names in the evaluations that were dropped.
    """

    path: Path
    metric: str
    best: float
    loss: float | None = None
    value: float | None = None
    best_epoch: int | None = None
    dropped_files: list[str] = field(default_factory=list)

    def __iter__(self) -> Iterator[Event]:
        """Yield the events, in their order."""
        return (event for event in scan_events(self.path) if not isinstance(event, bytes))

    def _add(self, event: Event) -> None:
        if event["event"] == "train" and isinstance(event.get("loss"), float):
            self.loss = event["loss"]
        if event["event"] == "eval" and isinstance(value := event.get(self.metric), float):
            self.value = value
            if self.best_epoch is None and value == self.best:
                self.best_epoch = event["epoch"]


def resume_history(path: Path, metric: str, state: TrainingState) -> History:
    """Drop the events after a state, which the run will write again; move damaged lines to a file of their own.

    A last line that is cut off is dropped too: it was written after the last checkpoint.

    Args:
        path: of metrics.jsonl; written whole or not at all.
        metric: chooses the best network.
        state: from which the run resumes.

    Raises:
        StorageError: it cannot be written.
    """
    history = History(path, metric, state.best)
    damaged, last = [], None
    with write_atomically(path) as file:
        for event in scan_events(path):
            if isinstance(event, bytes) or not _is_whole(event):
                damaged.append(event if isinstance(event, bytes) else json.dumps(event).encode())
            elif not _is_before(event, state):
                names = event.get("files")
                history.dropped_files += names if isinstance(names, list) else []
            elif event != last:
                file.write(json.dumps(event).encode() + b"\n")
                history._add(event)
                last = event
        if damaged:
            aside = path.with_name(path.name + DAMAGED)
            with open(aside, "ab") as other:
                other.writelines(line + b"\n" for line in damaged)
            print(f"WARNING: {path}: damaged lines moved to {aside.name}: {len(damaged)}", file=sys.stderr, flush=True)
    return history


def _is_whole(event: Event) -> bool:
    """Return whether an event has epoch, step and time, and trackers can show them."""
    counts, when = (event.get("epoch"), event.get("step")), event.get("time")
    is_timed = isinstance(when, int | float) and 0 <= when < 1e11
    return is_timed and all(type(count) is int and count >= 0 for count in counts)


def _is_before(event: Event, state: TrainingState) -> bool:
    """Return whether an event is from before a state; after an evaluation, a state has the same step as before it."""
    if event["event"] == "eval":
        return (event["step"], event["epoch"]) <= (state.step, state.epoch)
    return event["step"] <= state.step
