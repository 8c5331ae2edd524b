"""The folder of a run: its configuration, environment, status and checkpoints."""

import itertools
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from resnest_imagenet.checkpoint import load_checkpoint, save_checkpoint
from resnest_imagenet.compute import name_device
from resnest_imagenet.distributed import Ranks
from resnest_imagenet.errors import (
    CheckpointError,
    ConfigError,
    DamagedCheckpointError,
    Stopped,
    StorageError,
    UserError,
    explain_runtime,
)
from resnest_imagenet.evaluation.events import parse_events
from resnest_imagenet.evaluation.operators import Choice
from resnest_imagenet.files import (
    DAMAGED,
    make_way,
    move_damaged,
    naming_storage_errors,
    record_lock,
    remove_temporary,
    synchronise,
    write_atomically,
)

_FILES = (
    *("config.yaml", "environment.json", "status.json", "failed_start.json"),
    *("metrics.jsonl", "trackers.json"),
)
_MOVING = ".moving"  # the suffix of earlier-<number> until all of that run is in it
# Entries that stay when a run is set aside: those of this start's processes, and runs that were set aside before.
_STAYS = re.compile(rf"lock|rank-.*\.trace|earlier-\d+({re.escape(_MOVING)})?")
_PACKAGES = ("resnest-imagenet", "torch", "torchvision", "timm", "hydra-core", "numpy", "nvidia-dali-cuda130")


