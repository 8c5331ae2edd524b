"""A run, from its configuration to its checkpoints, in the order of its life."""

import inspect
import time
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from resnest_imagenet import distributed
from resnest_imagenet.compute import autocast, keep_freed_memory, place
from resnest_imagenet.config import DataOptions, RecipeOptions, TrainConfig
from resnest_imagenet.data.augment import Augmentation
from resnest_imagenet.data.loader import Loader, build_loader, choose_loader, open_source
from resnest_imagenet.data.plan import BatchPlan, plan_evaluation
from resnest_imagenet.data.source import ImageSource, print_notes, require_same_classes, require_separate
from resnest_imagenet.data.transforms import ERandomCrop, EvalTransform, RandomResizedCrop, TrainTransform
from resnest_imagenet.distributed import Ranks
from resnest_imagenet.errors import ConfigError, LoadingError, Stopped
from resnest_imagenet.evaluation.accuracy import evaluate
from resnest_imagenet.inference.labels import name_outputs
from resnest_imagenet.models.batch import require_batch
from resnest_imagenet.models.dropblock import DropBlock
from resnest_imagenet.models.folding import fold_batch_norms
from resnest_imagenet.models.zoo import build_model, require_model
from resnest_imagenet.supervision import STARTING, supervise
from resnest_imagenet.training.control import Control, StopAgreed
from resnest_imagenet.training.health import Health
from resnest_imagenet.training.log import RunLog
from resnest_imagenet.training.loop import train_epoch
from resnest_imagenet.training.memory import require_memory
from resnest_imagenet.training.run_folder import RunFolder
from resnest_imagenet.training.saving import Saver, describe_circumstances, describe_identity
from resnest_imagenet.training.schedule import StepPlan, count_accumulation, dropblock_probability, plan_steps
from resnest_imagenet.training.state import TrainingState
from resnest_imagenet.training.stopping import StopRequest
from resnest_imagenet.training.trace import Trace
from resnest_imagenet.training.trackers import require_trackers
from resnest_imagenet.weights.load import read_weights, start_from


def train(config: TrainConfig) -> TrainingState:
    """Train, or resume from the run folder's newest checkpoint; return the final state.

    Raises:
        UserError: for what a user can cause, as one line.
        Stopped: after a signal, with a checkpoint.
    """
    rank, _, _ = distributed.launched_as()
    run = RunFolder(config.run_dir, config.checkpoint.keep, is_main=rank == 0)
    with StopRequest(speaks=rank == 0) as request, run.opened(), ExitStack() as stack:
        # 1. What can be refused before any data is touched.
        # 2. The data, and with it the steps and the width of the classifier: both in `prepare`.
        config, device, train_set, val_set, plan = prepare(config)
        # 3. The other ranks. The trackers are closed after these have parted: closing may wait for a server.
        trackers = stack.enter_context(ExitStack())
        trace = stack.enter_context(Trace(run.path))
        ranks = stack.enter_context(distributed.join(device, config.timeout_seconds))
        trace.begin(plan_batches(config, train_set, plan, ranks))
        request.before_leaving = trace.close
        on_abort = trace.closing_after(run.write_end)
        watch = stack.enter_context(supervise(ranks, config.timeout_seconds, on_abort, trace.note))
        # 4. The loaders: this rank's share of both sets.
        train_loader = build_train_loader(config, train_set, plan, ranks)
        eval_transform = EvalTransform(config.eval.crop, **config.protocol.model_dump())
        eval_plan = plan_evaluation(len(val_set), config.train.batch_size, ranks.rank, ranks.world_size)
        eval_loader = build_loader(
            config.loader.name, val_set, eval_plan, eval_transform, ranks.device, config.loader.workers
        )
        # 5. The model, the same on every rank, and all that changes with it: new, or as the newest checkpoint has it.
        tick = partial(watch.then, STARTING)
        saver = Saver(
            run,
            ranks,
            identity=describe_identity(config, plan, train_set, val_set, eval_transform.protocol, ranks, tick),
            circumstances=describe_circumstances(config, ranks),
            description={"config": config.model_dump(), "classes": list(train_set.classes)},
        )
        saved = saver.find(config.checkpoint.on_mismatch)
        state = _build_state(config, train_set, ranks, is_new=saved is None)
        if saved is not None:
            if saver.restore(state, train_loader, saved):
                return state
            del saved  # as large as the state
        run.begin(config.model_dump(), ranks, state.step or None)
        trace.report_last_attempt(train_set, val_set)
        dropblock = DropBlock(state.model) if config.train.dropblock > 0 else None
        network = _wrap(state.model, config.train, ranks)
        # 6. The epochs, to the end or to a signal.
        with (
            RunLog(run.path, plan, config, state, ranks.is_main, trackers) as log,
            Health(state, config.train) as health,
        ):
            control = Control(ranks, watch, request, health, log, saver, config.checkpoint.every_steps)
            request.wait_for_step()
            try:
                while state.epoch < config.train.epochs:
                    if dropblock:
                        dropblock.set_probability(dropblock_probability(config.train, state.epoch))
                    train_epoch(state, network, train_loader, plan, config.train, config.seed, control)
                    _end_epoch(state, config, train_loader, eval_loader, val_set, eval_transform, control)
            except StopAgreed:
                request.agree()
                control.save(state, train_loader)
                distributed.gather(0, ranks)  # none leaves before the checkpoint is written
                raise Stopped(f"stopped after step {state.step}; the same command resumes the run") from None
            except LoadingError:
                # Other ranks wait for this one elsewhere: together they cannot save, and the last checkpoint stands.
                if state.step > 0 and ranks.world_size == 1:
                    control.save(state, train_loader)
                raise
        run.write_status("finished", exit_code=0, epoch=state.epoch, step=state.step, best_top1=state.best_top1)
    return state


