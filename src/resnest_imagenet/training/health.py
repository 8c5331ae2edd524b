"""Losses and gradients that are not finite: found before a step is applied, by all ranks together."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from resnest_imagenet.config import RecipeOptions
from resnest_imagenet.distributed import Ranks, gather
from resnest_imagenet.errors import NonFiniteError
from resnest_imagenet.training.state import TrainingState


@dataclass(frozen=True)
class Verdict:
    """What all ranks know of a step before it is applied.

    Attributes:
        unsound: the ranks whose loss or gradient is not finite.
        is_finite: whether the gradient summed over the ranks is.
        is_sound: whether the step may be taken; in fp16 also where the gradient is not finite: the scaler then leaves
            it out, and lowers its scale.
        stops: whether a rank was asked to stop.
    """

    unsound: list[int]
    is_finite: bool
    is_sound: bool
    stops: bool


class Health:
    """Finds losses and gradients that are not finite, on the device; one number is read for each step."""

    def __init__(self, state: TrainingState, recipe: RecipeOptions) -> None:
        self._state = state
        self._is_scaled = state.scaler.is_enabled()
        self._max_skipped = recipe.max_skipped_steps
        self._parameters = list(state.model.parameters())
        # Before the ranks' gradients are added, and so on the rank that is at fault: the first layer's gradient has
        # come through all others.
        self._hook = self._parameters[0].register_hook(self._look_at)
        self.start_step()

    def __enter__(self) -> "Health":
        return self

    def __exit__(self, *error: object) -> None:
        self._hook.remove()

    def start_step(self) -> None:
        """Forget the last step."""
        self._loss_sum = self._state.loss_sum.clone()
        self._has_bad_gradient = torch.zeros_like(self._loss_sum, dtype=torch.bool)
        # A forward pass that is undone has already moved the BN statistics.
        self._buffers = [buffer.clone() for buffer in self._state.model.buffers()] if self._max_skipped else []

    def add_loss(self, loss: Tensor) -> None:
        """Add one batch's share of the step's loss."""
        self._loss_sum += loss

    def judge(self, wants_to_stop: bool, ranks: Ranks) -> Verdict:
        """Agree with the other ranks about the step; waits for the device."""
        self._state.scaler.unscale_(self._state.optimizer)
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        # The largest, which is finite where all are: a sum of squares may overflow.
        has_overflown = ~nn.utils.get_total_norm(gradients, math.inf).isfinite()
        is_bad = ~self._loss_sum.isfinite()
        if not self._is_scaled:
            is_bad |= self._has_bad_gradient
        codes = gather(is_bad + 2 * has_overflown + 4 * wants_to_stop, ranks)
        unsound = [rank for rank, code in enumerate(codes) if code & 1]
        is_finite = not codes[0] & 2
        # A scale below 1 is not what is too high.
        is_sound = not unsound and (is_finite or (self._is_scaled and self._state.scaler.get_scale() >= 1))
        return Verdict(unsound, is_finite, is_sound, any(code & 4 for code in codes))

    def accept_step(self) -> None:
        """Count the step's loss."""
        self._state.loss_sum, self._state.steps_summed = self._loss_sum, self._state.steps_summed + 1

    def undo_step(self, verdict: Verdict, lr: float) -> None:
        """Leave the step out.

        Raises:
            NonFiniteError: more of them than may be.
        """
        self._state.skipped += 1
        if self._state.skipped > self._max_skipped:
            who = f"rank {', '.join(map(str, verdict.unsound))}" if verdict.unsound else "the sum over the ranks"
            raise NonFiniteError(
                f"{who}: loss or gradient not finite at step {self._state.step + 1}, learning rate {lr:.4g}; it was "
                f"not applied (number {self._state.skipped}, train.max_skipped_steps={self._max_skipped})"
            )
        self._state.scaler.update()
        self._state.optimizer.zero_grad(set_to_none=True)
        for buffer, before in zip(self._state.model.buffers(), self._buffers, strict=True):
            buffer.copy_(before)

    def _look_at(self, gradient: Tensor) -> None:
        self._has_bad_gradient |= ~gradient.isfinite().all()
