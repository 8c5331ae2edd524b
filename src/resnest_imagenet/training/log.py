"""What a run says: a progress bar or plain lines, metrics.jsonl, and what the trackers show."""

import json
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from torch import Tensor
from tqdm import tqdm

from resnest_imagenet.config import TrainConfig
from resnest_imagenet.data.source import ImageSource
from resnest_imagenet.data.transforms import EvalTransform
from resnest_imagenet.errors import DataError
from resnest_imagenet.evaluation.accuracy import Evaluation
from resnest_imagenet.evaluation.events import Event, parse_events
from resnest_imagenet.evaluation.predictions import read_predictions, write_predictions
from resnest_imagenet.files import DAMAGED, replacing, storing, synchronise_file
from resnest_imagenet.tasks.pictures import draw_confusions, draw_samples
from resnest_imagenet.training.health import Verdict
from resnest_imagenet.training.schedule import StepPlan
from resnest_imagenet.training.state import TrainingState
from resnest_imagenet.training.trackers import Tracker, open_trackers, show_event

SHOWN_SAMPLES = 16


@dataclass(frozen=True)
class Report:
    """Some steps of training.

    Attributes:
        loss: mean over the steps and ranks.
        steps: how many.
        seconds: they took.
        waited: seconds of them spent waiting for data.
    """

    loss: float
    steps: int
    seconds: float
    waited: float


