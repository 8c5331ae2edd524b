"""Several ranks without torchrun: processes that are forked from one that has torch imported."""

import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

import tiny_task
from faulty_task import Fault, put_into_runs
from resnest_imagenet.config import TrainConfig
from resnest_imagenet.distributed import Ranks, choose_device, join
from resnest_imagenet.errors import Stopped, UserError
from resnest_imagenet.schemas import choose_schema
from resnest_imagenet.training.train import train


class Ended(NamedTuple):
    """How a rank has ended, and what it has printed to stdout and stderr."""

    code: int
    text: str


def ask_to_stop() -> None:
    """Send this process the signal of a scheduler."""
    os.kill(os.getpid(), signal.SIGTERM)


def train_on_ranks(
    config: TrainConfig,
    folder: Path,
    world_size: int,
    faults: Sequence[Fault] = (),
    folders: Sequence[Path] | None = None,
    **options: Any,
) -> list[Ended]:
    """Train TinyTask on several ranks.

    Args:
        config: of the run.
        folder: where the ranks write what they print.
        world_size: how many ranks.
        faults: that all ranks are given; each belongs to a batch, and so to one of them.
        folders: by rank, where it works; None: where this process does.
        options: of TinyTask.

    Returns:
        By rank, how they have ended.
    """
    files = [folder / f"rank-{rank}.txt" for rank in range(world_size)]
    processes = []
    for rank, (file, environment) in enumerate(zip(files, _launch_ranks(world_size), strict=True)):
        place = folders[rank] if folders else Path.cwd()
        arguments = (config.model_dump(), environment, place, file, tuple(faults), options)
        processes.append(start_server().Process(target=_train, args=arguments, daemon=True))
        processes[-1].start()
    for process in processes:
        process.join(240)
    return [Ended(process.exitcode, file.read_text()) for process, file in zip(processes, files, strict=True)]


def compute_on_ranks(compute: Callable[[Ranks], Any], world_size: int) -> list[Any]:
    """Return what a function of a module returns on each of several ranks that have met, by rank."""
    queue = start_server().SimpleQueue()
    processes = []
    for environment in _launch_ranks(world_size):
        processes.append(start_server().Process(target=_compute, args=(compute, environment, queue), daemon=True))
        processes[-1].start()
    for process in processes:
        process.join(240)
    assert [process.exitcode for process in processes] == [0] * world_size
    return [result for _, result in sorted((queue.get() for _ in processes), key=lambda pair: pair[0])]


def _launch_ranks(world_size: int) -> Iterator[dict[str, Any]]:
    """Yield each rank's environment."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    for rank in range(world_size):
        environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size}
        yield environment | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}


@cache
def start_server() -> Any:
    """Return what makes processes: a process of its own, without threads, imports torch once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["faults.preload", __name__])  # the first that asks decides: for all tests
    path = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    context.Process(target=int).start()
    if path is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = path
    return context


def _train(
    values: Mapping[str, Any],
    environment: Mapping[str, Any],
    place: Path,
    file: Path,
    faults: Sequence[Fault],
    options: Mapping[str, Any],
) -> None:
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.chdir(place)
    os.environ.update({name: str(value) for name, value in environment.items()})
    torch.set_num_threads(1)
    tiny_task.register(**options)
    put_into_runs(*faults)
    try:
        train(choose_schema(TrainConfig, values).model_validate(values))
    except (UserError, Stopped) as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)


def _compute(compute: Callable[[Ranks], Any], environment: Mapping[str, Any], queue: Any) -> None:
    os.environ.update({name: str(value) for name, value in environment.items()})
    torch.set_num_threads(1)
    with join(choose_device("cpu")) as ranks:
        queue.put((ranks.rank, compute(ranks)))
