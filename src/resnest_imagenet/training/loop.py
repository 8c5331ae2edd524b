"""One epoch of training."""

import itertools
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from resnest_imagenet.compute import autocast
from resnest_imagenet.config import Recipe
from resnest_imagenet.data.loader import Loader
from resnest_imagenet.distributed import Ranks, sum_over_ranks
from resnest_imagenet.errors import LoadingError, StorageError
from resnest_imagenet.randomness import Purpose, stream
from resnest_imagenet.supervision import AGREEING, BACKWARD, FORWARD, LOADING
from resnest_imagenet.tasks.mixing import (
    Mixing,
    draw_cutmix,
    draw_mixup,
    erase_rectangles,
    one_hot,
    smoothed_cross_entropy,
)
from resnest_imagenet.training.control import Control, StopAgreed
from resnest_imagenet.training.log import Report
from resnest_imagenet.training.optimizer import clip_gradients, take_step
from resnest_imagenet.training.schedule import StepPlan
from resnest_imagenet.training.state import TrainingState

Batch = tuple[Tensor, Tensor]


def train_epoch(
    state: TrainingState,
    network: nn.Module,
    loader: Loader,
    plan: StepPlan,
    recipe: Recipe,
    seed: int,
    control: Control,
) -> None:
    """Take the remaining steps of the epoch; `state` moves along.

    Args:
        state: what is trained.
        network: `state.model`, wrapped for this run: distributed, compiled.
        loader: this rank's training batches, `plan.accumulation` for each step.
        plan: the steps.
        recipe: how to train.
        seed: of mixing, dropout and DropBlock.
        control: what surrounds the steps.

    Raises:
        NonFiniteError: a loss or gradient of any rank; on all ranks, and the step is applied nowhere. At the end of the
            next step, where nothing is reported or saved before.
        StopAgreed: after the step in which a rank was asked, or after the next; on all ranks after the same one.
        LoadingError: on this rank, after a whole step; in the middle of one it is a StorageError.
    """
    ranks, health, log = control.ranks, control.health, control.log
    network.train()
    log.start_epoch(state)
    clock = _Clock()
    start = (state.step - state.epoch * plan.steps_per_epoch) * plan.accumulation
    batches = clock.timing(_mark_steps(loader.batches(state.epoch, start), plan.accumulation))
    control.watch.at(state.epoch, start, LOADING)
    for index, (images, labels) in enumerate(batches, start):
        control.watch.at(state.epoch, index, FORWARD)
        # The number of the batch over all ranks: what is drawn for it depends on nothing else.
        number = index * ranks.world_size + ranks.rank
        ends_step = (index + 1) % plan.accumulation == 0
        if log.wants_samples:
            log.samples(state, erase_and_mix(images.clone(), recipe, seed, state.epoch, number)[0])
        with nullcontext() if ends_step else _keep_gradients_local(network):
            loss = compute_loss(network, images, labels, recipe, seed, state.epoch, number) / plan.accumulation
            control.watch.then(BACKWARD)
            state.scaler.scale(loss).backward()
        health.add_loss(loss.detach())
        if ends_step:
            control.watch.then(AGREEING)
            lr = plan.learning_rate(state.step)
            left_out = health.judge(lr, control.request.name is not None, ranks)
            clip_gradients(state.optimizer, recipe)
            _apply_gradients(state, lr, left_out)
            state.step += 1
            clock.count_step()
            # The host waits for the step before this one, with which a GPU is done when this one has come to it, and
            # for this one only where it is about to be reported or saved.
            waits = log.is_due(state) or control.is_save_due(state)
            stops = control.settle(leave=0 if waits else 1)
            if log.is_due(state) and state.steps_summed:
                log.training(state, lr, _report(state, clock, ranks))
            log.advance()
            health.start_step()
            if stops:
                raise StopAgreed
            if control.is_save_due(state):
                control.save(state, loader)
        control.watch.at(state.epoch, index + 1, LOADING)


