"""The dry run: checks a run and returns its plan, without training."""

import os
import shutil
import time
from pathlib import Path

import torch

from resnest_imagenet import distributed
from resnest_imagenet.checkpoint import load_checkpoint
from resnest_imagenet.config import TrainConfig
from resnest_imagenet.distributed import Ranks
from resnest_imagenet.errors import ConfigError, DamagedCheckpointError
from resnest_imagenet.tasks.task import Task
from resnest_imagenet.training.describe import count_state_bytes, describe_plan, format_bytes, format_lines
from resnest_imagenet.training.identity import describe_identity, read_identity
from resnest_imagenet.training.run_folder import RunFolder
from resnest_imagenet.training.saving import describe_end, find_problem, is_over, read_length
from resnest_imagenet.training.schedule import StepPlan
from resnest_imagenet.training.state import TrainingState
from resnest_imagenet.training.train import prepare
from resnest_imagenet.training.upgrade import upgrade_checkpoint


def describe_run(config: TrainConfig) -> str:
    """Check everything that can be checked without training, read one batch, and return the plan, a line per subject.

    Nothing is written, not even the run folder. Under torchrun each rank reads its batch; the ranks do not meet.

    Raises:
        UserError: the error that would stop the run at its start.
    """
    task, plan, device = prepare(config)
    rank, local_rank, world_size = distributed.launched_as()
    ranks = Ranks(rank, world_size, local_rank, device)
    run = RunFolder(config.run_dir, config.checkpoint.keep, is_main=False)
    with torch.device("meta"):  # nothing is allocated
        state = TrainingState(task.build_model(False, torch.device("meta")), task.config.train, task.head)
    lines = {
        **describe_plan(task, plan, state, ranks, is_dry=True),
        "first batch": _read_batch(task, plan, ranks),
        "disk": _describe_disk(task.config.checkpoint.keep, state, run.path),
        "start": _describe_start(run, task, plan, device),
    }
    return format_lines(lines)


def _read_batch(task: Task, plan: StepPlan, ranks: Ranks) -> str:
    """Read a rank's first batch; return its size and the time of reading it."""
    batches = task.plan_batches(plan.steps_per_epoch * plan.accumulation * ranks.world_size, ranks)
    started = time.perf_counter()
    batch = next(iter(task.build_loader(batches, ranks).batches(epoch=0)))
    seconds = time.perf_counter() - started
    images = batch[0] if isinstance(batch, tuple | list) else batch
    size = f"{tuple(images.shape)} on {images.device}, " if isinstance(images, torch.Tensor) else ""
    return f"{size}after {seconds:.1f} s"


def _describe_disk(num_kept: int, state: TrainingState, run: Path) -> str:
    checkpoint, _ = count_state_bytes(state)
    needed = (num_kept + 2) * checkpoint  # the best, and one that is being written
    free = _count_free_disk(run)
    enough = ": NOT ENOUGH" if needed > free else ""
    return f"{format_bytes(needed)} for the checkpoints in {run}, {format_bytes(free)} free{enough}"


def _describe_start(run: RunFolder, task: Task, plan: StepPlan, device: torch.device) -> str:
    config = task.config
    identity = describe_identity(task, plan.global_batch, Ranks(0, 1, 0, device))
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
        task.build_model(True, torch.device("cpu"))  # reads the weights, and refuses those that do not fit
        return f"from scratch in {run.path}, with the weights of {config.train.init_from}"
    if is_over(run, saved, plan, config.train.patience):
        return describe_end(task.metric, saved, plan, config.train.patience)
    option, before = read_length(read_identity(saved))
    is_extended = before != identity[option]
    return f"from {newest}" + (f", extended from {before} {option.removeprefix('train.')}" if is_extended else "")


def _count_free_disk(folder: Path) -> int:
    """Return the free bytes of the disk on which a folder is or would be made; a ConfigError if it cannot be made."""
    parent = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ConfigError(f"run_dir={folder}: cannot be written ({parent})")
    return shutil.disk_usage(parent).free
