"""The folder of a run: what was asked, where it ran, how it stands, and its checkpoints."""

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from resnest_imagenet.checkpoint import save_checkpoint
from resnest_imagenet.distributed import Ranks
from resnest_imagenet.errors import ConfigError
from resnest_imagenet.files import replacing

_PACKAGES = ("resnest-imagenet", "torch", "torchvision", "timm", "hydra-core", "numpy", "nvidia-dali-cuda130")


class RunFolder:
    """Files of one run; only rank 0 writes, for the others every method does nothing.

    config.yaml        the resolved configuration
    environment.json   versions, devices, git commit, command
    status.json        {"state": "running" | "finished" | "stopped" | "failed", ...}
    metrics.jsonl      one JSON object per logged event (written by `RunLog`)
    tensorboard/       the same as event files
    checkpoints/       last.pt and best.pt
    """

    def __init__(self, path: str, ranks: Ranks) -> None:
        self.path = Path(path)
        self.ranks = ranks
        self.last = self.path / "checkpoints" / "last.pt"
        self.best = self.path / "checkpoints" / "best.pt"

    def open(self, config: dict[str, Any]) -> None:
        """Make the folder and describe the run in it.

        Raises:
            ConfigError: where it cannot be written.
        """
        if not self.ranks.is_main:
            return
        try:
            self.last.parent.mkdir(parents=True, exist_ok=True)
            (self.path / "config.yaml").write_text(_to_yaml(config))
            self._write_json("environment.json", describe_environment(self.ranks))
        except OSError as error:
            raise ConfigError(f"run_dir={self.path}: cannot be written ({error.strerror})") from error

    @contextmanager
    def recording_status(self) -> Iterator[None]:
        """Keep status.json true while the run goes on, and say how it ended."""
        self.write_status("running")
        try:
            yield
        except KeyboardInterrupt:
            self.write_status("stopped")
            raise
        except BaseException as error:
            with suppress(OSError):  # a full disk, say: what failed first is what is reported
                self.write_status("failed", error=f"{type(error).__name__}: {error}")
            raise

    def write_status(self, state: str, **details: Any) -> None:
        """Replace status.json."""
        if self.ranks.is_main:
            self._write_json("status.json", {"state": state, **details, "pid": os.getpid(), "time": time.time()})

    def save(self, content: dict[str, Any], is_best: bool) -> None:
        """Write last.pt, and best.pt where this is the best so far."""
        if self.ranks.is_main:
            if is_best:
                save_checkpoint(content, self.best)
            save_checkpoint(content, self.last)

    def _write_json(self, name: str, content: dict[str, Any]) -> None:
        with replacing(self.path / name) as file:
            file.write(json.dumps(content, indent=2).encode() + b"\n")


def describe_environment(ranks: Ranks) -> dict[str, Any]:
    """Return what a reader needs to repeat a run: command, code, versions and devices."""
    on_gpu = ranks.device.type == "cuda"
    return {
        "command": sys.argv,
        "git_commit": _git_commit(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "cuda": torch.version.cuda if on_gpu else None,
        "device": torch.cuda.get_device_name(ranks.device) if on_gpu else platform.processor() or platform.machine(),
        "cpus": os.cpu_count(),
        "ranks": ranks.world_size,
        "host": platform.node(),
    }


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
