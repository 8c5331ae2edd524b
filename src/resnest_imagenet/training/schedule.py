"""How many steps, of how many images, at which learning rate."""

import math
from dataclasses import dataclass

from resnest_imagenet.config import RecipeOptions
from resnest_imagenet.errors import ConfigError, DataError


@dataclass(frozen=True)
class StepPlan:
    """The steps of a run.

    Attributes:
        global_batch: images per step: batch_size * world_size * accumulation.
        accumulation: forward passes per step on each rank.
        steps_per_epoch: whole steps; what is left of an epoch's order is not seen in that epoch.
        total_steps: of the run.
        warmup_steps: of them, with a rising learning rate.
        peak_lr: learning rate at the end of the warm-up.
        decay_steps: for a step schedule, steps between two reductions; None: half a cosine.
        decay_factor: of one reduction.
    """

    global_batch: int
    accumulation: int
    steps_per_epoch: int
    total_steps: int
    warmup_steps: int
    peak_lr: float
    decay_steps: int | None
    decay_factor: float

    @property
    def epochs(self) -> int:
        """Of the run; the last one may be shorter."""
        return -(-self.total_steps // self.steps_per_epoch)

    def end_of_epoch(self, epoch: int) -> int:
        """Return how many steps of the run are done when an epoch, counted from 0, ends."""
        return min((epoch + 1) * self.steps_per_epoch, self.total_steps)

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0 over the run.

        Linear from 0 over the warm-up (Goyal et al. 2017, section 2.2), then half a cosine that would reach 0 at step
        `total_steps` (Loshchilov & Hutter 2017, without restarts), both per step; or constant between the reductions
        of a step schedule, which are counted from the start of the run (He et al. 2016, section 3.4).
        """
        if step < self.warmup_steps:
            return self.peak_lr * step / self.warmup_steps
        if self.decay_steps is not None:
            return self.peak_lr * self.decay_factor ** (step // self.decay_steps)
        progress = (step - self.warmup_steps) / (self.total_steps - self.warmup_steps)
        return self.peak_lr * 0.5 * (1 + math.cos(math.pi * progress))


def count_accumulation(recipe: RecipeOptions, world_size: int) -> int:
    """Return how many batches each rank accumulates to reach the global batch.

    Raises:
        ConfigError: where the numbers do not divide.
    """
    per_pass = recipe.batch_size * world_size
    global_batch = recipe.global_batch or per_pass
    if global_batch % per_pass:
        raise ConfigError(
            f"train.global_batch={global_batch} is no multiple of "
            f"train.batch_size={recipe.batch_size} x {world_size} ranks = {per_pass}"
        )
    return global_batch // per_pass


def plan_steps(num_samples: int, recipe: RecipeOptions, world_size: int) -> StepPlan:
    """Work out the steps of a run over a training set of `num_samples` images.

    Raises:
        ConfigError: where batch size, ranks and global batch do not divide.
        DataError: where the set is smaller than one step.
    """
    accumulation = count_accumulation(recipe, world_size)
    global_batch = recipe.batch_size * world_size * accumulation
    steps = num_samples // global_batch
    if steps == 0:
        option = "train.batch_size" if recipe.global_batch is None else "train.global_batch"
        raise DataError(f"{num_samples} training images do not fill a step of {global_batch}: lower {option}")
    return StepPlan(
        global_batch=global_batch,
        accumulation=accumulation,
        steps_per_epoch=steps,
        total_steps=steps * recipe.epochs,
        warmup_steps=round(recipe.warmup_epochs * steps),
        peak_lr=recipe.lr_per_256 * global_batch / 256,
        decay_steps=(recipe.step_epochs or 0) * steps if recipe.schedule == "step" else None,
        decay_factor=recipe.step_factor,
    )


def dropblock_probability(recipe: RecipeOptions, epoch: int) -> float:
    """Return DropBlock's probability in an epoch, counted from 0: linear, the recipe's in the last epoch (Gluon)."""
    return recipe.dropblock * (epoch + 1) / recipe.epochs
