"""Where a run is shown beside its own files: TensorBoard, Weights & Biases, MLflow."""

import importlib.util
import json
import os
import sys
import threading
import uuid
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property, partial
from pathlib import Path
from queue import SimpleQueue
from typing import Protocol

import numpy as np
from PIL import Image

from resnest_imagenet.config import TrainConfig
from resnest_imagenet.errors import ConfigError, Stopped, first_line, name_extra
from resnest_imagenet.evaluation.events import Event
from resnest_imagenet.files import move_damaged, naming_storage_errors, write_atomically
from resnest_imagenet.options import flatten
from resnest_imagenet.training.event_files import cut_event_files, read_pictures

# For what is still to be sent: at the end of a run, and where it was stopped, as before a preemption, or failed.
SECONDS_TO_FINISH, SECONDS_TO_STOP = 60, 10
MAX_WAITING = 100  # events for a tracker that does not answer, above which pictures are skipped


class Tracker(Protocol):
    """Where a run is shown.

    Attributes:
        is_new: whether it has nothing of the run yet.
    """

    is_new: bool

    def scalars(self, step: int, values: dict[str, float], when: float) -> None:
        """Take values by name, of a step and a time in seconds since 1970."""

    def image(self, name: str, step: int, pixels: np.ndarray) -> None:
        """Take a picture, uint8 (H, W, 3)."""

    def flush(self) -> None:
        """Write to the disk what waits for it: a checkpoint follows."""

    def close(self, error: BaseException | None) -> None:
        """End; `error` is what ended the run, None where it is finished."""


def require_trackers(names: Sequence[str]) -> None:
    """Raise a ConfigError for a tracker that is not installed."""
    for name in names:
        spec = importlib.util.find_spec(name)
        # Any folder of this name, as W&B leaves one where it runs, counts as a package, but has no origin.
        if spec is None or spec.origin is None:
            raise ConfigError(f"log.trackers has {name}: it is not installed: add {name_extra(name)}")


def open_trackers(folder: Path, config: TrainConfig, metric: str, step: int, events: Iterable[Event]) -> list[Tracker]:
    """Open what `config.log.trackers` names; what fails to open is skipped, with a line.

    Args:
        folder: of the run, with its config.yaml.
        config: of the run.
        metric: that chooses its best network.
        step: it resumes from.
        events: before that, which can be read several times; a tracker that is new gets them.

    Raises:
        StorageError: TensorBoard's files cannot be written.
    """
    trackers: list[Tracker] = []
    for name in dict.fromkeys(config.log.trackers):
        if name == "tensorboard":
            trackers.append(TensorBoard(folder, config, metric, step, events))
            continue
        opens: Callable[[Path, TrainConfig], Tracker] = WandB if name == "wandb" else MLflow
        try:
            trackers.append(_InBackground(name, opens(folder, config)))
        except Exception as error:  # whatever a service or its library raises
            _warn(name, error)
    for tracker in trackers:
        if tracker.is_new:
            for event in events:
                show_event(tracker, event)
    return trackers


def show_event(tracker: Tracker, event: Event) -> None:
    """Pass the real numbers of an event to a tracker."""
    values = _list_values(event)
    tracker.scalars(event["step"], {f"{event['event']}/{name}": value for name, value in values.items()}, event["time"])


def _list_values(event: Event) -> dict[str, float]:
    return {name: value for name, value in event.items() if isinstance(value, float) and name != "time"}


