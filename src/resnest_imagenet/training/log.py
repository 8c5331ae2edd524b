"""The reports of a run: a progress bar or plain lines, metrics.jsonl, and what the trackers show."""

import json
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from tqdm import tqdm

from resnest_imagenet.distributed import Ranks
from resnest_imagenet.evaluation.score import Score, title_metric
from resnest_imagenet.files import make_way, naming_storage_errors, synchronise_file, write_atomically
from resnest_imagenet.tasks.task import Task
from resnest_imagenet.training.describe import describe_plan, describe_result, format_lines
from resnest_imagenet.training.health import Verdict
from resnest_imagenet.training.history import resume_history
from resnest_imagenet.training.losses import TOTAL
from resnest_imagenet.training.pictures import write_pictures
from resnest_imagenet.training.schedule import StepPlan
from resnest_imagenet.training.state import TrainingState
from resnest_imagenet.training.trackers import Tracker, open_trackers, show_event


@dataclass(frozen=True)
class Report:
    """A report about some steps of training.

    Attributes:
        losses: means over the steps and ranks, by name: "loss", and its parts if there are several.
        steps: number of steps.
        seconds: their duration.
        waited: seconds of that spent waiting for data.
    """

    losses: Mapping[str, float]
    steps: int
    seconds: float
    waited: float


