"""train.batch_size=auto: how many images a pass takes is the device's matter; how many a step has is the run's."""

import copy
import gc
import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
import yaml

from resnest_imagenet import distributed
from resnest_imagenet.config import TrainConfig
from resnest_imagenet.distributed import Ranks, gather_objects
from resnest_imagenet.errors import ConfigError, is_out_of_memory
from resnest_imagenet.models.proving import use_implementation
from resnest_imagenet.options import AUTO
from resnest_imagenet.randomness import Draws
from resnest_imagenet.tasks.task import Task
from resnest_imagenet.training.identity import compare_identity, describe_identity
from resnest_imagenet.training.memory import PEAK, count_free_bytes, require_memory
from resnest_imagenet.training.run_folder import RunFolder
from resnest_imagenet.training.schedule import StepPlan, plan_steps
from resnest_imagenet.training.state import TrainingState
from resnest_imagenet.training.upgrade import upgrade_checkpoint

_LEAST = 2  # images of a pass: batch norms of some networks need two
_STEPS = 16  # that an epoch should have at least, where train.global_batch does not tell
_SPARE, _SPARE_BYTES = 0.1, 10**9  # of a GPU's free memory: for the decoder, the ranks' messages and fragmentation


def is_auto(config: TrainConfig) -> bool:
    """Return whether the batch size is still to be chosen."""
    return str(config.train.batch_size) == AUTO


def with_batch(config: TrainConfig, batch_size: int = _LEAST, global_batch: int | None = None) -> TrainConfig:
    """Return a configuration with another batch size, and with the images of a step where they are given."""
    update = {"batch_size": batch_size} | ({} if global_batch is None else {"global_batch": global_batch})
    return config.model_copy(update={"train": config.train.model_copy(update=update)})


def open_fitting(open_task: Callable[[TrainConfig], Task], config: TrainConfig, device: torch.device) -> Task:
    """Open the task of a run with a batch that fits: see `choose_batch` and `require_memory`.

    Raises:
        UserError: it cannot be trained, or its batch does not fit.
    """
    task = choose_batch(open_task(with_batch(config)), device) if is_auto(config) else open_task(config)
    require_memory(task, device)
    return task


def choose_batch(task: Task, device: torch.device) -> Task:
    """Return a task with the largest batch that fits, of the sizes that divide a rank's share of a step.

    The images of a step do not depend on the device: they are train.global_batch, or those of the run in the folder, or
    a power of two for each rank: at most train.reference_batch and a sixteenth of the training images together. A run
    that resumes keeps its batch; that of a run that is set aside does not count. A GPU tries a step; on a CPU the bytes
    of a step are counted, see `require_memory`.

    Args:
        task: opened with any batch size; it reads that from its `config`.
        device: of this rank.

    Raises:
        ConfigError: train.global_batch does not divide by the ranks, or by a batch.
    """
    config, world_size = task.config, distributed.launched_as().world_size
    before = _read_earlier(Path(config.run_dir))
    if before and _sets_aside(task, config.train.global_batch or before[1], device):
        before = None
    global_batch = config.train.global_batch or (before[1] if before else _aim(task, world_size))
    if global_batch % world_size:
        raise ConfigError(f"train.global_batch={global_batch} is not a multiple of {world_size} ranks")
    share = global_batch // world_size
    sizes = [size for size in range(share, 0, -1) if share % size == 0 and size >= min(_LEAST, share)]
    if before:
        size, reason = next((size for size in sizes if size <= before[0]), sizes[-1]), "as before"
    elif device.type == "cuda":
        size = next((size for size in sizes if _fits(_resize(task, size, global_batch), device)), sizes[-1])
        reason = "a step of it fits on the GPU"
    else:
        size, reason = _estimate(task, sizes, global_batch, device)
    chosen = _resize(task, size, global_batch)
    if distributed.launched_as().rank == 0:
        print(_describe(size, global_batch, reason), flush=True)
    return chosen


