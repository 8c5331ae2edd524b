"""A run, from its configuration to its checkpoints, in the order of its life."""

import hashlib
from contextlib import closing
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from resnest_imagenet import distributed
from resnest_imagenet.checkpoint import load_checkpoint
from resnest_imagenet.compute import place
from resnest_imagenet.config import RecipeOptions, TrainConfig
from resnest_imagenet.data.augment import Augmentation
from resnest_imagenet.data.loader import Loader, build_loader, choose_loader, open_source
from resnest_imagenet.data.plan import BatchPlan, plan_evaluation
from resnest_imagenet.data.source import ImageSource, require_same_classes
from resnest_imagenet.data.transforms import ERandomCrop, EvalTransform, RandomResizedCrop, TrainTransform
from resnest_imagenet.distributed import Ranks
from resnest_imagenet.errors import CheckpointError, ConfigError
from resnest_imagenet.evaluation.counting import evaluate
from resnest_imagenet.models.dropblock import DropBlock
from resnest_imagenet.models.zoo import build_model, require_model
from resnest_imagenet.training.log import RunLog
from resnest_imagenet.training.loop import train_epoch
from resnest_imagenet.training.run_folder import RunFolder
from resnest_imagenet.training.schedule import StepPlan, count_accumulation, dropblock_probability, plan_steps
from resnest_imagenet.training.state import TrainingState
from resnest_imagenet.weights.load import read_weights, start_from


def train(config: TrainConfig) -> TrainingState:
    """Train, or go on where the run folder's last checkpoint stands; return the final state.

    Raises:
        UserError: for what a user can cause, as one line.
    """
    # 1. What can be refused before any data is touched.
    require_model(config.model.name)
    choose_loader(config.loader.name)
    _, _, world_size = distributed.launched_as()
    count_accumulation(config.train, world_size)
    device = distributed.choose_device(config.device)
    # 2. The data, and with it the steps and the width of the classifier.
    data = config.data
    train_set = open_source(data.kind, data.root, data.train_dir, "data.train_dir")
    val_set = open_source(data.kind, data.root, data.val_dir, "data.val_dir")
    require_same_classes(train_set, val_set)
    config = _fix_num_classes(config, train_set)
    plan = plan_steps(len(train_set), config.train, world_size)
    with distributed.join(device) as ranks:
        # 3. The loaders: this rank's share of both sets.
        train_loader = _build_train_loader(config, train_set, plan, ranks)
        eval_transform = EvalTransform(config.eval.crop, **config.protocol.model_dump())
        eval_plan = plan_evaluation(len(val_set), config.train.batch_size, ranks.rank, ranks.world_size)
        eval_loader = build_loader(
            config.loader.name, val_set, eval_plan, eval_transform, ranks.device, config.loader.workers
        )
        # 4. The model, the same on every rank, and all that changes with it.
        run = RunFolder(config.run_dir, ranks)
        state = _build_state(config, train_set, ranks, is_new=not run.last.exists())
        # 5. The run folder. Where it holds a checkpoint of the same run, that run goes on.
        identity = describe_identity(config, plan, train_set, eval_transform.protocol)
        _resume(state, run, identity, ranks)
        run.open(config.model_dump())
        dropblock = DropBlock(state.model) if config.train.dropblock > 0 else None
        network = _wrap(state.model, config.train.compile, ranks)
        # 6. The epochs.
        log = RunLog(run.path, plan, config.log.every_steps, state, ranks.is_main)
        with run.recording_status(), closing(log):
            while state.epoch < config.train.epochs:
                if dropblock:
                    dropblock.set_probability(dropblock_probability(config.train, state.epoch))
                train_epoch(state, network, train_loader, plan, config.train, config.seed, ranks, log)
                state.epoch += 1
                distributed.broadcast_buffers(state.evaluated_model)
                accuracy = evaluate(state.evaluated_model, eval_loader, ranks, config.train.precision)
                log.evaluation(state, accuracy, eval_transform)
                is_best = accuracy.top1 > state.best_top1
                state.best_top1 = max(state.best_top1, accuracy.top1)
                content = {
                    **state.state_dict(),
                    "identity": identity,
                    "config": config.model_dump(),
                    "classes": list(train_set.classes),
                }
                run.save(content, is_best)
            run.write_status("finished", epoch=state.epoch, step=state.step, best_top1=state.best_top1)
    return state


