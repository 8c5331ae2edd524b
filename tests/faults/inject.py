"""Faults that are put into a trainer of this project, on purpose: in the process that runs it, before it starts.

As a program (under torchrun): resnest-train with the faults of the environment variable FAULTS, a JSON list that has
for each attempt, the first and those after a restart, a list of [name, arguments]; attempts after these have none.
"""

import importlib
import json
import os
import pty
import signal
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import tiny_task
from faulty_task import Fault, put_into_runs

FAULTS: dict[str, Callable[..., None]] = {}


def fault(install: Callable[..., None]) -> Callable[..., None]:
    """Give a function its place in the table."""
    FAULTS[install.__name__] = install
    return install


def die() -> None:
    """End this process as kill -9 does."""
    os.kill(os.getpid(), signal.SIGKILL)


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


# Batches are numbered over all ranks, so a batch is one rank's: with two ranks an odd one is the second's.


@fault
def killed(epoch: int, batch: int) -> None:
    """A rank is killed."""
    put_into_runs(Fault(epoch, batch, act=die))


@fault
def hangs(epoch: int, batch: int) -> None:
    """A rank waits for ever."""
    put_into_runs(Fault(epoch, batch, act=partial(time.sleep, 3600)))


@fault
def is_slow(seconds: float) -> None:
    """Every batch takes so long, or a little longer."""
    put_into_runs(Fault(act=partial(time.sleep, seconds)))


@fault
def raises(epoch: int, batch: int) -> None:
    """A rank meets a bug."""

    def act() -> None:
        raise ValueError(f"a bug of rank {rank()}")

    put_into_runs(Fault(epoch, batch, act=act))


@fault
def gets_signal(name: str, epoch: int, batch: int) -> None:
    """A rank gets a signal."""
    put_into_runs(Fault(epoch, batch, act=partial(_signal_self, name)))


def _signal_self(name: str) -> None:
    os.kill(os.getpid(), signal.Signals[name])


@fault
def gets_signal_in(name: str, place: str, at_rank: int | None = None) -> None:
    """A rank gets a signal in the middle of its start, where a function begins.

    Args:
        name: of the signal.
        place: the function, by its whole name.
        at_rank: None: all ranks get it.
    """
    owner, function = _find(place)
    real = getattr(owner, function)

    def signalled(*args: Any, **options: Any) -> Any:
        if at_rank in (None, rank()):
            _signal_self(name)
        return real(*args, **options)

    setattr(owner, function, signalled)


def _find(place: str) -> tuple[Any, str]:
    """Return the module or class that has what a name stands for, and its name there."""
    parent, _, name = place.rpartition(".")
    try:
        return importlib.import_module(parent), name
    except ModuleNotFoundError:
        owner, class_name = _find(parent)
        return getattr(owner, class_name), name


@fault
def has_little_memory(megabytes: int) -> None:
    """While a checkpoint is read the process may grow by so much only."""
    import resource

    from resnest_imagenet.training import run_folder

    real = run_folder.load_checkpoint

    def load_checkpoint(path: Any) -> Any:
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        before = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (size + (megabytes + 1) * 2**20, before[1]))
        taken = []  # what the C library has kept of freed memory too
        with suppress(MemoryError):
            while True:
                taken.append(bytearray(2**20))
        del taken[-megabytes:]
        try:
            return real(path)
        finally:
            resource.setrlimit(resource.RLIMIT_AS, before)

    run_folder.load_checkpoint = load_checkpoint


