"""Ranks, devices and collectives. Nothing else asks the environment who it is.

torch is imported where it is used: the commands ask for their rank before they import it.
"""

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from resnest_imagenet.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.distributed import Store


@dataclass(frozen=True)
class Ranks:
    """A process among all.

    Attributes:
        rank: 0 .. world_size - 1 over all nodes.
        world_size: how many there are.
        local_rank: within this node.
        device: where this rank computes.
        store: what the ranks may tell each other outside of collectives; None for a process alone.
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


def launched_as() -> tuple[int, int, int]:
    """Return (rank, local rank, world size) as torchrun set them, or (0, 0, 1)."""
    get = os.environ.get
    return int(get("RANK", 0)), int(get("LOCAL_RANK", 0)), int(get("WORLD_SIZE", 1))


def choose_device(name: str) -> "torch.device":
    """Return this rank's device: auto takes CUDA where there is one.

    Raises:
        ConfigError: for cuda where there is none, or none left for this rank.
    """
    import torch

    # Not torch.accelerator: it says cuda on a CUDA build without a GPU.
    if name != "cpu" and torch.cuda.is_available():
        _, local_rank, _ = launched_as()
        if local_rank >= torch.cuda.device_count():
            raise ConfigError(f"more ranks than the {torch.cuda.device_count()} CUDA devices: lower --nproc-per-node")
        return torch.device("cuda", local_rank)
    if name == "cuda":
        raise ConfigError("device=cuda: torch sees no CUDA device; device=auto takes the CPU then")
    return torch.device("cpu")


@contextmanager
def join(device: "torch.device", timeout: float = 600) -> Iterator[Ranks]:
    """Join the process group that torchrun announces, or be alone; leave it at the end.

    Args:
        device: this rank's.
        timeout: seconds that a rank may keep the others waiting.

    Raises:
        ConfigError: the launcher would not survive a restart.
    """
    import torch
    import torch.distributed as dist

    rank, local_rank, world_size = launched_as()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if "WORLD_SIZE" not in os.environ:
        yield Ranks(0, 1, 0, device)
        return
    # Twice: whoever watches the ranks is to speak first.
    patience = timedelta(seconds=2 * timeout)
    store = _meet(rank, world_size, patience)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        timeout=patience,
        store=store,
        rank=rank,
        world_size=world_size,
        device_id=device if device.type == "cuda" else None,
    )
    yield Ranks(rank, world_size, local_rank, device, store)
    # Not after an error: the peers may wait in a collective, and the process ends anyway.
    dist.destroy_process_group()


def _meet(rank: int, world_size: int, patience: timedelta) -> "Store":
    """Return the store of this attempt.

    torchrun's own store outlives a restart, and the keys of the dead attempt confuse the next one: on a node alone
    every attempt has its own prefix. Nodes count their restarts apart: there torchrun must make a store for each.
    """
    import torch.distributed as dist

    get = os.environ.get
    shares_store = get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if shares_store and int(get("GROUP_WORLD_SIZE", 1)) > 1 and int(get("TORCHELASTIC_MAX_RESTARTS", 0)) > 0:
        raise ConfigError(
            "torchrun --max-restarts on several nodes needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in the environment"
        )
    store, _, _ = next(dist.rendezvous("env://", rank, world_size, timeout=patience))
    return dist.PrefixStore(f"attempt {get('TORCHELASTIC_RESTART_COUNT', 0)}", store) if shares_store else store


def has_joined() -> bool:
    """Say whether this process is in a process group."""
    if "torch" not in sys.modules:
        return False
    import torch.distributed as dist

    return dist.is_initialized()


def tell_launcher(line: str) -> None:
    """Let torchrun's summary, which comes last, repeat why this rank failed."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        with open(path, "w") as file:
            details = {"py_callstack": line, "timestamp": str(int(time.time()))}
            json.dump({"message": {"message": line, "extraInfo": details}}, file)


def is_lost_peer(error: BaseException) -> bool:
    """Say whether a collective failed because another rank is gone."""
    import torch.distributed as dist

    # What gloo says has no type of its own.
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
    """Return every rank's integer, int64 (world_size,); a GPU has it when it gets there, its host does not wait."""
    import torch

    values = torch.zeros(ranks.world_size, dtype=torch.int64, device=ranks.device)
    values[ranks.rank] = value
    return sum_over_ranks(values)


def gather(value: int, ranks: Ranks) -> list[int]:
    """Return every rank's integer, by rank."""
    return gather_on_device(value, ranks).tolist()


def gather_objects(value: Any, ranks: Ranks) -> list[Any]:
    """Return every rank's value of any picklable kind, by rank."""
    import torch.distributed as dist

    if not dist.is_initialized():
        return [value]
    values = [None] * ranks.world_size
    dist.all_gather_object(values, value)
    return values


def broadcast_buffers(model: "nn.Module") -> None:
    """Give every rank the buffers of rank 0: BN statistics differ between ranks until the next training step."""
    import torch.distributed as dist

    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)