class RunFolder:
    """The files of one run. Only rank 0 writes; on other ranks, methods that write do nothing.

    config.yaml        the resolved configuration
    environment.json   versions, devices, git commit, command, operators that were tried on the device
    status.json        {"state": "running" | "finished" | "stopped" | "failed", "saved_step": ..., "exit_code": ...}
    failed_start.json  how the last start ended, if it ended before it was clear that it belongs to this folder's run
    metrics.jsonl      one JSON object per logged event (written by `RunLog`)
    predictions.csv    the best network's prediction for each image of the evaluation (a task's `Score.files`)
    results.png        the curves of a finished run (`log.pictures`)
    val.png            validation images with its best network's predictions
    tensorboard/       the same as event files, with pictures
    wandb/             the same for W&B, if log.trackers has it
    trackers.json      the run's names in W&B and MLflow
    checkpoints/       step-<number>.pt, the last few, and best.pt
    lock               held by the process that writes
    rank-*.trace       each rank's place: left by ranks that a signal has killed (`Trace`)
    suspects.txt       the images of such a rank
    *.damaged          damaged files
    earlier-<number>/  a run that was set aside: everything except the lock, traces and earlier runs
    """

    def __init__(self, path: str, keep: int, is_main: bool) -> None:
        """Name the folder.

        Args:
            path: of the folder, which `opened` makes.
            keep: number of checkpoints to keep, without best.pt.
            is_main: whether this process writes.
        """
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"
        self._keep = keep
        self._is_main = is_main
        self._owns_status = False
        self._saved_step: int | None = None
        self._damaged: list[Path] = []  # damaged checkpoints that `read_newest` has found

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Make the folder, lock it, and record how a start or run ends, see `write_end`.

        The files of an earlier run do not change until `begin`.

        Raises:
            ConfigError: it cannot be written, or another process holds it.
        """
        if not self._is_main:
            yield
            return
        with ExitStack() as stack:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                stack.enter_context(record_lock(self.path / "lock", f"process {os.getpid()} on {platform.node()}"))
                self._finish_moving()
            except OSError as error:
                raise ConfigError(f"run_dir={self.path}: cannot be written ({error.strerror})") from error
            if not self._holds_run():
                self._own_status()
            try:
                yield
            except BaseException as error:
                with suppress(StorageError):  # the first error is the one to report
                    self.write_end(error)
                raise

    def begin(
        self, config: dict[str, Any], ranks: Ranks, saved_step: int | None, choices: Mapping[str, Choice] | None = None
    ) -> None:
        """Write the run's description, when it is clear that the folder holds no other run: all files are now its own.

        Args:
            config: the resolved configuration.
            ranks: the ranks of the run.
            saved_step: of the checkpoint from which it resumes; None: from scratch.
            choices: of operators that were tried on this device, by their names in environment.json.
        """
        if not self._is_main:
            return
        with naming_storage_errors(self.path):
            self.checkpoints.mkdir(exist_ok=True)
            remove_temporary(self.checkpoints, ("best.pt", "step-*.pt"))
            remove_temporary(self.path, ("*",))
            for path in self._damaged:
                move_damaged(path)
        for name in _FILES:
            make_way(self.path / name)
        self._saved_step = saved_step
        self._own_status()
        with write_atomically(self.path / "config.yaml") as file:
            file.write(_to_yaml(config).encode())
        tried = {name: choice.describe() for name, choice in (choices or {}).items()}
        self._write_json("environment.json", describe_environment(ranks) | tried)

    def write_end(self, error: BaseException) -> None:
        """Write how the run ended: to status.json, or to failed_start.json if it has not begun."""
        error = explain_runtime(error) or error
        text = str(error) if isinstance(error, UserError | Stopped) else f"{type(error).__name__}: {error}"
        code = getattr(error, "exit_code", 130 if isinstance(error, KeyboardInterrupt) else 1)
        state = "stopped" if isinstance(error, Stopped | KeyboardInterrupt) else "failed"
        if self._owns_status:
            self.write_status(state, exit_code=code, error=text)
        elif self._is_main:
            self._write_json("failed_start.json", {"exit_code": code, "error": text, **_describe_process()})

    def write_status(self, state: str, **details: Any) -> None:
        """Replace status.json."""
        if self._is_main:
            status = {"state": state, "saved_step": self._saved_step}
            self._write_json("status.json", {**status, **details, **_describe_process()})

    def read_status(self) -> dict[str, Any]:
        """Return status.json; {} if there is none, or it is damaged."""
        try:
            status = json.loads((self.path / "status.json").read_bytes())
        except (OSError, ValueError):
            return {}
        return status if isinstance(status, dict) else {}

    def _own_status(self) -> None:
        self._owns_status = True
        with naming_storage_errors(self.path):
            (self.path / "failed_start.json").unlink(missing_ok=True)
        self.write_status("running")

    def _holds_run(self) -> bool:
        """Return whether a run has begun here; status.json is then about that run."""
        names = ("config.yaml", "metrics.jsonl", "checkpoints/best.pt")
        return any((self.path / name).exists() for name in names) or bool(self.list_checkpoints())

    def find_remains(self) -> str | None:
        """Return in words what shows that the run in this folder had a checkpoint; None if nothing does.

        A run that died before its first checkpoint leaves events, and may leave best.pt, which is written first. So
        status.json decides whether there was a checkpoint; without it, best.pt and the events do.
        """
        remains = ["checkpoints/best.pt"] if (self.checkpoints / "best.pt").exists() else []
        with naming_storage_errors(self.path / "metrics.jsonl"):
            events, damaged = parse_events(self.path / "metrics.jsonl")
        if not (remains or events or damaged):
            return None
        status = self.read_status()
        if "saved_step" in status:
            step = status["saved_step"]
            return None if step is None else f"status.json names a checkpoint after step {step}"
        if any(event["event"] == "eval" for event in events) or (not status and (events or damaged)):
            remains.append("metrics.jsonl")
        return f"it has {' and '.join(remains)}" if remains else None

    def list_checkpoints(self) -> list[Path]:
        """Return the checkpoints, the newest first, without best.pt."""
        return sorted(self.checkpoints.glob("step-*.pt"), reverse=True)

    def save(self, content: dict[str, Any], is_best: bool) -> None:
        """Write a checkpoint, also as best.pt if it is the best so far, and remove the oldest.

        Raises:
            StorageError: it cannot be written; the previous one is still there.
        """
        if not self._is_main:
            return
        if is_best:
            save_checkpoint(content, self.checkpoints / "best.pt")
        newest = self.checkpoints / f"step-{content['step']:09d}.pt"
        save_checkpoint(content, newest)
        with naming_storage_errors(self.checkpoints):
            for old in self.list_checkpoints()[self._keep :]:
                old.unlink()
        self._saved_step = content["step"]
        self.write_status("running")

    def read_newest(self) -> tuple[str | None, dict[str, Any]]:
        """Return the name and content of the newest checkpoint that is not damaged; None and {} if there is none.

        Damaged ones are named on stderr, and renamed when the run begins, because the run writes them again.

        Raises:
            CheckpointError: all are damaged, or one cannot be read.
        """
        checkpoints = self.list_checkpoints()
        for path in checkpoints:
            try:
                return path.name, load_checkpoint(path)
            except DamagedCheckpointError as error:
                print(f"WARNING: {error}; going back to the checkpoint before it", file=sys.stderr, flush=True)
                self._damaged.append(path)
        if checkpoints or list(self.checkpoints.glob(f"*{DAMAGED}")):
            raise CheckpointError(
                f"{self.checkpoints}: all checkpoints are damaged: start from scratch in another run_dir"
            )
        return None, {}

    def set_aside(self) -> Path:
        """Move all files of an earlier run into a new folder within this one; return that folder.

        If the process is killed meanwhile, the next one moves the rest, see `opened`.
        """
        folders = (self.path / f"earlier-{number}" for number in itertools.count(1))
        aside = next(folder for folder in folders if not folder.exists())
        with naming_storage_errors(aside):
            aside.with_name(aside.name + _MOVING).mkdir()
            self._finish_moving()
        self._damaged.clear()  # they were moved too
        self._own_status()
        return aside

    def is_moving(self) -> bool:
        """Return whether a process was killed here while it set a run aside."""
        return any(self.path.glob(f"earlier-*{_MOVING}"))

    def _finish_moving(self) -> None:
        """Move the remaining files of a run that is being set aside; a new run writes nothing before this is done."""
        for moving in self.path.glob(f"earlier-*{_MOVING}"):
            synchronise(self.path)
            for entry in sorted(self.path.iterdir()):
                if not _STAYS.fullmatch(entry.name):
                    entry.rename(moving / entry.name)
            synchronise(moving)
            moving.rename(moving.with_suffix(""))
            synchronise(self.path)

    def _write_json(self, name: str, content: dict[str, Any]) -> None:
        with write_atomically(self.path / name) as file:
            file.write(json.dumps(content, indent=2).encode() + b"\n")


def _describe_process() -> dict[str, Any]:
    return {"pid": os.getpid(), "host": platform.node(), "time": time.time()}


def describe_environment(ranks: Ranks) -> dict[str, Any]:
    """Return what a reader needs to repeat a run: command, code, versions and devices."""
    return {
        "command": sys.argv,
        "git_commit": _git_commit(),
        "python": platform.python_version(),
        "packages": list_versions(),
        "cuda": torch.version.cuda if ranks.device.type == "cuda" else None,
        "device": name_device(ranks.device),
        "cpus": os.cpu_count(),
        "ranks": ranks.world_size,
        "host": platform.node(),
    }


def list_versions() -> dict[str, str | None]:
    """Return the versions of the packages that a run computes with; None if one is not installed."""
    return {name: _version(name) for name in _PACKAGES}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """Return the commit of this source tree, with "-dirty" if it was changed; None for an installed wheel."""
    repository = Path(__file__).parents[3]
    if not (repository / ".git").exists():
        return None
    command = ["git", "-C", str(repository), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _to_yaml(config: dict[str, Any]) -> str:
    import yaml

    return yaml.safe_dump(config, sort_keys=False)
