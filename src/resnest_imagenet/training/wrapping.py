"""Wraps a network for training: distributed, compiled, warmed up."""

import inspect
import time
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from resnest_imagenet import distributed
from resnest_imagenet.compute import keep_freed_memory
from resnest_imagenet.distributed import Ranks
from resnest_imagenet.randomness import Draws
from resnest_imagenet.tasks.task import Task


def wrap(model: nn.Module, task: Task, ranks: Ranks) -> nn.Module:
    """Return the module that training calls; the model's own keys do not change."""
    keep_freed_memory()
    network, compiles = model, task.config.train.compile
    if distributed.has_joined():
        devices = [ranks.device] if ranks.device.type == "cuda" else None
        # Only evaluation uses BN statistics, and it takes rank 0's. torch 2.13 has another name for the option.
        parameters = inspect.signature(DistributedDataParallel).parameters
        sync = "forward_sync_buffers" if "forward_sync_buffers" in parameters else "broadcast_buffers"
        options: dict[str, Any] = {"gradient_as_bucket_view": True, sync: False}
        network = DistributedDataParallel(model, device_ids=devices, **options)
    started = time.perf_counter()
    if compiles:
        network.compile()
    if compiles or distributed.has_joined():
        _warm_up(network, task, ranks.device)
    if compiles and ranks.is_main:
        print(f"compiled in {time.perf_counter() - started:.0f} s", flush=True)
    return network


def _warm_up(network: nn.Module, task: Task, device: torch.device) -> None:
    """Run one blank batch forward and backward, and undo its effects: compilation happens here, not in the first step.

    After its first backward pass, DistributedDataParallel packs the gradients in another order; with three ranks or
    more, the order of their additions depends on that. With the blank batch, the first step after a resumption has the
    same order as any other step.
    """
    before = [buffer.clone() for buffer in network.buffers()]
    losses = task.loss(network, task.blank_batch(device), Draws(task.config.seed, 0, 0))
    torch.stack(list(losses.values())).sum().backward()
    network.zero_grad(set_to_none=True)
    for buffer, value in zip(network.buffers(), before, strict=True):
        buffer.copy_(value)
