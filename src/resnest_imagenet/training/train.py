"""A run, from its configuration to its checkpoints, in the order of its life."""

import inspect
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from resnest_imagenet import distributed
from resnest_imagenet.compute import keep_freed_memory
from resnest_imagenet.config import TrainConfig
from resnest_imagenet.data.loader import Loader
from resnest_imagenet.distributed import Ranks
from resnest_imagenet.errors import LoadingError, Stopped
from resnest_imagenet.randomness import Draws
from resnest_imagenet.supervision import STARTING, supervise
from resnest_imagenet.tasks.task import Evaluate, Task, open_task
from resnest_imagenet.training.control import Control, StopAgreed
from resnest_imagenet.training.health import Health
from resnest_imagenet.training.log import RunLog
from resnest_imagenet.training.loop import train_epoch
from resnest_imagenet.training.memory import require_memory
from resnest_imagenet.training.run_folder import RunFolder
from resnest_imagenet.training.saving import Saver
from resnest_imagenet.training.schedule import StepPlan, count_accumulation, plan_steps
from resnest_imagenet.training.state import TrainingState
from resnest_imagenet.training.stopping import StopRequest
from resnest_imagenet.training.trace import Trace
from resnest_imagenet.training.trackers import require_trackers


def train(config: TrainConfig) -> TrainingState:
    """Train, or resume from the run folder's newest checkpoint; return the final state.

    Raises:
        UserError: for what a user can cause, as one line.
        Stopped: after a signal, with a checkpoint.
    """
    is_main = distributed.launched_as().rank == 0
    run = RunFolder(config.run_dir, config.checkpoint.keep, is_main)
    with StopRequest(speaks=is_main) as request, run.opened(), ExitStack() as stack:
        # 1. What can be refused before the ranks meet: options, then data.
        task, plan, device = prepare(config)
        config, recipe = task.config, task.config.train
        # 2. The other ranks. The trackers are closed after these have parted: closing may wait for a server.
        trackers = stack.enter_context(ExitStack())
        trace = stack.enter_context(Trace(run.path))
        ranks = stack.enter_context(distributed.join(device, config.timeout_seconds))
        batches = task.plan_batches(plan.steps_per_epoch * plan.accumulation * ranks.world_size, ranks)
        trace.begin(batches)
        request.before_leaving = trace.close
        watch = stack.enter_context(
            supervise(ranks, config.timeout_seconds, trace.closing_after(run.write_end), trace.note)
        )
        # 3. The data: this rank's share of both sets.
        loader = task.build_loader(batches, ranks)
        evaluate = task.build_evaluation(ranks)
        # 4. The network, the same on every rank, and all that changes with it: new, or from the newest checkpoint.
        keep_freed_memory()
        saver = Saver.of(run, ranks, task, plan, tick=partial(watch.then, STARTING))
        saved = saver.find(config.checkpoint.on_mismatch)
        state = TrainingState(task.build_model(saved is None, device), recipe, task.head)
        if saved is not None:
            if saver.restore(state, loader, saved):
                return state
            del saved  # as large as the state
        run.begin(config.model_dump(), ranks, state.step or None)
        trace.report_last_attempt(task.train_set, task.val_set)
        network = _wrap(state.model, task, ranks)
        # 5. The epochs, to the end or to a signal.
        with RunLog(run.path, plan, task, state, is_main, trackers) as log, Health(state, recipe.max_skipped_steps) as health:
            control = Control(ranks, watch, request, health, log, saver, config.checkpoint.every_steps)
            request.wait_for_step()
            with _saving_before_leaving(state, loader, control):
                while state.epoch < plan.epochs:
                    train_epoch(state, network, task, loader, plan, control)
                    _end_epoch(state, task, loader, plan, evaluate, control)
        run.write_status(
            "finished", exit_code=0, epoch=state.epoch, step=state.step, metric=task.metric, best=state.best
        )
    return state


def prepare(config: TrainConfig) -> tuple[Task, StepPlan, torch.device]:
    """Refuse what can be refused before the ranks meet: options first, then the data; nothing is written.

    Returns:
        The task, the steps of the run, and this rank's device.
    """
    world_size = distributed.launched_as().world_size
    require_trackers(config.log.trackers)
    count_accumulation(config.train, world_size)
    device = distributed.choose_device(config.device)
    task = open_task(config)
    require_memory(task, device)
    return task, plan_steps(len(task.train_set), config.train, world_size), device


@contextmanager
def _saving_before_leaving(state: TrainingState, loader: Loader, control: Control) -> Iterator[None]:
    """Save where the ranks agree to stop, or where the storage does not return this rank's images, and leave."""
    try:
        yield
    except StopAgreed:
        control.request.agree()
        control.save(state, loader)
        distributed.barrier(control.ranks)  # none leaves before the checkpoint is written
        raise Stopped(f"stopped after step {state.step}; the same command resumes the run") from None
    except LoadingError:
        # Other ranks wait for this one elsewhere: together they cannot save, and the last checkpoint stands.
        if state.step > 0 and control.ranks.world_size == 1:
            control.save(state, loader)
        raise


def _end_epoch(
    state: TrainingState, task: Task, loader: Loader, plan: StepPlan, evaluate: Evaluate, control: Control
) -> None:
    """Evaluate after an epoch's steps where that is due, report and save."""
    epoch, is_best = state.epoch + 1, False
    if epoch % task.config.eval.every_epochs == 0 or epoch == plan.epochs:
        distributed.broadcast_buffers(state.evaluated_model)
        pause = partial(control.before_eval_batch, state.epoch, len(loader.plan))
        score = evaluate(state.evaluated_model, pause)
        is_best = state.end_epoch(score.values[task.metric])
        control.log.evaluation(state, score, is_best)
    else:
        state.end_epoch(None)
    control.save(state, loader, is_best)


def _wrap(model: nn.Module, task: Task, ranks: Ranks) -> nn.Module:
    """Make the module that is called in training; the model's own keys stay what they are."""
    network, compiles = model, task.config.train.compile
    if distributed.has_joined():
        devices = [ranks.device] if ranks.device.type == "cuda" else None
        # BN statistics are used in evaluation only, which takes rank 0's. torch 2.13 has another name for it.
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
    """Run one blank batch forward and backward, and undo its effects: what is compiled is compiled then.

    After its first backward pass DistributedDataParallel packs the gradients in another order, and from three ranks on
    the order in which they are added depends on their place in a bucket. So that the first step after a resumption is
    like any other, no step is the first.
    """
    before = [buffer.clone() for buffer in network.buffers()]
    losses = task.loss(network, task.blank_batch(device), Draws(task.config.seed, 0, 0))
    torch.stack(list(losses.values())).sum().backward()
    network.zero_grad(set_to_none=True)
    for buffer, value in zip(network.buffers(), before, strict=True):
        buffer.copy_(value)
