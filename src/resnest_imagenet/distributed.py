"""Ranks, devices and collectives. No other file reads the launcher's environment variables.

torch is imported where it is used: the commands need their rank before they import it.
"""

import atexit
import itertools
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from resnest_imagenet.errors import ConfigError, DistributedError, first_line

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.distributed import Store

Result = TypeVar("Result")

_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # torchrun sets them all
_joins = itertools.count()  # counts the joins of this process
_groups: list[Any] = []  # holds the process group of this process, see `join`
atexit.register(_groups.clear)


@dataclass(frozen=True)
class Ranks:
    """A process and its place among all.

    Attributes:
        rank: 0 .. world_size - 1 over all nodes.
        world_size: number of ranks.
        local_rank: within this node.
        device: of this rank.
        store: for messages between the ranks outside of collectives; None for a single process.
    """

    rank: int
    world_size: int
    local_rank: int
    device: "torch.device"
    store: "Store | None" = None

    @property
    def is_main(self) -> bool:
        """Whether this rank writes."""
        return self.rank == 0


class Launch(NamedTuple):
    """The place of a process that torchrun started; see `Ranks`."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1


def launched_as() -> Launch:
    """Return this process's place among the ranks of torchrun; without torchrun, the first and only one.

    Raises:
        ConfigError: only some of torchrun's variables are set, or they make no sense.
    """
    if not _is_launched():
        return Launch()
    unset = [name for name in _VARIABLES if not os.environ.get(name)]
    if unset:
        present = [name for name in _VARIABLES[:3] if os.environ.get(name)]
        raise ConfigError(
            f"{', '.join(present)} set without {', '.join(unset)}: torchrun sets them all; unset them for one process"
        )
    values = {name: os.environ[name] for name in (*_VARIABLES[:3], "MASTER_PORT")}
    for name, value in values.items():
        if not (value.isascii() and value.isdigit()):
            raise ConfigError(f"{name}={value} is not a number: torchrun sets it")
    rank, local_rank, world_size, _ = map(int, values.values())
    if rank >= world_size:
        raise ConfigError(f"RANK={rank} must be less than WORLD_SIZE={world_size}: torchrun sets both")
    return Launch(rank, local_rank, world_size)


def count_local_ranks() -> int:
    """Return how many ranks share this node's memory; 1 without torchrun's variable."""
    value = os.environ.get("LOCAL_WORLD_SIZE", "")
    return int(value) if _is_launched() and value.isdigit() else 1


def _is_launched() -> bool:
    """Return whether a launcher started this process. WORLD_SIZE=1 alone, which some shells keep, does not count."""
    get = os.environ.get
    return bool(get("RANK") or get("LOCAL_RANK") or get("WORLD_SIZE", "") not in ("", "1"))


def choose_device(device: "str | torch.device") -> "torch.device":
    """Return this rank's device.

    Args:
        device: "auto" (CUDA where there is one), "cpu", "cuda" (this rank's), "cuda:1" or another number, "mps", or
            torch's own.

    Raises:
        ConfigError: another one, or one that is not there, or none left for this rank, or one for several ranks.
    """
    import torch

    if isinstance(device, torch.device):
        return _require_device(device)
    if device not in ("auto", "cpu", "cuda"):
        try:
            only = _require_device(torch.device(device))
        except RuntimeError as error:  # of torch, about the name
            raise ConfigError(f"device={device!r}: auto, cpu, cuda, cuda:1 (any number) and mps are valid") from error
        if launched_as().world_size > 1:
            raise ConfigError(f"device={device} is for one process: under torchrun set device=cuda, or device=cpu")
        return only
    # Not torch.accelerator: it says cuda on a CUDA build without a GPU.
    if device != "cpu" and torch.cuda.is_available():
        _, local_rank, _ = launched_as()
        if local_rank >= torch.cuda.device_count():
            raise ConfigError(f"more ranks than the {torch.cuda.device_count()} CUDA devices: lower --nproc-per-node")
        return torch.device("cuda", local_rank)
    if device == "cuda":
        raise ConfigError("device=cuda: torch sees no CUDA device; device=auto takes the CPU then")
    return torch.device("cpu")


def _require_device(device: "torch.device") -> "torch.device":
    """Return a device of torch's, or raise a ConfigError unless it is the CPU, a CUDA device or Apple's, and there."""
    import torch

    if device.type not in ("cpu", "cuda", "mps"):
        raise ConfigError(f"device={device}: only a CPU, a CUDA device or mps is valid")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ConfigError("device=mps: torch sees no GPU of Apple's; device=auto takes CUDA, or the CPU")
    count = torch.cuda.device_count() if device.type == "cuda" else 1
    if (device.index or 0) >= count:
        there = ", ".join(f"cuda:{index}" for index in range(count))
        raise ConfigError(f"device={device}: torch sees {there or 'no CUDA device'}")
    return device


@contextmanager
def join(device: "torch.device", timeout: float = 600) -> Iterator[Ranks]:
    """Join the process group that torchrun announces, and leave it at the end; without torchrun, run alone.

    Args:
        device: this rank's.
        timeout: seconds that a rank may keep the others waiting.

    Raises:
        ConfigError: with the launcher's settings, a restart would fail.
        DistributedError: a rank did not join in that time.
    """
    import torch
    import torch.distributed as dist

    rank, local_rank, world_size = launched_as()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not _is_launched():
        yield Ranks(0, 1, 0, device)
        return
    store = _meet(rank, world_size, timeout)

    def initialise() -> None:
        if device.type == "cuda":
            torch.cuda.set_device(device)  # each thread has its own
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            # `supervision.Watch` ends a collective that hangs: torch would count the time of a frozen process.
            timeout=timedelta(days=1),
            store=store,
            rank=rank,
            world_size=world_size,
            device_id=device if device.type == "cuda" else None,
        )

    _do_within(2 * timeout, initialise, "a rank has left while the ranks were joining")
    # This reference outlives the wrapped network: the reducer of DistributedDataParallel must not have the last one. It
    # would wait for gloo's thread while it holds the GIL, and that thread may need the GIL to free its last tensor.
    _groups[:] = [dist.group.WORLD]
    yield Ranks(rank, world_size, local_rank, device, store)
    # Do not leave the group after an error: the other ranks may wait in a collective, and the process ends anyway.
    dist.destroy_process_group()


def _meet(rank: int, world_size: int, timeout: float) -> "Store":
    """Return the store of this attempt, after all ranks have joined.

    torchrun's own store outlives a restart, and keys of the failed attempt would confuse the next one. So on a single
    node every attempt has its own prefix. Several nodes count their restarts separately: there torchrun must make a new
    store for each attempt. A process that joins a second time would find its first keys: every join has its own prefix.
    """
    import torch.distributed as dist

    get = os.environ.get
    shares_store = get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if shares_store and int(get("GROUP_WORLD_SIZE", 1)) > 1 and int(get("TORCHELASTIC_MAX_RESTARTS", 0)) > 0:
        raise ConfigError(
            "torchrun --max-restarts on several nodes needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in the environment"
        )
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    is_server = rank == 0 and not shares_store

    def connect() -> "Store":
        patience = timedelta(seconds=timeout)
        # Do not wait for the others here: torch could not name the missing ranks.
        return dist.TCPStore(host, port, world_size, is_server, patience, wait_for_workers=False, multi_tenant=True)

    where = f"at {host}:{port} (MASTER_ADDR:MASTER_PORT)"
    if not is_server:
        _wait_for_server(host, port, timeout, f"{'torchrun' if shares_store else 'rank 0'} does not answer {where}")
    store = _do_within(2 * timeout, connect, f"cannot {'listen' if is_server else 'meet the other ranks'} {where}")
    if shares_store:
        store = dist.PrefixStore(f"attempt {get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    store = dist.PrefixStore(f"join {next(_joins)}", store)
    _wait_for_ranks(store, rank, world_size, timeout)
    return store


def _wait_for_server(host: str, port: int, timeout: float, problem: str) -> None:
    """Return when a server listens: torch would print its own stack trace without one."""
    deadline = time.monotonic() + timeout
    while True:
        try:
            return socket.create_connection((host, port), timeout=1).close()
        except OSError as error:
            if time.monotonic() > deadline:
                reason = error.strerror or error
                raise DistributedError(f"{problem} within {timeout:g} s (timeout_seconds): {reason}") from error
            time.sleep(0.1)


def _wait_for_ranks(store: "Store", rank: int, world_size: int, timeout: float) -> None:
    """Return when all ranks have joined. The wait is in Python, not in the store: a signal must end it at once."""
    store.set(f"joined {rank}", "")
    deadline = time.monotonic() + timeout
    keys = [f"joined {number}" for number in range(world_size)]
    while not store.check(keys):
        if time.monotonic() > deadline:
            joined = [store.check([key]) for key in keys]
            missing = [number for number, is_joined in enumerate(joined) if not is_joined]
            if not missing:  # the last one has just joined
                return
            names = f"rank{'s' * (len(missing) > 1)} {', '.join(map(str, missing))}"
            error = DistributedError(f"{names} did not join within {timeout:g} s (timeout_seconds)")
            error.is_reported = rank != joined.index(True)
            raise error
        time.sleep(0.05)


def _do_within(seconds: float, work: Callable[[], Result], problem: str) -> Result:
    """Run work that waits within torch in a thread: in the main thread, Python could not handle a signal.

    Raises:
        DistributedError: the connection failed, or the work did not end in that time.
    """
    import torch.distributed as dist

    results: list[Result] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:  # raised again by the caller
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if results:
        return results[0]
    if not errors or isinstance(errors[0], dist.DistError) or "gloo" in str(errors[0]):
        cause = f" ({first_line(errors[0])})" if errors else ""
        raise DistributedError(f"{problem}{cause}")
    raise errors[0]


def has_joined() -> bool:
    """Return whether this process is in a process group."""
    if "torch" not in sys.modules:
        return False
    import torch.distributed as dist

    return dist.is_initialized()


def tell_launcher(line: str) -> None:
    """Make torchrun's summary, which comes last, repeat why this rank failed."""
    path = find_launcher_file()
    if path:
        with suppress(OSError), open(path, "w") as file:  # a full disk must not change the exit code
            file.write(format_failure(line))


def find_launcher_file() -> str | None:
    """Return the file from which torchrun reads why this rank failed; None without torchrun."""
    return os.environ.get("TORCHELASTIC_ERROR_FILE")


def format_failure(line: str) -> str:
    """Return a reason in torchrun's format."""
    details = {"py_callstack": line, "timestamp": str(int(time.time()))}
    return json.dumps({"message": {"message": line, "extraInfo": details}})


def is_lost_peer(error: BaseException) -> bool:
    """Return whether a collective failed because another rank has ended."""
    import torch.distributed as dist

    # gloo's errors have no type of their own.
    phrases = ("gloo/transport", "Connection closed by peer", "Connection reset by peer", "Broken pipe")
    is_gloo = isinstance(error, RuntimeError) and any(phrase in str(error) for phrase in phrases)
    return has_joined() and (is_gloo or isinstance(error, dist.DistError))


def sum_over_ranks(values: "torch.Tensor") -> "torch.Tensor":
    """Add a tensor over all ranks, in place; the same result everywhere."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def gather_on_device(value: "int | torch.Tensor", ranks: Ranks) -> "torch.Tensor":
    """Return every rank's integer, int64 (world_size,), on the device: the host does not wait for a GPU."""
    import torch

    values = torch.zeros(ranks.world_size, dtype=torch.int64, device=ranks.device)
    values[ranks.rank] = value
    return sum_over_ranks(values)


def gather(value: int, ranks: Ranks) -> list[int]:
    """Return every rank's integer, by rank."""
    return gather_on_device(value, ranks).tolist()


def gather_objects(value: Any, ranks: Ranks) -> list[Any]:
    """Return every rank's picklable value, by rank."""
    import torch.distributed as dist

    if not dist.is_initialized():
        return [value]
    values = [None] * ranks.world_size
    dist.all_gather_object(values, value)
    return values


def barrier(ranks: Ranks) -> None:
    """Return when all ranks have called this."""
    gather(0, ranks)


def broadcast_buffers(model: "nn.Module") -> None:
    """Copy the buffers of rank 0 to every rank: BN statistics differ between ranks until the next training step."""
    import torch.distributed as dist

    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)
