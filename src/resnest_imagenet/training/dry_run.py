"""What a run would do, before it does it."""

import os
import shutil
import time
from pathlib import Path
from typing import Any

import torch

from resnest_imagenet import distributed
from resnest_imagenet.checkpoint import load_checkpoint
from resnest_imagenet.compute import autocast
from resnest_imagenet.config import Recipe, TrainConfig
from resnest_imagenet.data.loader import choose_loader
from resnest_imagenet.data.transforms import EvalTransform
from resnest_imagenet.distributed import Ranks
from resnest_imagenet.errors import ConfigError, DamagedCheckpointError
from resnest_imagenet.models.cost import count_cost, count_kept
from resnest_imagenet.models.zoo import build_model
from resnest_imagenet.training.memory import count_free_bytes
from resnest_imagenet.training.run_folder import RunFolder
from resnest_imagenet.training.saving import describe_identity, find_problem, is_over
from resnest_imagenet.training.schedule import StepPlan
from resnest_imagenet.training.state import TrainingState
from resnest_imagenet.training.train import build_train_loader, prepare
from resnest_imagenet.weights.load import match_tensors, read_weights


def describe_run(config: TrainConfig) -> str:
    """Check all that can be checked without training, read one batch, and return the plan, a line for each subject.

    Nothing is written, not even the run folder. Under torchrun each rank reads its batch; the ranks do not meet.

    Raises:
        UserError: what would stop the run at its start.
    """
    config, device, train_set, val_set, plan = prepare(config)
    recipe, options = config.train, config.checkpoint
    rank, local_rank, world_size = distributed.launched_as()
    ranks, alone = Ranks(rank, world_size, local_rank, device), Ranks(0, 1, 0, device)
    started = time.perf_counter()
    images, _ = next(iter(build_train_loader(config, train_set, plan, ranks).batches(epoch=0)))
    seconds = time.perf_counter() - started
    parameters, multiply_adds = count_cost(config.model.name, recipe.crop)
    checkpoint = count_checkpoint_bytes(config)
    with autocast(torch.device("cpu"), recipe.precision):
        kept = count_kept(config.model.name, recipe.crop, recipe.batch_size)
    run = RunFolder(config.run_dir, options.keep, is_main=False)
    protocol = EvalTransform(config.eval.crop, **config.protocol.model_dump()).protocol
    needed = (options.keep + 2) * checkpoint  # the best, and one that is being written
    free = _count_free_disk(run.path)
    lines = {
        "network": f"{config.model.name}, {len(train_set.classes)} classes (with 1000: {parameters / 1e6:.2f} M "
        f"parameters, {multiply_adds / 1e9:.2f} GFLOPs at {recipe.crop})",
        "data": f"{len(train_set):,} training and {len(val_set):,} val images in {config.data.root}",
        "loader": f"{choose_loader(config.loader.name)}: a first batch {tuple(images.shape)} on {images.device}, "
        f"after {seconds:.1f} s",
        "steps": f"{plan.total_steps:,}, {plan.steps_per_epoch:,} in each of {recipe.epochs} epochs; of "
        f"{plan.global_batch} images, {recipe.batch_size} x {world_size} ranks x {plan.accumulation} passes",
        "learning rate": _describe_learning_rate(recipe, plan),
        "evaluation": f"each epoch: {protocol}",
        "memory": f"{(checkpoint + 4 * parameters + kept) / 1e9:.1f} GB per rank for weights, their average, "
        f"momentum, gradients and activations; more in the backward pass{_describe_free_memory(device)}",
        "checkpoints": f"{checkpoint / 1e6:,.0f} MB each, every {options.every_steps:,} steps and each epoch; the last "
        f"{options.keep} and the best stay",
        "disk": f"{needed / 1e9:.2f} GB for them in {config.run_dir}, {free / 1e9:,.1f} GB free"
        + (": NOT ENOUGH" if needed > free else ""),
        "start": _describe_start(run, config, describe_identity(config, plan, train_set, val_set, protocol, alone)),
    }
    return "\n".join(f"{name:<14} {text}" for name, text in lines.items())


def count_checkpoint_bytes(config: TrainConfig) -> int:
    """Return what a checkpoint's tensors take: weights, their moving average and momentum. Nothing is allocated."""
    assert config.model.num_classes is not None
    with torch.device("meta"):
        state = TrainingState(build_model(config.model.name, config.model.num_classes), config.train)
    weights = sum(tensor.nbytes for tensor in state.model.state_dict().values())
    momentum = sum(parameter.nbytes for parameter in state.model.parameters())
    return weights * (1 if state.ema is None else 2) + momentum


def _describe_start(run: RunFolder, config: TrainConfig, identity: dict[str, Any]) -> str:
    newest = None if run.is_moving() else next(iter(run.list_checkpoints()), None)
    try:
        saved = {} if newest is None else load_checkpoint(newest)
    except DamagedCheckpointError as error:
        return f"from the one before the newest: {error}"
    remains = run.find_remains() if newest is None and not run.is_moving() else None
    problem = find_problem(run, newest, saved, remains, identity, config.checkpoint.on_mismatch)
    if problem:
        return f"from scratch: {problem}, and is set aside"
    if newest is None:
        if config.train.init_from is None:
            return f"from scratch in {run.path}"
        match_tensors(read_weights(config.train.init_from), config.model.name)
        return f"from scratch in {run.path}, with the weights of {config.train.init_from}"
    if is_over(run, saved, identity):
        return f"finished: best top-1 {saved['best_top1']:.2f} %, nothing to do"
    before = saved["identity"]["train.epochs"]
    return f"from {newest}" + (f", extended from {before} epochs" if before != config.train.epochs else "")


def _describe_learning_rate(recipe: Recipe, plan: StepPlan) -> str:
    epochs = sorted({recipe.epochs * quarter // 4 for quarter in range(4)} | {int(recipe.warmup_epochs)})
    rates = [f"{plan.learning_rate(epoch * plan.steps_per_epoch):.3g}" for epoch in epochs]
    last = plan.learning_rate(plan.total_steps - 1)
    numbers = ", ".join(map(str, epochs))
    return f"{recipe.schedule}: {', '.join(rates)} after {numbers} epochs, {last:.3g} in the last step"


def _describe_free_memory(device: torch.device) -> str:
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else count_free_bytes()
    return "" if free is None else f"; {free / 1e9:.1f} GB are free"


def _count_free_disk(folder: Path) -> int:
    """Return what is free where a folder is, or would be made; a ConfigError where it cannot be."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise ConfigError(f"run_dir={folder}: cannot be written ({there})")
    return shutil.disk_usage(there).free