def agree_on_batch(task: Task, plan: StepPlan, ranks: Ranks) -> tuple[Task, StepPlan]:
    """Return the task and its steps with the smallest batch that a rank has chosen; all ranks take part."""
    size = min(gather_objects(task.config.train.batch_size, ranks))
    if size == task.config.train.batch_size:
        return task, plan
    if ranks.is_main:
        print(_describe(size, plan.global_batch, "the most that fits on every rank"), flush=True)
    agreed = _resize(task, size, plan.global_batch)
    return agreed, plan_steps(len(agreed.train_set), agreed.config.train, ranks.world_size)


def _describe(size: int, global_batch: int, reason: str) -> str:
    return f"train.batch_size=auto: {size} images at a time ({reason}), train.global_batch={global_batch} in each step"


def _resize(task: Task, batch_size: int, global_batch: int) -> Task:
    """Return the same task with another batch size: the data are not listed again."""
    resized = copy.copy(task)
    resized.config = with_batch(task.config, batch_size, global_batch)
    return resized


def _aim(task: Task, world_size: int) -> int:
    """Return the images of a step: a power of two for each rank."""
    most = min(task.config.train.reference_batch, len(task.train_set) // _STEPS) // world_size
    return max(_LEAST, 1 << max(0, most.bit_length() - 1)) * world_size


def _read_earlier(run_dir: Path) -> tuple[int, int] | None:
    """Return the batch and the images of a step of the run that has a checkpoint in a folder; None without one."""
    if not any(run_dir.glob("checkpoints/step-*.pt")):
        return None
    try:
        train = yaml.safe_load((run_dir / "config.yaml").read_text())["train"]
        ranks = json.loads((run_dir / "environment.json").read_bytes())["ranks"]
        batch = int(train["batch_size"])
        return batch, int(train["global_batch"] or batch * ranks)
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        return None


def _sets_aside(task: Task, global_batch: int, device: torch.device) -> bool:
    """Return whether the run in the folder is another one, which this one sets aside; the ranks do not meet."""
    options = task.config.checkpoint
    if options.on_mismatch != "set_aside":
        return False
    _, saved = RunFolder(task.config.run_dir, options.keep, is_main=False).read_newest()
    identity = describe_identity(task, global_batch, Ranks(0, 1, 0, device))
    return bool(compare_identity(upgrade_checkpoint(saved), identity))


def _estimate(task: Task, sizes: list[int], global_batch: int, device: torch.device) -> tuple[int, str]:
    """Return the largest size whose step fits into this machine's memory with those of its other ranks, and why."""
    num_ranks = distributed.count_local_ranks()
    free = count_free_bytes()
    if free is None:
        return sizes[0], "the free memory is not known"
    kept = _resize(task, sizes[0], global_batch).count_kept_bytes(device, enough=free / num_ranks / PEAK)
    needed = {size: PEAK * num_ranks * kept * size / sizes[0] for size in sizes}
    size = next((size for size in sizes if needed[size] < free), sizes[-1])
    return size, f"at most {needed[size] / 1e9:.1f} GB of {free / 1e9:.1f} GB that are free"


def _fits(task: Task, device: torch.device) -> bool:
    """Return whether a step fits on a GPU, by trying one on a network that is thrown away."""
    is_cuda = device.type == "cuda"
    free = torch.cuda.mem_get_info(device)[0] if is_cuda else 0
    try:
        with torch.cuda.device(device) if is_cuda else nullcontext():  # kernels of Triton go to the current one
            most = _take_step(task, device)
        return not is_cuda or most < free * (1 - _SPARE) - _SPARE_BYTES
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error) and "ALLOC_FAILED" not in str(error):
            raise
        return False
    finally:
        gc.collect()  # an error's frames keep tensors
        if is_cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)


def _take_step(task: Task, device: torch.device) -> int:
    """Compute the gradients of one blank batch beside all that a run keeps; return the bytes at the peak, or 0."""
    config = task.config
    state = TrainingState(task.build_model(False, device), config.train, task.head)
    if config.model.split_attention == "auto":
        use_implementation(state.model, "reference")  # the kernels are not proven yet; the formula keeps more
    losses = task.loss(state.model.train(), task.blank_batch(device), Draws(config.seed, 0, 0))
    state.scaler.scale(torch.stack(list(losses.values())).sum()).backward()
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_reserved(device)
