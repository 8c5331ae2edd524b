"""Prepares a network for training: its operators chosen, then distributed, compiled, warmed up."""

import inspect
import time
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from resnest_imagenet import distributed
from resnest_imagenet.compute import keep_freed_memory, name_device
from resnest_imagenet.distributed import Ranks
from resnest_imagenet.evaluation.operators import Choice, choose_attention, choose_gpu_decoder
from resnest_imagenet.models.proving import needs_proof
from resnest_imagenet.randomness import Draws
from resnest_imagenet.tasks.task import Task
from resnest_imagenet.training.saving import Saver

_ON_CPU = "dali, decoding on the CPU"  # the entry "loader" of a checkpoint's circumstances


def choose_operators(
    model: nn.Module, task: Task, ranks: Ranks, saver: Saver, saved: dict[str, Any] | None
) -> dict[str, Choice]:
    """Choose the operators of this device that must prove themselves, before a run computes; all ranks take part.

    A resumed run keeps what it has used so far on such a device, unless that fails now. The choices become
    circumstances of its checkpoints, so that `Saver.restore` reports a change. Times could differ between two runs that
    are otherwise the same: with `train.deterministic` nothing is timed.

    Args:
        model: of the task, new, on its device.
        task: of the run.
        ranks: the ranks of the run.
        saver: of the run.
        saved: the checkpoint from which the run resumes; None for a new run.

    Returns:
        The choices by the names of environment.json; none on a CPU.
    """
    recipe, option = task.config.train, task.config.model.split_attention
    before = (saved or {}).get("circumstances", {})
    loader = task.choose_train_loader(ranks.device, str(before.get("loader", "")).partition(",")[0] or None)
    if before.get("device") != name_device(ranks.device):
        before = {}
    choices: dict[str, Choice | None] = {}
    if option != "auto" or needs_proof(model, ranks.device):
        batch, _, height, width = task.blank_batch(torch.device("meta"))[0].shape
        kept = before.get("model.split_attention")
        choices["split_attention"] = choose_attention(
            *(model, (batch, height, width), recipe.precision, ranks, option),
            kept="reference" if kept == "reference" else kept and "fused",
            trains=True,
            is_timed=not recipe.deterministic,
        )
    if loader is not None:
        decoded_on_cpu = before.get("loader") == _ON_CPU
        choices["decoder"] = choose_gpu_decoder(task.train_set, task.config.loader.name, ranks, decoded_on_cpu)
        # Evaluation does not depend on the recipe: its loader is built before.
        fixed = task.config.loader.model_copy(update={"name": loader})
        task.config = task.config.model_copy(update={"loader": fixed})
        saver.circumstances.update(loader=loader)
    chosen = {name: choice for name, choice in choices.items() if choice is not None}
    for name, used, circumstance in (
        ("split_attention", "reference", ("model.split_attention", "reference")),
        ("decoder", "cpu", ("loader", _ON_CPU)),
    ):
        if name in chosen and chosen[name].used == used:
            saver.circumstances.update([circumstance])
    return chosen


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
