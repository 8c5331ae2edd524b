"""The steps of a run: their number, size and learning rate."""

import math
from bisect import bisect_right
from dataclasses import dataclass

from resnest_imagenet.errors import ConfigError, DataError
from resnest_imagenet.recipe import Recipe


@dataclass(frozen=True)
class StepPlan:
    """The steps of a run.

    Attributes:
        global_batch: images per step: batch_size * world_size * accumulation.
        accumulation: forward passes per step on each rank.
        steps_per_epoch: whole steps; the remaining images of an epoch's order are not seen in that epoch.
        total_steps: of the run.
        warmup_steps: the first steps, with a rising learning rate.
        warmup_start: the learning rate of the first step, as a share of the peak.
        peak_lr: learning rate at the end of the warm-up.
        reductions: steps at which the rate is multiplied by `factor` once more; None for a curve.
        factor: of one reduction.
        power: of a polynomial; None for half a cosine, or reductions.
    """

    global_batch: int
    accumulation: int
    steps_per_epoch: int
    total_steps: int
    warmup_steps: int
    warmup_start: float
    peak_lr: float
    reductions: tuple[int, ...] | None
    factor: float
    power: float | None

    @property
    def epochs(self) -> int:
        """Number of epochs of the run; the last one may be shorter."""
        return -(-self.total_steps // self.steps_per_epoch)

    def end_of_epoch(self, epoch: int) -> int:
        """Return how many steps of the run are done when an epoch, counted from 0, ends."""
        return min((epoch + 1) * self.steps_per_epoch, self.total_steps)

    def find_epoch(self, step: int, epoch: int) -> int:
        """Return the epoch in which a run resumes.

        In an extended run, the earlier last epoch may have been shorter than it is now.

        Args:
            step: steps done.
            epoch: epochs done.
        """
        return min(epoch, step // self.steps_per_epoch) if step < self.total_steps else epoch

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0 over the run.

        During the warm-up it rises linearly from `warmup_start` of the peak (Goyal et al. 2017, section 2.2). Then it
        is constant between the reductions, which are counted from the start of the run (He et al. 2016, section 3.4).
        Or it follows a curve from the end of the warm-up: half a cosine (Loshchilov & Hutter 2017, without restarts) or
        a polynomial ("poly", Chen et al. 2017, arXiv 1606.00915, section 4.1), which would reach 0 at step
        `total_steps`.
        """
        if step < self.warmup_steps:
            first = self.peak_lr * self.warmup_start
            return first + (self.peak_lr - first) * step / self.warmup_steps
        if self.reductions is not None:
            return self.peak_lr * self.factor ** bisect_right(self.reductions, step)
        progress = (step - self.warmup_steps) / (self.total_steps - self.warmup_steps)
        if self.power is not None:
            return self.peak_lr * (1 - progress) ** self.power
        return self.peak_lr * 0.5 * (1 + math.cos(math.pi * progress))


def count_accumulation(recipe: Recipe, world_size: int) -> int:
    """Return how many batches each rank accumulates to reach the global batch.

    Raises:
        ConfigError: the numbers do not divide.
    """
    per_pass = recipe.batch_size * world_size
    global_batch = recipe.global_batch or per_pass
    if global_batch % per_pass:
        raise ConfigError(
            f"train.global_batch={global_batch} is not a multiple of "
            f"train.batch_size={recipe.batch_size} x {world_size} ranks = {per_pass}"
        )
    return global_batch // per_pass


def plan_steps(num_samples: int, recipe: Recipe, world_size: int) -> StepPlan:
    """Return the steps of a run over a training set of `num_samples` images.

    Raises:
        ConfigError: batch size, ranks and global batch do not divide, or the warm-up is too long.
        DataError: the set is smaller than one step.
    """
    accumulation = count_accumulation(recipe, world_size)
    global_batch = recipe.batch_size * world_size * accumulation
    steps = num_samples // global_batch
    if steps == 0:
        option = "train.batch_size" if recipe.global_batch is None else "train.global_batch"
        raise DataError(f"{num_samples} training images do not fill a step of {global_batch}: lower {option}")
    total_steps = recipe.steps or steps * (recipe.epochs or 0)
    reductions = _place_reductions(recipe, steps, total_steps)
    return StepPlan(
        global_batch=global_batch,
        accumulation=accumulation,
        steps_per_epoch=steps,
        total_steps=total_steps,
        warmup_steps=_count_warmup(recipe, steps, reductions, total_steps),
        warmup_start=recipe.warmup_start,
        peak_lr=recipe.lr * global_batch / recipe.reference_batch,
        reductions=reductions,
        factor=recipe.step_factor,
        power=recipe.poly_power if recipe.schedule == "poly" else None,
    )


def _place_reductions(recipe: Recipe, steps_per_epoch: int, total_steps: int) -> tuple[int, ...] | None:
    """Return the steps at which the learning rate falls; None if it follows a curve."""
    if recipe.schedule == "step":
        distance = (recipe.step_epochs or 0) * steps_per_epoch
        return tuple(range(distance, total_steps, distance))
    if recipe.schedule == "milestones":
        unit = steps_per_epoch if recipe.steps is None else 1
        return tuple(milestone * unit for milestone in recipe.milestones or [])
    return None


def _count_warmup(recipe: Recipe, steps_per_epoch: int, reductions: tuple[int, ...] | None, total_steps: int) -> int:
    """Return the steps of the warm-up, and check them: a recipe alone cannot compare epochs with steps."""
    option = "warmup_epochs" if recipe.warmup_steps is None else "warmup_steps"
    steps = recipe.warmup_steps
    if steps is None:
        steps = round((recipe.warmup_epochs or 0) * steps_per_epoch)
    if steps >= total_steps:
        raise ConfigError(
            f"train.{option}={getattr(recipe, option)} must be less than the {total_steps} steps of the run"
        )
    if reductions and steps >= reductions[0]:
        change = "train.step_epochs" if recipe.schedule == "step" else "train.milestones"
        raise ConfigError(
            f"train.{option}={getattr(recipe, option)} must end before the first of {change}, at step {reductions[0]}"
        )
    return steps