@fault
def ignores_hangup() -> None:
    """Started by nohup."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


@fault
def loses_output(kind: str, epoch: int, batch: int) -> None:
    """What the run prints to goes away.

    Args:
        kind: "pipe" (its reader leaves), "terminal" (is closed) or "disk" (is full).
        epoch: when.
        batch: when.
    """
    ours = None
    if kind == "terminal":
        ours, theirs = pty.openpty()  # from the start: a bar is shown
        _print_to(theirs)

    def act() -> None:
        if ours is None:
            _print_to(_leave_pipe() if kind == "pipe" else os.open("/dev/full", os.O_WRONLY))
        else:
            os.close(ours)

    put_into_runs(Fault(epoch, batch, act=act))


@fault
def has_no_reader() -> None:
    """The reader of what it prints has left."""
    _print_to(_leave_pipe())


def _leave_pipe() -> int:
    ours, theirs = os.pipe()
    os.close(ours)
    return theirs


def _print_to(descriptor: int) -> None:
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)


@fault
def has_bad_loss(value: str, epoch: int, batch: int) -> None:
    """The loss of one batch is not finite."""
    put_into_runs(Fault(epoch, batch, loss_factor=float(value)))


@fault
def has_bad_gradient(value: str, epoch: int, batch: int) -> None:
    """The gradient of one batch is not finite, while its loss is."""
    put_into_runs(Fault(epoch, batch, gradient_factor=float(value)))


@fault
def killed_in_write(place: str, number: int, share: float) -> None:
    """Killed while a checkpoint is written.

    Args:
        place: "bytes" (after a share of the file), "before_rename", "after_rename" or "before_removal".
        number: of the file since the start: best.pt counts too.
        share: of the bytes.
    """
    from resnest_imagenet import checkpoint, files
    from resnest_imagenet.training import run_folder

    written = 0
    real_write, real_rename, real_list = (
        checkpoint.write_atomically,
        os.replace,
        run_folder.RunFolder.list_checkpoints,
    )

    class Dying:
        def __init__(self, file: Any, size: int) -> None:
            self._file, self._left = file, int(size * share)

        def write(self, data: Any) -> int:
            data = memoryview(data).cast("B")
            if len(data) >= self._left:
                self._file.write(data[: self._left])
                self._file.flush()
                die()
            self._left -= len(data)
            return self._file.write(data)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._file, name)

    @contextmanager
    def write_atomically(path: Any) -> Any:
        nonlocal written
        written += 1
        with real_write(path) as file:
            size = max((other.stat().st_size for other in path.parent.glob("*.pt")), default=10**6)
            yield Dying(file, size) if place == "bytes" and written == number else file

    def rename(source: Any, target: Any) -> None:
        is_it = str(target).endswith(".pt") and written == number
        if is_it and place == "before_rename":
            die()
        real_rename(source, target)
        if is_it and place == "after_rename":
            die()

    def list_checkpoints(self: Any) -> Any:
        if place == "before_removal" and written >= number:
            die()
        return real_list(self)

    checkpoint.write_atomically = write_atomically
    files.os.replace = rename
    run_folder.RunFolder.list_checkpoints = list_checkpoints


@fault
def killed_in_move(number: int) -> None:
    """Killed before one of the renames that set an earlier run aside."""
    from pathlib import Path

    real, renames = Path.rename, 0

    def rename(self: Path, target: Any) -> Any:
        nonlocal renames
        renames += ".moving" in f"{self} {target}"
        if renames == number:
            die()
        return real(self, target)

    Path.rename = rename


@fault
def has_failing_storage(error: str, times: int, visit: int) -> None:
    """Every fifth file fails to be read, so many times in a row, when it is wanted for the given time."""
    import errno

    from resnest_imagenet.data.folder import ImageFolder

    number, real = getattr(errno, error), ImageFolder.fetch
    visits: dict[int, int] = {}
    failed: dict[int, int] = {}

    def fetch(self: Any, index: int) -> bytes:
        is_it = index % 5 == 0 and "/train/" in self.name(index) and visits.get(index, 0) + 1 == visit
        if is_it and failed.get(index, 0) < times:
            failed[index] = failed.get(index, 0) + 1
            raise OSError(number, os.strerror(number))
        content = real(self, index)
        visits[index] = visits.get(index, 0) + 1
        return content

    ImageFolder.fetch = fetch


@fault
def loses_worker(epoch: int, batch: int) -> None:
    """A worker of the loader is killed."""
    from multiprocessing import active_children

    def act() -> None:
        for worker in active_children():
            worker.kill()

    put_into_runs(Fault(epoch, batch, act=act))


@fault
def has_full_disk(num_bytes: int) -> None:
    """No file may grow beyond so many bytes."""
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))


@fault
def says_where_it_stops() -> None:
    """Every rank prints its step when it stops."""
    from resnest_imagenet.errors import Stopped
    from resnest_imagenet.training import train as module

    real = module.train

    def train(config: Any) -> Any:
        try:
            return real(config)
        except Stopped as error:
            print(f"rank {rank()} {error}", file=sys.stderr, flush=True)
            raise

    module.train = train


@fault
def is_small_release() -> None:
    """resnest-data prepare takes two images in each part for all of ImageNet."""
    from resnest_imagenet.data import prepare

    small = prepare.Release({}, num_classes=2, num_images={"train": 2, "val": 2})
    prepare.prepare_images = partial(prepare.prepare_images, release=small)


def install(faults: list[tuple[str, list[Any]]]) -> None:
    """Put faults into this process, which can train the tiny task from now on."""
    tiny_task.register()
    for name, arguments in faults:
        FAULTS[name](*arguments)


if __name__ == "__main__":
    attempts = dict(enumerate(json.loads(os.environ["FAULTS"])))
    install(attempts.get(int(os.environ["TORCHELASTIC_RESTART_COUNT"]), []))
    from resnest_imagenet.commands.train import main

    main()