def _end_epoch(
    state: TrainingState,
    config: TrainConfig,
    train_loader: Loader,
    eval_loader: Loader,
    val_set: ImageSource,
    eval_transform: EvalTransform,
    control: Control,
) -> None:
    """Evaluate after an epoch's steps, report and save."""
    distributed.broadcast_buffers(state.evaluated_model)
    pause = partial(control.before_eval_batch, state.epoch, len(train_loader.plan))
    folded = fold_batch_norms(state.evaluated_model)
    evaluation = evaluate(folded, eval_loader, control.ranks, config.train.precision, pause, val_set.name)
    state.epoch += 1
    control.log.evaluation(state, evaluation, val_set, eval_transform)
    is_best = evaluation.top1 > state.best_top1
    state.best_top1 = max(state.best_top1, evaluation.top1)
    control.save(state, train_loader, is_best)


def prepare(config: TrainConfig) -> tuple[TrainConfig, torch.device, ImageSource, ImageSource, StepPlan]:
    """Check what can be refused before any data is touched, then list the data; nothing is written.

    Returns:
        The configuration with the number of classes, this rank's device, the training and the val images, the steps.
    """
    rank, _, world_size = distributed.launched_as()
    require_model(config.model.name)
    require_batch(config.model.name, config.train.batch_size, config.train.crop)
    choose_loader(config.loader.name)
    require_trackers(config.log.trackers)
    count_accumulation(config.train, world_size)
    device = distributed.choose_device(config.device)
    train_set, val_set = _open_data(config.data)
    if rank == 0:
        print_notes(train_set, val_set)
    config = _fix_num_classes(config, train_set)
    require_memory(config, device)
    return config, device, train_set, val_set, plan_steps(len(train_set), config.train, world_size)


def _open_data(data: DataOptions) -> tuple[ImageSource, ImageSource]:
    """List the images of both parts."""
    train_set = open_source(data.kind, data.root, data.train_dir, "data.train_dir")
    val_set = open_source(data.kind, data.root, data.val_dir, "data.val_dir")
    require_separate(train_set.root, val_set.root)
    require_same_classes(train_set, val_set)
    return train_set, val_set


