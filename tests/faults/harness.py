"""Runs the real trainer, alone, as several ranks or under torchrun, and compares what is left."""

import importlib
import io
import json
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from faults import composing, inject
from resnest_imagenet.checkpoint import load_checkpoint, save_checkpoint
from resnest_imagenet.data.demo import write_demo_images
from resnest_imagenet.models.zoo import build_model

Faults = Sequence[tuple[str, list[Any]]]
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
# The demo's experiment, shrunk: 12 steps of 16 images in two epochs.
SMALL = ("+experiment=demo", "device=cpu", "train.epochs=2", "train.crop=32", "train.batch_size=8")
SMALL += ("train.global_batch=16", "loader.workers=1", "log.every_steps=1", "timeout_seconds=60")
SMALL += ("log.pictures=false",)
# All that draws, averages or remembers: at 48 pixels DropBlock finds a block.
RICH = ("train.crop=48", "train.mixup_alpha=0.2", "train.cutmix_alpha=1.0", "train.dropblock=0.2", "train.dropout=0.2")
RICH += ("train.ema_decay=0.9", "train.policy=resnest", "train.jitter=0.4", "train.erasing=0.5", "log.every_steps=5")
RICH += ("train.ema_warmup=true", "train.patience=9", "train.flips=both", "train.drop_path=0.2", "train.clip_norm=1.0")
RICH += ("train.class_weights=balanced", "train.mean=[0.5,0.4,0.3]", "train.std=[0.3,0.2,0.25]")
TINY = ("train.task=tiny",)  # as many samples and steps, of numbers: see tests/tiny_task.py
PACE = 0.02  # seconds of a step that something is to come between
LOADERS = ("dali", "torchvision")
CLOCK = ("time", "images_per_s", "data_wait")


class ClaimError(AssertionError):
    """A claim that does not hold."""


def require(holds: object, claim: str) -> None:
    """Raise ClaimError unless the claim holds."""
    if not holds:
        raise ClaimError(claim)


class Claims:
    """Claims that are all looked at, whatever becomes of the first."""

    def __init__(self) -> None:
        self.number = 0
        self._broken: list[str] = []

    def add(self, holds: object, claim: str) -> None:
        """Note whether a claim holds."""
        self.number += 1
        if not holds:
            self._broken.append(claim)

    def require(self) -> None:
        """Fail with all that did not hold."""
        require(not self._broken, f"{len(self._broken)} of {self.number}:\n" + "\n".join(self._broken))


@dataclass
class Place:
    """Where an entry of the catalogue works.

    Attributes:
        folder: for its files.
        fast: whether to do a small part only.
        is_tiny: whether its trainers train the tiny task, which has no images.
        children: what it started and has not seen end.
    """

    folder: Path
    fast: bool
    is_tiny: bool = False
    children: list[Any] = field(default_factory=list)
    _runs: int = 0

    @property
    def data(self) -> Path:
        """A demo data set of 103 training and 40 val images, which all entries share."""
        data = self.folder.parent / "data"
        if not data.exists():
            write_demo_images(data, seed=0, train_per_class=11, val_per_class=4)
            for path in sorted((data / "train").glob("disk/*"))[:7]:
                path.unlink()
        return data

    def end_children(self) -> None:
        """Kill -9 what a failed entry has left."""
        for child in self.children:
            child.kill()

    def new_run(self) -> Path:
        """Return a run folder that is not there yet."""
        self._runs += 1
        return self.folder / f"run-{self._runs}"

    def log_of(self, run: Path) -> Path:
        """Return where the output of a run goes: not to its own disk, which may be full."""
        return self.folder / f"{run.relative_to(self.folder).as_posix().replace('/', '-')}.log"

    @property
    def pace(self) -> Faults:
        """Return what slows the steps down where they take no time, so that something can come between them."""
        return [("is_slow", [PACE])] if self.is_tiny else []

    @property
    def of_stages(self) -> tuple[str, ...]:
        """Return what only a network with stages can do: keep the first as they are, and train each at its own rate."""
        if self.is_tiny:
            return ()
        start = self.folder / "start.safetensors"
        if not start.exists():
            save_checkpoint(build_model("resnest14_half", 7, zero_gamma=False).state_dict(), start)
        return (f"train.init_from={start}", "train.freeze=2", "train.layer_decay=0.7")

    def options(self, run: Path, *more: str) -> list[str]:
        """Return the arguments of resnest-train."""
        task = TINY if self.is_tiny else ()
        return [*SMALL, *task, f"data.root={self.data}", f"run_dir={run}", *more]