class RunLog:
    """Reports of rank 0; for the other ranks nothing is shown or written.

    Attributes:
        wants_samples: whether the trackers still lack a batch of this process.
    """

    def __init__(
        self,
        folder: Path,
        plan: StepPlan,
        config: TrainConfig,
        state: TrainingState,
        is_main: bool,
        ending: ExitStack,
    ) -> None:
        """Open the files.

        Args:
            folder: of the run.
            plan: its steps.
            config: its configuration.
            state: where it begins or goes on.
            is_main: whether this rank shows and writes.
            ending: closes the trackers when all else of the run has ended, whatever it ended with.
        """
        self._plan = plan
        self._every_steps = config.log.every_steps
        self._is_main = is_main
        self._bar = tqdm(disable=True)
        self._seconds_per_step = 0.0
        self._loss: float | None = None
        self._folder = folder
        self._trackers: list[Tracker] = []
        self._samples: tuple[int, Tensor] | None = None
        if is_main:
            with storing(folder / "metrics.jsonl"):
                events = _keep_events(folder / "metrics.jsonl", state)
                self._metrics = open(folder / "metrics.jsonl", "a", buffering=1)  # noqa: SIM115 - until __exit__
            losses = (event.get("loss") for event in reversed(events) if event["event"] == "train")
            self._loss = next((loss for loss in losses if isinstance(loss, float)), None)
            _drop_other_predictions(folder / "predictions.csv", state.best_top1)
            self._trackers = open_trackers(folder, config, state.step, events)
            for tracker in self._trackers:
                ending.push(partial(_close, tracker))
        self.wants_samples = bool(self._trackers)

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Flush and close the files."""
        self._bar.close()
        if self._is_main:
            with storing(self._folder / "metrics.jsonl"):
                self._metrics.close()

    def is_due(self, state: TrainingState) -> bool:
        """Say whether to report now: every so many steps and at the end of an epoch; the same on all ranks."""
        return state.step % self._every_steps == 0 or state.step % self._plan.steps_per_epoch == 0

    def start_epoch(self, state: TrainingState) -> None:
        """Show a new bar, on a terminal."""
        if self._is_main:
            # disable=None: no bar where stderr is no terminal; there `training` prints plain lines.
            self._bar = tqdm(
                total=self._plan.steps_per_epoch,
                initial=state.step - state.epoch * self._plan.steps_per_epoch,
                desc=self._name_epoch(state.epoch),
                disable=None,
                leave=False,
                bar_format="{desc} |{bar:8}| {n_fmt}/{total_fmt}{postfix}",
            )

    def advance(self) -> None:
        """Move the bar by one step."""
        self._bar.update()

    def samples(self, state: TrainingState, images: Tensor) -> None:
        """Keep some images of a batch that is about to be trained on, to be shown with the next report.

        Args:
            state: before its step.
            images: (B, 3, H, W), as the network sees them; they stay on the device until then.
        """
        self._samples = state.step, images[:SHOWN_SAMPLES].clone()
        self.wants_samples = False

    def training(self, state: TrainingState, lr: float, report: Report) -> None:
        """Show and write the steps since the last report; `state` is after the last of them."""
        if not self._is_main:
            return
        speed = report.steps * self._plan.global_batch / report.seconds
        wait = report.waited / report.seconds
        self._write("train", state, {"loss": report.loss, "lr": lr, "images_per_s": speed, "data_wait": wait})
        self._seconds_per_step = report.seconds / report.steps
        self._loss = report.loss
        if self._samples is not None:
            step, images = self._samples
            self._show("train/samples", step, draw_samples(images))
            self._samples = None
        end_of_epoch = (state.epoch + 1) * self._plan.steps_per_epoch
        # What matters most comes first: a narrow terminal cuts the end.
        line = (
            f"left {self._time(end_of_epoch - state.step)}, run {self._time(self._plan.total_steps - state.step)}, "
            f"loss {report.loss:.3f}, lr {lr:.3g}, {speed:.0f} images/s, data wait {wait:.0%}"
        )
        if self._bar.disable:
            done = self._plan.steps_per_epoch - (end_of_epoch - state.step)
            print(f"{self._name_epoch(state.epoch)} {done}/{self._plan.steps_per_epoch}, {line}", flush=True)
        else:
            self._bar.set_postfix_str(line)

    def evaluation(
        self, state: TrainingState, evaluation: Evaluation, images: ImageSource, transform: EvalTransform
    ) -> None:
        """Show and write the evaluation that ended an epoch.

        Args:
            state: counts that epoch already, but this evaluation is not yet in its best accuracy.
            evaluation: of the val images.
            images: these.
            transform: what was done to them.
        """
        if not self._is_main:
            return
        self._bar.close()
        values = {"top1": evaluation.top1, "top5": evaluation.top5, "count": evaluation.count}
        self._write("eval", state, {**values, "crop": transform.crop, "protocol": transform.protocol})
        if evaluation.top1 > state.best_top1:
            write_predictions(self._folder / "predictions.csv", images, [(transform.protocol, evaluation)])
        epoch = self._name_epoch(state.epoch - 1)
        if self._trackers:
            title = f"{epoch}: top-1 {evaluation.top1:.2f} % of {evaluation.count} images"
            self._show("eval/confusions", state.step, draw_confusions(evaluation, images.classes, title))
        loss = "" if self._loss is None else f"loss {self._loss:.3f}, "
        print(
            f"{epoch}: {loss}top-1 {evaluation.top1:.2f} %, "
            f"top-5 {evaluation.top5:.2f} % of {evaluation.count} images ({transform.protocol})",
            flush=True,
        )

    def skipped(self, verdict: Verdict) -> None:
        """Show and write that a step was not applied."""
        if self._is_main:
            self._write("skipped", verdict, {"lr": verdict.lr, "ranks": verdict.unsound})
            who = f"on ranks {verdict.unsound}" if verdict.unsound else "in the sum over the ranks"
            print(f"step {verdict.step} was not applied: loss or gradient not finite {who}", flush=True)

    def synchronise(self) -> None:
        """Write to the disk what a checkpoint is about to rely on."""
        if self._is_main:
            with storing(self._folder / "metrics.jsonl"):
                synchronise_file(self._metrics.fileno(), self._folder / "metrics.jsonl")

    def _write(self, event: str, when: TrainingState | Verdict, values: dict[str, Any]) -> None:
        line = {"event": event, "epoch": when.epoch, "step": when.step, **values, "time": time.time()}
        with storing(self._folder):
            self._metrics.write(json.dumps(line) + "\n")
        for tracker in self._trackers:
            show_event(tracker, line)

    def _show(self, name: str, step: int, pixels: np.ndarray) -> None:
        for tracker in self._trackers:
            tracker.image(name, step, pixels)

    def _name_epoch(self, epoch: int) -> str:
        return f"epoch {epoch + 1}/{self._plan.total_steps // self._plan.steps_per_epoch}"

    def _time(self, steps: int) -> str:
        return tqdm.format_interval(steps * self._seconds_per_step)


def _close(
    tracker: Tracker, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
) -> None:
    """Tell a tracker how the run ended."""
    tracker.close(error)


def _drop_other_predictions(path: Path, best_top1: float) -> None:
    """Remove predictions that are not those of the best network: a run may die between writing one and the other."""
    if not path.exists():
        return
    try:
        is_of_best = [said.evaluation.top1 for said in read_predictions(path)] == [best_top1]
    except DataError:
        is_of_best = False
    if not is_of_best:
        path.unlink()


def _keep_events(path: Path, state: TrainingState) -> list[Event]:
    """Drop the events after a state, which come again, and return the others; damaged lines go to a file of their own.

    A line that is cut is dropped too: it was written after the last checkpoint.
    """
    events, damaged = parse_events(path)
    damaged += [json.dumps(event).encode() for event in events if not _is_whole(event)]
    if damaged:
        aside = path.with_name(path.name + DAMAGED)
        with open(aside, "ab") as file:
            file.writelines(line + b"\n" for line in damaged)
        print(f"WARNING: {path}: damaged lines moved to {aside.name}: {len(damaged)}", file=sys.stderr, flush=True)
    # An evaluation counts as one epoch more than the steps before it, at the same step.
    whole = filter(_is_whole, events)
    kept = {json.dumps(event) + "\n": event for event in whole if _is_before(event, state)}
    with replacing(path) as file:
        file.writelines(line.encode() for line in kept)
    return list(kept.values())


def _is_whole(event: Event) -> bool:
    """Say whether an event has what all have, of a size that trackers take."""
    counts, when = (event.get("epoch"), event.get("step")), event.get("time")
    is_timed = isinstance(when, int | float) and 0 <= when < 1e11
    return is_timed and all(type(count) is int and count >= 0 for count in counts)


def _is_before(event: Event, state: TrainingState) -> bool:
    return event["step"] <= state.step and event["epoch"] <= state.epoch