def _fix_num_classes(config: TrainConfig, train_set: ImageSource) -> TrainConfig:
    """Set the classifier's width to the number of class folders."""
    found = len(train_set.classes)
    if config.model.num_classes not in (None, found):
        raise ConfigError(f"model.num_classes={config.model.num_classes}, but {train_set.root} has {found} classes")
    return config.model_copy(update={"model": config.model.model_copy(update={"num_classes": found})})


def build_train_loader(config: TrainConfig, train_set: ImageSource, plan: StepPlan, ranks: Ranks) -> Loader:
    """Make this rank's share of the training set."""
    batches = plan_batches(config, train_set, plan, ranks)
    transform = build_train_transform(config.train, config.seed)
    max_errors = config.data.max_errors if config.data.on_error == "substitute" else 0
    loader = config.loader
    return build_loader(loader.name, train_set, batches, transform, ranks.device, loader.workers, max_errors)


def plan_batches(config: TrainConfig, train_set: ImageSource, plan: StepPlan, ranks: Ranks) -> BatchPlan:
    """Plan this rank's batches of an epoch of training."""
    return BatchPlan(
        num_samples=len(train_set),
        batch_size=config.train.batch_size,
        num_batches=plan.steps_per_epoch * plan.accumulation * ranks.world_size,
        rank=ranks.rank,
        world_size=ranks.world_size,
        shuffle=True,
        seed=config.seed,
        shard_sizes=train_set.shard_sizes,
        shuffle_shards=config.data.shuffle_shards or 0,
    )


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
    keep_freed_memory()
    torch.manual_seed(config.seed)
    classes = list(train_set.classes)
    model = build_model(
        config.model.name,
        len(classes),
        recipe.dropout,
        recipe.zero_gamma,
        init=recipe.init,
        split_attention=config.model.split_attention,
    )
    if is_new and recipe.init_from is not None:
        weights = read_weights(recipe.init_from)
        weights = replace(weights, classes=name_outputs(classes, weights.classes, len(classes)))
        same_classes = start_from(model, config.model.name, classes, weights)
        if ranks.is_main:
            head = "its classifier too" if same_classes else f"with a new classifier of {len(classes)} classes"
            print(f"starting from {recipe.init_from}, {head}", flush=True)
    return TrainingState(place(model, ranks.device), recipe)


def _wrap(model: nn.Module, recipe: RecipeOptions, ranks: Ranks) -> nn.Module:
    """Make the module that is called in training; the model's own keys stay what they are."""
    network = model
    if distributed.has_joined():
        devices = [ranks.device] if ranks.device.type == "cuda" else None
        # BN statistics are used in evaluation only, which takes rank 0's. torch 2.13 has another name for it.
        parameters = inspect.signature(DistributedDataParallel).parameters
        sync = "forward_sync_buffers" if "forward_sync_buffers" in parameters else "broadcast_buffers"
        options: dict[str, Any] = {"gradient_as_bucket_view": True, sync: False}
        network = DistributedDataParallel(model, device_ids=devices, **options)
    started = time.perf_counter()
    if recipe.compile:
        network.compile()
    if recipe.compile or distributed.has_joined():
        _pass_nothing_through(network, recipe, ranks)
    if recipe.compile and ranks.is_main:
        print(f"compiled in {time.perf_counter() - started:.0f} s", flush=True)
    return network


def _pass_nothing_through(network: nn.Module, recipe: RecipeOptions, ranks: Ranks) -> None:
    """Pass a batch of nothing through, and leave no trace of it: what is compiled is compiled then.

    The batch is as the loaders' are, channels_last too: for another the network would be compiled a second time. After
    its first backward pass DistributedDataParallel packs the gradients in another order, and from three ranks on the
    order in which they are added depends on their place in a bucket. So that the first step after a resumption is like
    any other, no step is the first.
    """
    before = [buffer.clone() for buffer in network.buffers()]
    nothing = torch.zeros(recipe.batch_size, 3, recipe.crop, recipe.crop, device=ranks.device)
    with autocast(ranks.device, recipe.precision):
        network(nothing.to(memory_format=torch.channels_last)).sum().backward()
    network.zero_grad(set_to_none=True)
    for buffer, value in zip(network.buffers(), before, strict=True):
        buffer.copy_(value)