def find_tests() -> dict[str, str]:
    """Return this process's environment, with the folder of the tests where Python looks for modules."""
    tests, path = str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "").split(os.pathsep)
    path = [tests, *(folder for folder in path if folder not in ("", tests))]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path)}


def get_server() -> Any:
    """Return what forks trainers from a process that has imported torch, with the threads of ranks under torchrun."""
    # Trainers that are killed leave semaphores, of which Python's tracker would speak at the end.
    os.environ.update(ONE_THREAD, PYTHONWARNINGS="ignore:resource_tracker")
    os.environ.update(find_tests())
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["faults.preload"])
    return context


def _child(
    command: str, arguments: list[str], environment: dict[str, str], faults: Faults, log: Path, is_fast: bool
) -> None:
    """Be one of the project's commands: what a new process of it does, without the seconds of importing torch."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which is ignored where this was started by nohup
    os.environ.update({**ONE_THREAD, **environment})
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # of what it starts itself, as in a process from a shell
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = [f"resnest-{command}", *arguments]
    inject.install(faults)
    if is_fast and command == "train" and tuple(arguments[: len(SMALL)]) == SMALL:
        num_common = len(SMALL) + (TINY[0] in arguments)
        composing.compose_early(tuple(arguments[:num_common]), arguments)
    importlib.import_module(f"resnest_imagenet.commands.{command}").main()


class Command:
    """One of the project's commands: a process, or one for each rank as torchrun would start them.

    Attributes:
        processes: by rank.
        log: what they print, after what earlier ones with this log have printed.
    """

    def __init__(
        self,
        place: Place,
        command: str,
        *arguments: str,
        ranks: int = 1,
        faults: Faults = (),
        log: Path | None = None,
    ) -> None:
        self.log = log or place.log_of(place.new_run())
        self._start = len(self.log.read_text(errors="replace")) if self.log.exists() else 0
        environments: list[dict[str, str]] = [{}]
        if ranks > 1:
            common = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
            environments = [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
        self.processes: list[Any] = []
        for environment in environments:
            # Not daemons: a trainer has workers of its own.
            arguments_of_child = (command, list(arguments), environment, faults, self.log, place.fast)
            process = get_server().Process(target=_child, args=arguments_of_child)
            process.start()
            place.children.append(process)
            self.processes.append(process)

    def wait(self, seconds: float = 120) -> list[int]:
        """Return the exit codes."""
        deadline = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0, deadline - time.monotonic()))
            require(process.exitcode is not None, f"still running after {seconds} s:\n{self.output}")
        return [process.exitcode for process in self.processes]

    def wait_for(self, text: str, seconds: float = 60) -> None:
        """Wait until something was printed that matches."""
        _wait_for(lambda: re.search(text, self.output), f"{text!r} in the output", seconds, lambda: self.output)

    def kill(self) -> None:
        """Kill -9 all of it."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")[self._start :] if self.log.exists() else ""

    @property
    def lines(self) -> list[str]:
        return self.output.splitlines()


class Trainer(Command):
    """resnest-train on the demo images, or on the tiny task."""

    def __init__(self, place: Place, run: Path, *options: str, ranks: int = 1, faults: Faults = ()) -> None:
        arguments = place.options(run, *options)
        super().__init__(place, "train", *arguments, ranks=ranks, faults=faults, log=place.log_of(run))


def call(place: Place, *calls: str) -> list[tuple[int, list[str]]]:
    """Call commands, each with its options in one text, a few at a time; return exit codes and printed lines."""
    answers = []
    for first in range(0, len(calls), 4):
        running = [Command(place, *each.split()) for each in calls[first : first + 4]]
        answers += [(command.wait()[0], command.lines) for command in running]
    return answers


