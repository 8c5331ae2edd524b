"""What a run would do, before it does it."""

import os
import shutil
from pathlib import Path

import torch

from resnest_imagenet import distributed
from resnest_imagenet.checkpoint import load_checkpoint
from resnest_imagenet.config import TrainConfig
from resnest_imagenet.distributed import Ranks
from resnest_imagenet.errors import ConfigError, DamagedCheckpointError
from resnest_imagenet.tasks.task import Task
from resnest_imagenet.training.identity import describe_identity, read_identity
from resnest_imagenet.training.memory import count_free_bytes
from resnest_imagenet.training.run_folder import RunFolder
from resnest_imagenet.training.saving import describe_best, find_problem, is_over, read_length
from resnest_imagenet.training.schedule import StepPlan
from resnest_imagenet.training.state import TrainingState
from resnest_imagenet.training.train import prepare
from resnest_imagenet.training.upgrade import upgrade_checkpoint


def describe_run(config: TrainConfig) -> str:
    """Check all that can be checked without training, read one batch, and return the plan, a line for each subject.

    Nothing is written, not even the run folder. Under torchrun each rank reads its batch; the ranks do not meet.

    Raises:
        UserError: what would stop the run at its start.
    """
    task, plan, device = prepare(config)
    rank, local_rank, world_size = distributed.launched_as()
    ranks = Ranks(rank, world_size, local_rank, device)
    run = RunFolder(config.run_dir, config.checkpoint.keep, is_main=False)
    batches = task.plan_batches(plan.steps_per_epoch * plan.accumulation * world_size, ranks)
    lines = {
        **task.describe(ranks, batches),
        "steps": f"{plan.total_steps:,}, {plan.steps_per_epoch:,} in an epoch, {plan.epochs} epochs; of "
        f"{plan.global_batch} images, {config.train.batch_size} x {world_size} ranks x {plan.accumulation} passes",
        "learning rate": _describe_learning_rate(config.train.schedule, plan),
        **_describe_storage(task, device, run.path),
        "start": _describe_start(run, task, plan, device),
    }
    return "\n".join(f"{name:<14} {text}" for name, text in lines.items())


def count_checkpoint_bytes(task: Task) -> tuple[int, int]:
    """Return the bytes of a checkpoint's tensors, and of the parameters. Nothing is allocated.

    A checkpoint has the weights, their moving average and the optimiser's state.
    """
    with torch.device("meta"):
        state = TrainingState(task.build_model(False, torch.device("meta")), task.config.train, task.head)
    weights = sum(tensor.nbytes for tensor in state.model.state_dict().values())
    parameters = sum(parameter.nbytes for parameter in state.model.parameters())
    momentum = sum(tensor.nbytes for entry in state.optimizer.state.values() for tensor in entry.values())
    return weights * (1 if state.ema is None else 2) + momentum, parameters


def _describe_storage(task: Task, device: torch.device, run: Path) -> dict[str, str]:
    """Return the lines about memory and the disk."""
    options = task.config.checkpoint
    checkpoint, parameters = count_checkpoint_bytes(task)
    needed = (options.keep + 2) * checkpoint  # the best, and one that is being written
    free = _count_free_disk(run)
    memory = checkpoint + parameters + task.count_kept_bytes()
    return {
        "memory": f"{memory / 1e9:.1f} GB per rank for weights, their average, "
        f"optimiser, gradients and activations; more in the backward pass{_describe_free_memory(device)}",
        "checkpoints": f"{checkpoint / 1e6:,.0f} MB each, every {options.every_steps:,} steps and each epoch; the last "
        f"{options.keep} and the best stay",
        "disk": f"{needed / 1e9:.2f} GB for them in {run}, {free / 1e9:,.1f} GB free"
        + (": NOT ENOUGH" if needed > free else ""),
    }


def _describe_start(run: RunFolder, task: Task, plan: StepPlan, device: torch.device) -> str:
    config = task.config
    identity = describe_identity(task, plan, Ranks(0, 1, 0, device))
    newest = None if run.is_moving() else next(iter(run.list_checkpoints()), None)
    try:
        saved = {} if newest is None else upgrade_checkpoint(load_checkpoint(newest))
    except DamagedCheckpointError as error:
        return f"from the one before the newest: {error}"
    remains = run.find_remains() if newest is None and not run.is_moving() else None
    problem = find_problem(run, newest, saved, remains, identity, config.checkpoint.on_mismatch)
    if problem:
        return f"from scratch: {problem}, and is set aside"
    if newest is None:
        if config.train.init_from is None:
            return f"from scratch in {run.path}"
        task.build_model(True, torch.device("cpu"))  # reads them, and refuses what does not fit
        return f"from scratch in {run.path}, with the weights of {config.train.init_from}"
    if is_over(run, saved, plan):
        return f"finished: best {describe_best(task.metric, saved['best'])}, nothing to do"
    option, before = read_length(read_identity(saved))
    is_extended = before != identity[option]
    return f"from {newest}" + (f", extended from {before} {option.removeprefix('train.')}" if is_extended else "")


def _describe_learning_rate(schedule: str, plan: StepPlan) -> str:
    epochs = sorted({plan.epochs * quarter // 4 for quarter in range(4)} | {plan.warmup_steps // plan.steps_per_epoch})
    rates = [f"{plan.learning_rate(epoch * plan.steps_per_epoch):.3g}" for epoch in epochs]
    last = plan.learning_rate(plan.total_steps - 1)
    numbers = ", ".join(map(str, epochs))
    return f"{schedule}: {', '.join(rates)} after {numbers} epochs, {last:.3g} in the last step"


def _describe_free_memory(device: torch.device) -> str:
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else count_free_bytes()
    return "" if free is None else f"; {free / 1e9:.1f} GB are free"


def _count_free_disk(folder: Path) -> int:
    """Return what is free where a folder is, or would be made; a ConfigError where it cannot be."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise ConfigError(f"run_dir={folder}: cannot be written ({there})")
    return shutil.disk_usage(there).free