class TensorBoard:
    """Event files with the values of metrics.jsonl, and pictures.

    A run that resumes cuts its files after the last checkpoint, and writes to a new one. Where they lack values, as
    after a crash of the machine, they are written from scratch.
    """

    def __init__(self, folder: Path, config: TrainConfig, metric: str, step: int, events: Iterable[Event]) -> None:
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        self._folder = folder / "tensorboard"
        with naming_storage_errors(self._folder):
            old = sorted(self._folder.glob("events.out.tfevents.*"))
            self.is_new = not cut_event_files(old, step, sum(len(_list_values(event)) for event in events))
            # Files of one second are read in any order: the mark that drops earlier events is only where it is needed.
            self._writer = SummaryWriter(str(self._folder), purge_step=0 if old and self.is_new else None)
            files = self._writer._get_file_writer()
            for picture in read_pictures(old, step) if self.is_new else ():  # nothing else has them
                files.add_event(picture, walltime=picture.wall_time)
            self._writer.add_text("config", f"```yaml\n{_read_config(folder)}```")
            # The third summary would mark the run as finished.
            for summary in hparams(_name_options(config), {f"eval/{metric}": 0.0})[:2]:
                files.add_summary(summary)
            self._writer.flush()
            for file in old if self.is_new else ():
                file.unlink()

    def scalars(self, step: int, values: dict[str, float], when: float) -> None:
        with naming_storage_errors(self._folder):
            for name, value in values.items():
                self._writer.add_scalar(name, value, step, when)

    def image(self, name: str, step: int, pixels: np.ndarray) -> None:
        with naming_storage_errors(self._folder):
            self._writer.add_image(name, pixels, step, dataformats="HWC")
            self._writer.flush()

    def flush(self) -> None:
        with naming_storage_errors(self._folder):
            self._writer.flush()

    def close(self, error: BaseException | None) -> None:
        with naming_storage_errors(self._folder):
            self._writer.close()


class WandB:
    """A W&B run, placed by W&B's own environment variables: WANDB_MODE, WANDB_PROJECT, WANDB_ENTITY and the others.

    W&B keeps what it sends in the run folder's wandb/, and sends it from a process of its own.
    """

    def __init__(self, folder: Path, config: TrainConfig) -> None:
        import wandb

        known = _read_ids(folder).get("wandb")
        self.is_new = known is None
        self._to_image = wandb.Image
        settings = wandb.Settings(
            console="off", save_code=False, disable_code=True, quiet=True, finish_timeout=SECONDS_TO_FINISH
        )
        if "WANDB_INIT_TIMEOUT" not in os.environ:
            # The other ranks wait meanwhile: after timeout_seconds they would take this rank for hanging.
            settings.init_timeout = min(90.0, config.timeout_seconds / 2)
        self._run = wandb.init(
            id=known or uuid.uuid4().hex[:8],
            name=str(folder),
            dir=str(folder),
            config=config.model_dump(),
            resume="allow",
            reinit="create_new",  # of a process that has a run of its own
            settings=settings,
        )
        # W&B's own count of steps cannot go back, as a run does that was killed.
        self._run.define_metric("*", step_metric="step")
        _keep_id(folder, "wandb", self._run.id)

    def scalars(self, step: int, values: dict[str, float], when: float) -> None:
        self._run.log({**values, "step": step})

    def image(self, name: str, step: int, pixels: np.ndarray) -> None:
        self._run.log({name: self._to_image(pixels), "step": step})

    def flush(self) -> None:
        """Do nothing: W&B writes by itself."""

    def close(self, error: BaseException | None) -> None:
        self._run.finish(exit_code=0 if error is None else getattr(error, "exit_code", 1))


