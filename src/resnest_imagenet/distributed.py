"""Ranks, devices and collectives. Nothing else asks the environment who it is.

torch is imported where it is used: the commands ask for their rank before they import it.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from resnest_imagenet.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True)
class Ranks:
    """A process among all.

    Attributes:
        rank: 0 .. world_size - 1 over all nodes.
        local_rank: within this node.
        device: where this rank computes.
    """

    rank: int
    world_size: int
    local_rank: int
    device: "torch.device"

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
def join(device: "torch.device") -> Iterator[Ranks]:
    """Join the process group that torchrun announces, or be alone; leave it at the end."""
    import torch
    import torch.distributed as dist

    rank, local_rank, world_size = launched_as()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if "WORLD_SIZE" not in os.environ:
        yield Ranks(0, 1, 0, device)
        return
    if device.type == "cuda":
        dist.init_process_group("nccl", device_id=device)
    else:
        dist.init_process_group("gloo")
    yield Ranks(rank, world_size, local_rank, device)
    # Not after an error: the peers may wait in a collective, and the process ends anyway.
    dist.destroy_process_group()


def has_joined() -> bool:
    """Say whether this process is in a process group."""
    if "torch" not in sys.modules:
        return False
    import torch.distributed as dist

    return dist.is_initialized()


def sum_over_ranks(values: "torch.Tensor") -> "torch.Tensor":
    """Add a tensor over all ranks, in place; the same result everywhere."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def gather(value: int, ranks: Ranks) -> list[int]:
    """Return every rank's value, by rank."""
    import torch

    values = torch.zeros(ranks.world_size, dtype=torch.int64, device=ranks.device)
    values[ranks.rank] = value
    return sum_over_ranks(values).tolist()


def broadcast_buffers(model: "nn.Module") -> None:
    """Give every rank the buffers of rank 0: BN statistics differ between ranks until the next training step."""
    import torch.distributed as dist

    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)