class Torchrun:
    """A run under the real torchrun.

    Attributes:
        process: torchrun's.
        log: what it and its ranks print.
    """

    def __init__(
        self,
        place: Place,
        run: Path,
        *options: str,
        ranks: int = 2,
        restarts: int = 0,
        faults: Faults = (),
        faults_of_restart: Faults = (),
    ) -> None:
        attempts = json.dumps([faults, faults_of_restart])
        self.log = place.log_of(run)
        self.mark = f"{os.getpid()}-{run}"
        launcher = ["-m", "torch.distributed.run"]
        if place.fast:
            launcher = ["-m", "faults.launcher", "--run-path", "--start-method=fork"]
        launcher += ["--nproc-per-node", str(ranks), "--max-restarts", str(restarts)]
        launcher += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{_free_port()}"]
        environment = {**find_tests(), **ONE_THREAD, "FAULTS": attempts, "FAULT_TEST": self.mark}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, *launcher, inject.__file__, *place.options(run, *options)],
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        place.children.append(self.process)

    def wait(self, seconds: float = 180) -> int:
        """Return torchrun's exit code."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise ClaimError(f"torchrun still runs after {seconds} s:\n{self.output}") from None

    def wait_for(self, text: str, seconds: float = 90) -> None:
        """Wait until something that matches was printed."""
        _wait_for(lambda: re.search(text, self.output), f"{text!r} in the output", seconds, lambda: self.output)

    def find_processes(self) -> list[int]:
        """Return all processes that torchrun has left or has running: ranks, and their workers."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                is_ours = f"FAULT_TEST={self.mark}".encode() in (folder / "environ").read_bytes().split(b"\0")
                is_zombie = (folder / "stat").read_text().rpartition(") ")[2][0] == "Z"
            except (OSError, IndexError):
                continue
            if is_ours and not is_zombie:
                found.append(int(folder.name))
        return found

    def count_seconds_until_gone(self, limit: float) -> float:
        """Wait until nothing is left of it."""
        started = time.monotonic()
        _wait_for(lambda: not self.find_processes(), "everything gone", limit, lambda: self.output)
        return time.monotonic() - started

    def kill(self) -> None:
        """Kill -9 all of it."""
        for pid in self.find_processes():
            os.kill(pid, signal.SIGKILL)
        self.process.wait()

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")


def _wait_for(holds: Callable[[], object], claim: str, seconds: float, explain: Callable[[], str]) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        require(time.monotonic() < deadline, f"no {claim} within {seconds} s:\n{explain()}")
        time.sleep(0.02)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def encode(kind: str, size: tuple[int, int] = (40, 30), mode: str = "RGB", **options: Any) -> bytes:
    """Return an image of noise."""
    noise = np.random.default_rng(0).integers(0, 256, size=(size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).convert(mode).save(file, kind, **options)
    return file.getvalue()


def newest(run: Path) -> Path:
    """Return the newest checkpoint."""
    return max((run / "checkpoints").glob("step-*.pt"))


def read_status(run: Path) -> dict[str, Any]:
    return json.loads((run / "status.json").read_text())


def read_end(run: Path) -> dict[str, Any]:
    """Return how the last start ended, also where it did not get as far as the run in its folder."""
    failed = run / "failed_start.json"
    return json.loads(failed.read_text()) if failed.exists() else read_status(run)


def require_equal_runs(run: Path, other: Path) -> None:
    """Compare two finished runs bit for bit: weights, averages, optimiser, counters, metrics and the best."""
    for one, two in ((newest(run), newest(other)), (run / "checkpoints/best.pt", other / "checkpoints/best.pt")):
        first, second = load_checkpoint(one), load_checkpoint(two)
        for content in (first, second):
            content["config"].pop("run_dir")
        difference = find_difference(first, second)
        require(difference is None, f"{one} and {two} differ in {difference}")
    require(read_metrics(run) == read_metrics(other), f"the metrics of {run} and {other} differ")
    left = [path.name for path in (*run.rglob("*.tmp"), *run.rglob("*.damaged"))]
    require(not left, f"{run} keeps {left}")


def find_difference(one: Any, other: Any, name: str = "it") -> str | None:
    """Return where two nested containers differ, or None."""
    if isinstance(one, torch.Tensor):
        return None if torch.equal(one, other) else name
    if isinstance(one, dict):
        keys = one.keys() ^ other.keys()
        pairs = [(key, one[key], other[key]) for key in one if key in other]
    elif isinstance(one, list):
        keys = {"length"} if len(one) != len(other) else set()
        pairs = [(index, a, b) for index, (a, b) in enumerate(zip(one, other, strict=False))]
    else:
        return None if one == other else name
    if keys:
        return f"{name}: {keys}"
    found = (find_difference(a, b, f"{name}.{key}") for key, a, b in pairs)
    return next((difference for difference in found if difference), None)


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Return the events but for the clock."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in CLOCK} for line in lines]