class RunLog:
    """Reports the run on rank 0; on other ranks nothing is shown or written.

    Attributes:
        wants_samples: whether the trackers still need a picture of a batch from this process.
    """

    def __init__(
        self,
        folder: Path,
        plan: StepPlan,
        task: Task,
        state: TrainingState,
        ranks: Ranks,
        ending: ExitStack,
    ) -> None:
        """Open the files, and show the plan of the run.

        Args:
            folder: of the run.
            plan: its steps.
            task: of the run.
            state: with which it begins or resumes.
            ranks: the ranks of the run; rank 0 shows and writes.
            ending: closes the trackers after the rest of the run has ended, with or without an error.
        """
        self._plan = plan
        self._task = task
        self._metric = task.metric
        self._every_steps = task.config.log.every_steps
        self._is_main, self._device = ranks.is_main, ranks.device
        self._bar = tqdm(disable=True)
        self._seconds_per_step = 0.0
        self._loss: float | None = None
        self._value: float | None = None  # of the metric, in the last evaluation
        self._best_epoch: int | None = None  # from 1 on; None too where metrics.jsonl has lost it
        self._first_step, self._started = state.step, time.monotonic()
        self._folder = folder
        self._trackers: list[Tracker] = []
        self._samples: tuple[int, Callable[[], np.ndarray]] | None = None
        if ranks.is_main:
            print(format_lines(describe_plan(task, plan, state, ranks)), flush=True)
            with naming_storage_errors(folder / "metrics.jsonl"):
                history = resume_history(folder / "metrics.jsonl", task.metric, state)
                self._metrics = open(folder / "metrics.jsonl", "a", buffering=1)  # noqa: SIM115 - until __exit__
            self._loss, self._value, self._best_epoch = history.loss, history.value, history.best_epoch
            _remove_files(folder, history.dropped_files)
            self._trackers = open_trackers(folder, task.config, task.metric, state.step, history)
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
            with naming_storage_errors(self._folder / "metrics.jsonl"):
                self._metrics.close()

    def is_due(self, state: TrainingState) -> bool:
        """Return whether to report now: every `log.every_steps` steps and at an epoch's end; equal on all ranks."""
        return state.step % self._every_steps == 0 or state.step == self._plan.end_of_epoch(state.epoch)

    def start_epoch(self, state: TrainingState) -> None:
        """Show a new bar, on a terminal."""
        self._bar.close()
        if self._is_main:
            # disable=None: no bar if stderr is not a terminal; `training` then prints plain lines.
            self._bar = tqdm(
                total=self._count_steps(state.epoch),
                initial=state.step - state.epoch * self._plan.steps_per_epoch,
                desc=self._name_epoch(state.epoch),
                disable=None,
                leave=False,
                dynamic_ncols=True,
                bar_format="{desc} |{bar:8}| {n_fmt}/{total_fmt}{postfix}",
            )

    def advance(self) -> None:
        """Move the bar by one step."""
        self._bar.update()

    def samples(self, state: TrainingState, draw: Callable[[], np.ndarray]) -> None:
        """Keep a picture of the next batch; it is shown with the next report.

        Args:
            state: before its step.
            draw: returns uint8 (H, W, 3); called at the report, when the device has finished the step.
        """
        self._samples = state.step, draw
        self.wants_samples = False

    def training(self, state: TrainingState, lr: float, report: Report) -> None:
        """Show and write the steps since the last report; `state` is after the last of them."""
        if not self._is_main:
            return
        speed = report.steps * self._plan.global_batch / report.seconds
        wait = report.waited / report.seconds
        self._write("train", state, {**report.losses, "lr": lr, "images_per_s": speed, "data_wait": wait})
        self._seconds_per_step = report.seconds / report.steps
        self._loss = report.losses[TOTAL]
        if self._samples is not None:
            step, draw = self._samples
            self._show("train/samples", step, draw())
            self._samples = None
        end_of_epoch = self._plan.end_of_epoch(state.epoch)
        left, left_of_run = end_of_epoch - state.step, self._plan.total_steps - state.step
        # What matters most comes first: a narrow terminal cuts the end.
        line = (
            f"{self._describe_figures()}, left: epoch {self._time(left)}, run {self._time(left_of_run)}, "
            f"lr {lr:.3g}, {speed:.0f} images/s, data wait {wait:.0%}"
        )
        if self._bar.disable:
            steps = self._count_steps(state.epoch)
            print(f"{self._name_epoch(state.epoch)}, step {steps - left}/{steps}: {line}", flush=True)
        else:
            self._bar.set_postfix_str(line)

    def evaluation(self, state: TrainingState, score: Score, is_best: bool) -> None:
        """Show and write the evaluation that ended an epoch, which `state` counts already."""
        if not self._is_main:
            return
        self._bar.close()
        self._value = float(score.values[self._metric])
        self._best_epoch = state.epoch if is_best else self._best_epoch
        files = {"files": list(score.files)} if is_best and score.files else {}
        self._write("eval", state, {"metric": self._metric, **score.values, **files})
        if files:
            self.synchronise()  # a file belongs to the last evaluation that names it, so that line comes first
        for name, encode in score.files.items() if is_best else ():
            make_way(self._folder / name)
            with write_atomically(self._folder / name) as file:
                file.write(encode())
        for name, draw in score.pictures.items() if self._trackers else ():
            self._show(f"eval/{name}", state.step, draw())
        print(f"{self._name_epoch(state.epoch - 1)}: {self._describe_loss()}{score.text}", flush=True)

    def epoch(self, state: TrainingState) -> None:
        """Show the end of an epoch without an evaluation; `state` counts the epoch already."""
        if self._is_main:
            self._bar.close()
            print(f"{self._name_epoch(state.epoch - 1)}: {self._describe_loss()}not evaluated", flush=True)

    def skipped(self, verdict: Verdict) -> None:
        """Show and write that a step was not applied."""
        if self._is_main:
            self._write("skipped", verdict, {"lr": verdict.lr, "ranks": verdict.unsound})
            place = f"on ranks {verdict.unsound}" if verdict.unsound else "in the sum over the ranks"
            print(f"step {verdict.step} was not applied: loss or gradient not finite {place}", flush=True)

    def result(self, state: TrainingState) -> None:
        """Show the result of the finished run, and draw it."""
        if self._is_main:
            seconds = time.monotonic() - self._started
            print(describe_result(self._task, state, self._best_epoch, seconds, self._first_step), flush=True)
            paths = write_pictures(self._task.config, self._device) if self._task.config.log.pictures else []
            if paths:
                print(format_lines({"pictures": ", ".join(map(str, paths))}), flush=True)

    def synchronise(self) -> None:
        """Write metrics.jsonl to the disk, and what TensorBoard waits to write: the next checkpoint relies on it."""
        if self._is_main:
            with naming_storage_errors(self._folder / "metrics.jsonl"):
                synchronise_file(self._metrics.fileno(), self._folder / "metrics.jsonl")
            for tracker in self._trackers:
                tracker.flush()

    def _write(self, event: str, when: TrainingState | Verdict, values: dict[str, Any]) -> None:
        assert not values.keys() & {"event", "epoch", "step", "time"}, f"names of the event's own: {sorted(values)}"
        # The state counts an epoch only after its evaluation.
        epoch = when.epoch if event == "eval" else when.epoch + 1
        line = {"event": event, "epoch": epoch, "step": when.step, **values, "time": time.time()}
        with naming_storage_errors(self._folder):
            self._metrics.write(json.dumps(line) + "\n")
        for tracker in self._trackers:
            show_event(tracker, line)

    def _show(self, name: str, step: int, pixels: np.ndarray) -> None:
        for tracker in self._trackers:
            tracker.image(name, step, pixels)

    def _describe_figures(self) -> str:
        """Return the loss, and the metric of the last evaluation."""
        value = "" if self._value is None else f", {title_metric(self._metric)} {self._value:.2f} %"
        return f"loss {self._loss:.3f}{value}"

    def _describe_loss(self) -> str:
        return "" if self._loss is None else f"loss {self._loss:.3f}, "

    def _name_epoch(self, epoch: int) -> str:
        return f"epoch {epoch + 1}/{self._plan.epochs}"

    def _count_steps(self, epoch: int) -> int:
        return self._plan.end_of_epoch(epoch) - epoch * self._plan.steps_per_epoch

    def _time(self, steps: int) -> str:
        return tqdm.format_interval(steps * self._seconds_per_step)


def _close(
    tracker: Tracker, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
) -> None:
    """Close a tracker with the error that ended the run, or None."""
    tracker.close(error)


def _remove_files(folder: Path, names: list[str]) -> None:
    """Remove files about networks that no checkpoint has; a run that resumes writes them again."""
    for name in names:
        if isinstance(name, str) and Path(name).name == name:  # metrics.jsonl may be damaged
            (folder / name).unlink(missing_ok=True)