class MLflow:
    """An MLflow run, placed by MLflow's own variables: MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME or _ID.

    MLflow's calls wait for the server, and retry for minutes while it does not answer.
    """

    def __init__(self, folder: Path, config: TrainConfig) -> None:
        import mlflow

        self._mlflow = mlflow
        self._folder = folder
        self._config = config
        self._client = mlflow.MlflowClient()
        self.is_new = "mlflow" not in _read_ids(folder)

    @cached_property
    def _run_id(self) -> str:
        """Resume the run, or make it: at the first event that reaches the server, in the background."""
        run_id = _read_ids(self._folder).get("mlflow")
        if run_id is None:
            experiment = os.environ.get("MLFLOW_EXPERIMENT_ID")
            if experiment is None:
                name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "Default")
                known = self._client.get_experiment_by_name(name)
                # Not set_experiment, which would set MLFLOW_EXPERIMENT_ID for the process.
                experiment = known.experiment_id if known else self._client.create_experiment(name)
            run_id = self._client.create_run(experiment, run_name=str(self._folder)).info.run_id
            _keep_id(self._folder, "mlflow", run_id)
        if self.is_new:  # parameters cannot be changed later; config.yaml can
            values = _name_options(self._config)
            params = [self._mlflow.entities.Param(name, str(value)) for name, value in values.items()]
            self._client.log_batch(run_id, params=params)
        self._client.update_run(run_id, status="RUNNING")
        self._client.log_text(run_id, _read_config(self._folder), "config.yaml")
        return run_id

    def scalars(self, step: int, values: dict[str, float], when: float) -> None:
        milliseconds = int(1000 * when)
        metrics = [self._mlflow.entities.Metric(*each, milliseconds, step) for each in values.items()]
        self._client.log_batch(self._run_id, metrics=metrics)

    def image(self, name: str, step: int, pixels: np.ndarray) -> None:
        self._client.log_image(self._run_id, pixels, key=name, step=step)

    def flush(self) -> None:
        """Do nothing: no call waits for a later one."""

    def close(self, error: BaseException | None) -> None:
        ended = "KILLED" if isinstance(error, Stopped | KeyboardInterrupt) else "FAILED"
        self._client.set_terminated(self._run_id, "FINISHED" if error is None else ended)


class _InBackground:
    """A tracker that may be slow or fail: no step waits for it; failed calls are skipped, the first is reported."""

    def __init__(self, name: str, tracker: Tracker) -> None:
        Image.init()  # a loader's process that is forked while the thread imports Pillow's formats cannot import them
        self.is_new = tracker.is_new
        self._name = name
        self._tracker = tracker
        self._has_failed = False
        self._calls: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def scalars(self, step: int, values: dict[str, float], when: float) -> None:
        self._calls.put(partial(self._tracker.scalars, step, values, when))

    def image(self, name: str, step: int, pixels: np.ndarray) -> None:
        if self._calls.qsize() < MAX_WAITING:  # pictures are large
            self._calls.put(partial(self._tracker.image, name, step, pixels))

    def flush(self) -> None:
        """Do nothing: the thread writes, and no checkpoint waits for it."""

    def close(self, error: BaseException | None) -> None:
        self._calls.put(partial(self._tracker.close, error))
        self._calls.put(None)
        patience = SECONDS_TO_FINISH if error is None else SECONDS_TO_STOP
        self._thread.join(patience)
        if self._thread.is_alive():
            self._fail(TimeoutError(f"not all was sent within {patience} s"))

    def _work(self) -> None:
        for call in iter(self._calls.get, None):
            try:
                call()
            except Exception as error:  # as above
                self._fail(error)

    def _fail(self, error: Exception) -> None:
        if not self._has_failed:
            _warn(self._name, error)
        self._has_failed = True


def _warn(name: str, error: Exception) -> None:
    line = f"{type(error).__name__}: {first_line(error)}"
    print(f"WARNING: {name} lacks what metrics.jsonl has: {line}", file=sys.stderr, flush=True)


def _read_config(folder: Path) -> str:
    return (folder / "config.yaml").read_text()


def _name_options(config: TrainConfig) -> dict[str, bool | int | float | str]:
    """Return the options by their names on the command line; what is no plain value becomes text."""
    options = flatten(config.model_dump())
    return {name: value if isinstance(value, bool | int | float) else str(value) for name, value in options.items()}


def _read_ids(folder: Path) -> dict[str, str]:
    """Return the trackers' own names for the run in this folder; a damaged file is set aside."""
    path = folder / "trackers.json"
    try:
        ids = json.loads(path.read_bytes()) if path.exists() else {}
    except ValueError:
        ids = None
    if not isinstance(ids, dict):
        print(f"WARNING: {path}: damaged: moved to {move_damaged(path).name}", file=sys.stderr, flush=True)
        return {}
    return ids


def _keep_id(folder: Path, tracker: str, run_id: str) -> None:
    ids = {**_read_ids(folder), tracker: run_id}
    with write_atomically(folder / "trackers.json") as file:
        file.write(json.dumps(ids).encode() + b"\n")