def _mark_steps(batches: Iterable[Batch], accumulation: int) -> Iterator[Batch]:
    """Pass the batches of whole steps on; a LoadingError in the middle of a step is a plain StorageError."""
    iterator = iter(batches)
    for number in itertools.count():
        try:
            batch = next(iterator)
        except StopIteration:
            return
        except LoadingError as error:
            if number % accumulation:  # BN statistics have moved: nothing there is whole, and could be saved
                raise StorageError(str(error)) from error
            raise
        yield batch


def compute_loss(
    network: nn.Module, images: Tensor, labels: Tensor, recipe: Recipe, seed: int, epoch: int, number: int
) -> Tensor:
    """Return the loss of one batch: mixed, forwarded under autocast, against smoothed targets.

    Args:
        network: maps (B, 3, H, W) to logits (B, K).
        images: (B, 3, H, W), normalised; may be changed in place.
        labels: int64 (B,).
        recipe: how to train.
        seed: the run's; with the next two it determines mixing, dropout and DropBlock.
        epoch: counted from 0.
        number: of the batch in the epoch, over all ranks.
    """
    images, mixing = erase_and_mix(images, recipe, seed, epoch, number)
    torch.manual_seed(int(stream(seed, Purpose.MODEL, epoch, number).integers(2**63)))
    with autocast(images.device, recipe.precision):
        logits = network(images)
    targets = labels if mixing is None else mixing.mix_targets(one_hot(labels, logits.shape[1]))
    return smoothed_cross_entropy(logits, targets, recipe.label_smoothing)


def erase_and_mix(images: Tensor, recipe: Recipe, seed: int, epoch: int, number: int) -> tuple[Tensor, Mixing | None]:
    """Return what the network sees of a batch, and what was mixed; see `compute_loss`."""
    if recipe.erasing > 0:
        erase_rectangles(images, recipe.erasing, stream(seed, Purpose.ERASING, epoch, number))
    mixing = _draw_mixing(recipe, images, stream(seed, Purpose.MIXING, epoch, number))
    return images if mixing is None else mixing.mix_images(images), mixing


def _draw_mixing(recipe: Recipe, images: Tensor, rng: np.random.Generator) -> Mixing | None:
    """Draw mixup or CutMix; where a recipe has both, either with probability 1/2."""
    mixup, cutmix = recipe.mixup_alpha > 0, recipe.cutmix_alpha > 0
    if mixup and cutmix:
        mixup = rng.random() < 0.5
    batch, size = len(images), images.shape[-1]
    if mixup:
        kind = (recipe.mixup_alpha, recipe.mixup_per_sample, recipe.mixup_partner)
        return draw_mixup(*kind, batch, rng, images.device)
    if cutmix:
        return draw_cutmix(recipe.cutmix_alpha, recipe.mixup_partner, batch, size, rng, images.device)
    return None


def _apply_gradients(state: TrainingState, lr: float, left_out: Tensor) -> None:
    """Take one optimiser step, unless `left_out`, a scalar on the device, is 1; fp16's scale moves either way."""
    take_step(state.optimizer, lr, left_out)
    state.scaler.update()
    if state.ema is not None:
        state.ema.update(left_out == 0)


def _keep_gradients_local(network: nn.Module) -> AbstractContextManager[None]:
    """Leave the reduction over ranks to the last batch of a step."""
    return network.no_sync() if isinstance(network, DistributedDataParallel) else nullcontext()


def _report(state: TrainingState, clock: "_Clock", ranks: Ranks) -> Report:
    """Return the means over the steps and ranks since the last report, and start anew."""
    loss = float(sum_over_ranks(state.loss_sum)) / (state.steps_summed * ranks.world_size)
    state.loss_sum.zero_()
    state.steps_summed = 0
    return Report(loss, *clock.read())


class _Clock:
    """Steps and times since the last report."""

    def __init__(self) -> None:
        self._restart()

    def _restart(self) -> None:
        self._steps = 0
        self._waited = 0.0
        self._started = time.perf_counter()

    def timing(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Pass the batches on and sum the time spent waiting for them."""
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
        """Return the steps, the seconds they took and those spent waiting for data, and start anew."""
        read = self._steps, time.perf_counter() - self._started, self._waited
        self._restart()
        return read