def describe_identity(config: TrainConfig, plan: StepPlan, train_set: ImageSource, protocol: str) -> dict[str, Any]:
    """Return what must not change when a run goes on: plain values by option name, and a digest of the file names.

    The evaluation's protocol is one of them: the best accuracy so far is comparable under the same only.
    """
    recipe = config.train.model_dump()
    # The number of ranks and with it these may change, as long as their product, the global batch, stays.
    for name in ("batch_size", "global_batch", "compile"):
        del recipe[name]
    return {
        "model.name": config.model.name,
        "model.num_classes": config.model.num_classes,
        **{f"train.{name}": value for name, value in recipe.items()},
        "train.global_batch": plan.global_batch,
        "seed": config.seed,
        "data.shuffle_shards": config.data.shuffle_shards,
        "evaluation": protocol,
        "training images": f"{len(train_set)} {hashlib.sha256(train_set.files.tobytes()).hexdigest()[:16]}",
    }


def _fix_num_classes(config: TrainConfig, train_set: ImageSource) -> TrainConfig:
    """Set the classifier's width to the number of class folders."""
    found = len(train_set.classes)
    if config.model.num_classes not in (None, found):
        raise ConfigError(f"model.num_classes={config.model.num_classes}, but {train_set.root} has {found} classes")
    return config.model_copy(update={"model": config.model.model_copy(update={"num_classes": found})})


def _build_train_loader(config: TrainConfig, train_set: ImageSource, plan: StepPlan, ranks: Ranks) -> Loader:
    recipe = config.train
    batches = BatchPlan(
        num_samples=len(train_set),
        batch_size=recipe.batch_size,
        num_batches=plan.steps_per_epoch * plan.accumulation * ranks.world_size,
        rank=ranks.rank,
        world_size=ranks.world_size,
        shuffle=True,
        seed=config.seed,
        shard_sizes=train_set.shard_sizes,
        shuffle_shards=config.data.shuffle_shards or 0,
    )
    transform = build_train_transform(recipe, config.seed)
    max_errors = config.data.max_errors if config.data.on_error == "substitute" else 0
    loader = config.loader
    return build_loader(loader.name, train_set, batches, transform, ranks.device, loader.workers, max_errors)


def build_train_transform(recipe: RecipeOptions, seed: int) -> TrainTransform:
    """Make what a recipe does to single images."""
    cropping: RandomResizedCrop | ERandomCrop = RandomResizedCrop(recipe.min_crop_area)
    if recipe.cropping == "erandom":
        cropping = ERandomCrop(recipe.crop, recipe.min_crop_area)
    augmentation = Augmentation(
        policy=recipe.policy, jitter=recipe.jitter, lighting=recipe.lighting, shift=recipe.pixel_shift
    )
    return TrainTransform(
        recipe.crop,
        seed,
        cropping,
        antialias=recipe.antialias,
        interpolation=recipe.interpolation,
        augmentation=augmentation,
    )


def _build_state(config: TrainConfig, train_set: ImageSource, ranks: Ranks, is_new: bool) -> TrainingState:
    recipe = config.train
    torch.manual_seed(config.seed)
    classes = list(train_set.classes)
    model = build_model(config.model.name, len(classes), recipe.dropout, recipe.zero_gamma, init=recipe.init)
    if is_new and recipe.init_from is not None:
        same_classes = start_from(model, config.model.name, classes, read_weights(recipe.init_from))
        if ranks.is_main:
            head = "its classifier too" if same_classes else f"with a new classifier of {len(classes)} classes"
            print(f"starting from {recipe.init_from}, {head}", flush=True)
    return TrainingState(place(model, ranks.device), recipe)


def _resume(state: TrainingState, run: RunFolder, identity: dict[str, Any], ranks: Ranks) -> None:
    """Restore the run folder's last checkpoint, if there is one, unless it belongs to another run."""
    if run.last.exists():
        saved = load_checkpoint(run.last)
        theirs = saved.get("identity", {})
        changed = [name for name, value in identity.items() if theirs.get(name) != value]
        if changed:
            differences = "; ".join(f"{name}={theirs.get(name)}, not {identity[name]}" for name in changed)
            raise CheckpointError(f"{run.last} was trained with {differences}: choose another run_dir")
        state.load_state_dict(saved)
        if ranks.is_main:
            print(f"going on from {run.last}: {state.epoch} epochs, {state.step} steps done", flush=True)
    steps = distributed.gather(state.step, ranks)
    if len(set(steps)) > 1:
        raise CheckpointError(
            f"the ranks found different checkpoints (steps {steps}): run_dir={run.path} is not shared"
        )


def _wrap(model: nn.Module, compiled: bool, ranks: Ranks) -> nn.Module:
    """Make the module that is called in training; the model's own keys stay what they are."""
    network = model
    if distributed.has_joined():
        devices = [ranks.device] if ranks.device.type == "cuda" else None
        network = DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True)
    if compiled:
        network.compile()
    return network
