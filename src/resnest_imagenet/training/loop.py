"""One epoch of a run: its steps and its evaluation."""

import itertools
import math
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from resnest_imagenet.data.loader import Loader
from resnest_imagenet.distributed import broadcast_buffers
from resnest_imagenet.errors import LoadingError, NonFiniteError, StorageError
from resnest_imagenet.randomness import Draws
from resnest_imagenet.recipe import Recipe
from resnest_imagenet.supervision import AGREEING, BACKWARD, FORWARD, LOADING
from resnest_imagenet.tasks.task import Evaluate, Task
from resnest_imagenet.training.control import Control, StopAgreed
from resnest_imagenet.training.log import Report
from resnest_imagenet.training.losses import TOTAL, divide_loss
from resnest_imagenet.training.optimizer import clip_gradients, take_step
from resnest_imagenet.training.schedule import StepPlan
from resnest_imagenet.training.state import TrainingState


def train_epoch(
    state: TrainingState, network: nn.Module, task: Task, loader: Loader, plan: StepPlan, control: Control
) -> None:
    """Take the remaining steps of the epoch; `state` is updated.

    Args:
        state: the state of the training.
        network: `state.model`, wrapped for this run: distributed, compiled.
        task: of the run.
        loader: this rank's training batches, `plan.accumulation` for each step.
        plan: the steps.
        control: everything around the steps.

    Raises:
        NonFiniteError: a loss or gradient of any rank is not finite. It is raised on all ranks, no rank applies the
            step, and it may come at the end of the next step.
        StopAgreed: after the step in which a rank was asked to stop, or the next; on all ranks after the same one.
        LoadingError: on this rank, after a whole step; in the middle of a step it is a StorageError.
    """
    ranks, log, watch = control.ranks, control.log, control.watch
    network.train()
    log.start_epoch(state)
    control.health.start_step()  # an evaluation may have changed the buffers that a skipped step restores
    clock = _Clock()
    start = (state.step - state.epoch * plan.steps_per_epoch) * plan.accumulation
    watch.at(state.epoch, start, LOADING)
    for index, batch in enumerate(clock.timing(_load_steps(loader, plan, state, start)), start):
        watch.at(state.epoch, index, FORWARD)
        # The batch's number over all ranks: the draws of a batch depend on nothing else.
        draws = Draws(task.config.seed, state.epoch, index * ranks.world_size + ranks.rank)
        ends_step = (index + 1) % plan.accumulation == 0
        if log.wants_samples:
            log.samples(state, task.show(batch, draws))
        with nullcontext() if ends_step else _keep_gradients_local(network):
            draws.seed_torch()
            losses = divide_loss(task.loss(network, batch, draws), plan.accumulation)
            watch.then(BACKWARD)
            state.scaler.scale(losses[TOTAL]).backward()
        state.losses.add(losses)
        if ends_step:
            _end_step(state, task, loader, plan, control, clock)
        watch.at(state.epoch, index + 1, LOADING)


def _end_step(
    state: TrainingState, task: Task, loader: Loader, plan: StepPlan, control: Control, clock: "_Clock"
) -> None:
    """Apply a step unless the ranks agree to skip it; report, save or stop if that is due."""
    health, log = control.health, control.log
    control.watch.then(AGREEING)
    lr = plan.learning_rate(state.step)
    skips = health.judge(lr, control.request.name is not None, control.ranks)
    _apply_gradients(state, task.config.train, lr, skips)
    state.step += 1
    clock.count_step()
    # Read the verdict on the previous step: by now a GPU has finished it, so the host does not wait. Read this step's
    # only before a report or a checkpoint.
    is_needed = log.is_due(state) or control.is_save_due(state)
    stops = control.read_verdicts(unread=0 if is_needed else 1)
    if log.is_due(state) and state.losses.num_steps:
        log.training(state, lr, Report(state.losses.read(control.ranks), *clock.read()))
    log.advance()
    health.start_step()
    if stops:
        raise StopAgreed
    if control.is_save_due(state):
        control.save(state, loader)


def end_epoch(
    state: TrainingState, task: Task, loader: Loader, plan: StepPlan, evaluate: Evaluate, control: Control
) -> None:
    """Evaluate after an epoch's steps if that is due, report and save; arguments as in `train_epoch`.

    Raises:
        NonFiniteError: the metric is not finite; on all ranks.
        StopAgreed: in the middle of the evaluation, which is repeated when the run is resumed; on all ranks.
    """
    epoch, is_best = state.epoch + 1, False
    if epoch % task.config.eval.every_epochs == 0 or epoch == plan.epochs:
        broadcast_buffers(state.evaluated_model)
        score = evaluate(state.evaluated_model, partial(control.before_eval_batch, state.epoch, len(loader.plan)))
        value = float(score.values[task.metric])  # a plain number, for checkpoints
        if not math.isfinite(value):
            raise NonFiniteError(f"{task.metric}={value} after epoch {epoch}: the evaluation is not finite")
        is_best = state.end_epoch(value)
        control.log.evaluation(state, score, is_best)
    else:
        state.end_epoch(None)
        control.log.epoch(state)
    control.save(state, loader, is_best)


def _load_steps(loader: Loader, plan: StepPlan, state: TrainingState, start: int) -> Iterator[Any]:
    """Yield this rank's batches for the remaining steps of an epoch, from its `start`-th batch.

    A LoadingError in the middle of a step becomes a StorageError: BN statistics have changed, so the state cannot be
    saved.
    """
    is_shorter = plan.end_of_epoch(state.epoch) < (state.epoch + 1) * plan.steps_per_epoch
    num_batches = (plan.total_steps - state.step) * plan.accumulation if is_shorter else None
    batches = itertools.islice(loader.batches(state.epoch, start), num_batches)
    for number in itertools.count():
        try:
            batch = next(batches)
        except StopIteration:
            return
        except LoadingError as error:
            if number % plan.accumulation:
                raise StorageError(str(error)) from error
            raise
        yield batch


def _apply_gradients(state: TrainingState, recipe: Recipe, lr: float, skips: Tensor) -> None:
    """Take one optimiser step, unless `skips`, a scalar on the device, is 1; fp16's scale is updated in both cases."""
    clip_gradients(state.optimizer, recipe)
    take_step(state.optimizer, lr, skips)
    state.scaler.update()
    if state.ema is not None:
        state.ema.update(skips == 0)


def _keep_gradients_local(network: nn.Module) -> AbstractContextManager[None]:
    """Reduce the gradients over the ranks only in the last batch of a step."""
    return network.no_sync() if isinstance(network, DistributedDataParallel) else nullcontext()


class _Clock:
    """Steps and times since the last report."""

    def __init__(self) -> None:
        self._restart()

    def _restart(self) -> None:
        self._steps = 0
        self._waited = 0.0
        self._started = time.perf_counter()

    def timing(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Yield the batches and sum the time spent waiting for them."""
        iterator = iter(batches)
        while True:
            before = time.perf_counter()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            finally:
                self._waited += time.perf_counter() - before
            yield batch

    def count_step(self) -> None:
        """Count an optimiser step."""
        self._steps += 1

    def read(self) -> tuple[int, float, float]:
        """Return the steps, their seconds and the seconds of waiting for data; then restart."""
        read = self._steps, time.perf_counter() - self._started, self._waited
        self._restart()
        return read
