"""Losses and gradients that are not finite: found before a step is applied, by all ranks together, on the device.

The host reads the verdict on a step later: if it waited in every step, the GPU would be idle meanwhile.
"""

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from resnest_imagenet.distributed import Ranks, gather_on_device
from resnest_imagenet.errors import NonFiniteError
from resnest_imagenet.recipe import Recipe
from resnest_imagenet.training.state import TrainingState

# Flags that a rank reports for a step, added up. TOO_LARGE is the same on all ranks.
UNSOUND, TOO_LARGE, STOPS = 1, 2, 4


@dataclass(frozen=True)
class Verdict:
    """The outcome of a step, the same on all ranks.

    Attributes:
        epoch: epochs done before it.
        step: its number in the run, from 1.
        lr: its learning rate.
        unsound: the ranks whose loss or gradient is not finite.
        is_skipped: whether it was not applied because of them, or because the gradient summed over the ranks is not
            finite. In fp16 the scaler also skips steps and lowers its scale; these do not count.
        stops: whether a rank was asked to stop.
    """

    epoch: int
    step: int
    lr: float
    unsound: list[int]
    is_skipped: bool
    stops: bool


class Health:
    """Finds losses and gradients that are not finite, and skips their steps."""

    def __init__(self, state: TrainingState, recipe: Recipe) -> None:
        self._state = state
        self._is_scaled = state.scaler.is_enabled()
        self._max_skipped = recipe.max_skipped_steps
        self._parameters = [parameter for parameter in state.model.parameters() if parameter.requires_grad]
        self._buffers = list(state.model.buffers()) if self._max_skipped else []
        self._unread: deque[_Unread] = deque()
        # The hook runs before DDP sums the gradients, so it sees this rank's only. The gradient of the first layer that
        # is trained, after a stem that may be frozen, has passed through every other layer.
        self._hook = self._parameters[0].register_hook(self._check_gradient)
        self.start_step()

    def __enter__(self) -> "Health":
        return self

    def __exit__(self, *error: object) -> None:
        self._hook.remove()

    def start_step(self) -> None:
        """Forget the last step."""
        self._state.losses.start_step()
        self._has_bad_gradient = torch.zeros((), device=self._parameters[0].device, dtype=torch.bool)
        # The forward pass of a skipped step has changed the BN statistics: keep them to restore them.
        self._before = [buffer.clone() for buffer in self._buffers]

    def judge(self, lr: float, wants_to_stop: bool, ranks: Ranks) -> Tensor:
        """Agree with the other ranks about the step; take back its loss and BN statistics if it is skipped.

        Args:
            lr: its learning rate.
            wants_to_stop: whether this rank was asked to stop.
            ranks: the ranks of the run.

        Returns:
            float32 scalar on the device: 1 if its gradients, now unscaled, must not be applied, else 0.
        """
        state = self._state
        is_bad = ~state.losses.is_finite()
        state.scaler.unscale_(state.optimizer)
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        # The largest gradient is finite if all are; a sum of squares may overflow.
        has_overflown = ~nn.utils.get_total_norm(gradients, math.inf).isfinite()
        if self._is_scaled:
            # An overflow is fp16's: the loss scale is too high, unless it is already below 1.
            is_too_large = has_overflown & (state.scaler.scale(torch.ones((), device=is_bad.device)) < 1)
        else:
            is_too_large = has_overflown
            is_bad |= self._has_bad_gradient
        code = UNSOUND * is_bad + TOO_LARGE * is_too_large + STOPS * wants_to_stop
        codes = gather_on_device(code, ranks)
        self._unread.append(_send(codes, state, lr))
        is_skipped = (codes & (UNSOUND | TOO_LARGE)).any()
        state.losses.end_step(is_skipped)
        for buffer, before in zip(self._buffers, self._before, strict=True):
            torch.where(is_skipped, before, buffer, out=buffer)
        return (is_skipped | has_overflown).float()

    def read_verdicts(self, unread: int = 0) -> Iterator[Verdict]:
        """Yield the verdicts that were not read before, and count skipped steps; this waits for the device.

        Args:
            unread: how many of the newest verdicts to leave for later.

        Raises:
            NonFiniteError: more steps were skipped than allowed.
        """
        while len(self._unread) > unread:
            verdict = self._unread.popleft().read()
            if verdict.is_skipped:
                self._count_skipped(verdict)
            yield verdict

    def _count_skipped(self, verdict: Verdict) -> None:
        state = self._state
        state.skipped += 1
        state.losses.take_back()
        if state.skipped > self._max_skipped:
            source = f"rank {', '.join(map(str, verdict.unsound))}" if verdict.unsound else "the sum over the ranks"
            raise NonFiniteError(
                f"{source}: loss or gradient not finite at step {verdict.step}, learning rate {verdict.lr:.4g}; it was "
                f"not applied (number {state.skipped}, train.max_skipped_steps={self._max_skipped})"
            )

    def _check_gradient(self, gradient: Tensor) -> None:
        self._has_bad_gradient |= ~gradient.isfinite().all()


@dataclass(frozen=True)
class _Unread:
    """A verdict on its way to the host: on a GPU, `codes` is valid after `event`."""

    epoch: int
    step: int
    lr: float
    codes: Tensor
    event: torch.cuda.Event | None

    def read(self) -> Verdict:
        if self.event is not None:
            self.event.synchronize()
        codes = self.codes.tolist()
        unsound = [rank for rank, code in enumerate(codes) if code & UNSOUND]
        is_skipped, stops = (any(code & flags for code in codes) for flags in (UNSOUND | TOO_LARGE, STOPS))
        return Verdict(self.epoch, self.step, self.lr, unsound, is_skipped, stops)


def _send(codes: Tensor, state: TrainingState, lr: float) -> _Unread:
    """Start copying the codes to the host, from a GPU into pinned memory."""
    on_host = codes.to("cpu", non_blocking=True)
    event = torch.cuda.Event() if codes.is_cuda else None
    if event is not None:
        event.record()
    return _Unread(state.epoch, state.step + 1, lr, on_host, event)
