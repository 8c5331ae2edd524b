"""The folder of a run: what was asked, where it ran, how it stands, and its checkpoints."""

import itertools
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
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
)
from resnest_imagenet.files import TEMPORARY, owned, replacing, storing

DAMAGED = ".damaged"  # the suffix of a checkpoint that is not what was written
_PACKAGES = ("resnest-imagenet", "torch", "torchvision", "timm", "hydra-core", "numpy", "nvidia-dali-cuda130")


class RunFolder:
    """Files of one run; only rank 0 writes, for the others every method that writes does nothing.

    config.yaml        the resolved configuration
    environment.json   versions, devices, git commit, command
    status.json        {"state": "running" | "finished" | "stopped" | "failed", "exit_code": ..., ...}
    metrics.jsonl      one JSON object per logged event (written by `RunLog`)
    predictions.csv    what the best network so far said of each image of the evaluation
    tensorboard/       the same as event files, with pictures
    wandb/             the same for W&B, where log.trackers has it
    trackers.json      by which names W&B and MLflow know the run
    checkpoints/       step-<number>.pt, the last few, and best.pt
    lock               held by the process that writes
    """

    def __init__(self, path: str, keep: int, is_main: bool) -> None:
        """Name the folder.

        Args:
            path: of the folder, made by `opened`.
            keep: how many checkpoints stay beside the best.
            is_main: whether this process writes.
        """
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"
        self._keep = keep
        self._is_main = is_main

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Make the folder, keep others out of it, and keep its status.json true to the end.

        Raises:
            ConfigError: it cannot be written, or another process holds it.
        """
        if not self._is_main:
            yield
            return
        with ExitStack() as stack:
            try:
                self.checkpoints.mkdir(parents=True, exist_ok=True)
                stack.enter_context(owned(self.path / "lock", f"process {os.getpid()} on {platform.node()}"))
                for left in (*self.path.glob(f"*{TEMPORARY}"), *self.checkpoints.glob(f"*{TEMPORARY}")):
                    left.unlink()
            except OSError as error:
                raise ConfigError(f"run_dir={self.path}: cannot be written ({error.strerror})") from error
            self.write_status("running")
            try:
                yield
            except BaseException as error:
                with suppress(StorageError):  # what failed first is what is reported
                    self.write_end(error)
                raise

    def write_end(self, error: BaseException) -> None:
        """Say in status.json how the run ended."""
        text = str(error) if isinstance(error, UserError | Stopped) else f"{type(error).__name__}: {error}"
        code = getattr(error, "exit_code", 130 if isinstance(error, KeyboardInterrupt) else 1)
        state = "stopped" if isinstance(error, Stopped | KeyboardInterrupt) else "failed"
        self.write_status(state, exit_code=code, error=text)

    def write_status(self, state: str, **details: Any) -> None:
        """Replace status.json."""
        if self._is_main:
            self._write_json(
                "status.json",
                {"state": state, **details, "pid": os.getpid(), "host": platform.node(), "time": time.time()},
            )

    def describe(self, config: dict[str, Any], ranks: Ranks) -> None:
        """Write what the run is, once it is clear that the folder holds no other."""
        if self._is_main:
            with replacing(self.path / "config.yaml") as file:
                file.write(_to_yaml(config).encode())
            self._write_json("environment.json", describe_environment(ranks))

    def list_checkpoints(self) -> list[Path]:
        """Return the checkpoints, the newest first; best.pt is none of them."""
        return sorted(self.checkpoints.glob("step-*.pt"), reverse=True)

    def save(self, content: dict[str, Any], is_best: bool) -> None:
        """Write a checkpoint, as best.pt too where this is the best so far, and remove the oldest.

        Raises:
            StorageError: it cannot be written; the one before is still there.
        """
        if not self._is_main:
            return
        if is_best:
            save_checkpoint(content, self.checkpoints / "best.pt")
        newest = self.checkpoints / f"step-{content['step']:09d}.pt"
        save_checkpoint(content, newest)
        with storing(self.checkpoints):
            for old in self.list_checkpoints()[self._keep :]:
                old.unlink()

    def read_newest(self) -> tuple[str | None, dict[str, Any]]:
        """Return the name and content of the newest checkpoint that is whole, or None where there is none.

        Damaged ones get another name, with a line on stderr: the run makes them again.

        Raises:
            CheckpointError: all are damaged, or one cannot be read.
        """
        found = self.list_checkpoints()
        for path in found:
            try:
                return path.name, load_checkpoint(path)
            except DamagedCheckpointError as error:
                print(f"WARNING: {error}; going back to the checkpoint before it", file=sys.stderr, flush=True)
                with storing(path):
                    path.rename(path.with_name(path.name + DAMAGED))
        if found or list(self.checkpoints.glob(f"*{DAMAGED}")):
            raise CheckpointError(f"{self.checkpoints}: all checkpoints are damaged: start anew in another run_dir")
        return None, {}

    def set_aside(self) -> Path:
        """Move all of an earlier run into a folder of its own, within this one, and return that."""
        numbers = itertools.count(1)
        aside = next(folder for n in numbers if not (folder := self.path / f"earlier-{n}").exists())
        with storing(aside):
            aside.mkdir()
            for name in (
                "checkpoints",
                "metrics.jsonl",
                "predictions.csv",
                "tensorboard",
                "wandb",
                "trackers.json",
                "config.yaml",
                "environment.json",
            ):
                if (self.path / name).exists():
                    (self.path / name).rename(aside / name)
            self.checkpoints.mkdir()
        return aside

    def _write_json(self, name: str, content: dict[str, Any]) -> None:
        with replacing(self.path / name) as file:
            file.write(json.dumps(content, indent=2).encode() + b"\n")


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
    """Return the versions of what a run computes with; None: not installed."""
    return {name: _version(name) for name in _PACKAGES}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """Commit of this source tree, with "-dirty" where it was changed; None for an installed wheel."""
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
