"""Batch norm with ReLU as plain computations, for operators that have a backward pass of their own."""

from collections.abc import Sequence
from typing import NamedTuple, TypeGuard

import torch
from torch import Tensor, nn


class Statistics(NamedTuple):
    """The statistics that a batch norm normalises with.

    Attributes:
        mean, variance: float32 (C,).
        are_of_batch: whether they depend on the input, and so contribute to its gradient.
        eps: added to the variance.
    """

    mean: Tensor
    variance: Tensor
    are_of_batch: bool
    eps: float


def is_plain(bn: nn.Module) -> TypeGuard[nn.BatchNorm2d]:
    """Return whether `take_statistics` can stand for a module: torch's BatchNorm2d with a moving average."""
    return type(bn) is nn.BatchNorm2d and bn.running_mean is not None and bn.momentum is not None


@torch.no_grad()
def take_statistics(y: Tensor, bn: nn.BatchNorm2d) -> Statistics:
    """Return the statistics that bn normalises y with; in training, update its running statistics as bn would."""
    assert bn.running_mean is not None and bn.running_var is not None and bn.num_batches_tracked is not None
    if not bn.training:
        return Statistics(bn.running_mean, bn.running_var, False, bn.eps)
    bn.num_batches_tracked.add_(1)
    mean, variance = torch.ops.aten.batch_norm_update_stats(y, bn.running_mean, bn.running_var, bn.momentum)
    return Statistics(mean, variance, True, bn.eps)


def rectify_normalised(y: Tensor, weight: Tensor | None, bias: Tensor | None, statistics: Statistics) -> Tensor:
    """Return relu(bn(y)), (B, C, H, W) as y: equal bits whenever it is called."""
    mean, variance, _, eps = statistics
    return torch.native_batch_norm(y, weight, bias, mean, variance, False, 0.0, eps)[0].relu_()


def differentiate_norm(
    gradient: Tensor, y: Tensor, weight: Tensor | None, statistics: Statistics, needed: Sequence[bool] = (True,) * 3
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of y, of the norm's weight and of its bias.

    Args:
        gradient: of bn(y), (B, C, H, W).
        y: the norm's input, (B, C, H, W).
        weight: the norm's, (C,), or None.
        statistics: the norm's.
        needed: which of the three to compute; None for the others.
    """
    mean, variance, are_of_batch, eps = statistics
    return torch.ops.aten.native_batch_norm_backward(
        *(gradient, y, weight, mean, variance, mean, (variance + eps).rsqrt()),
        *(are_of_batch, eps, list(needed)),
    )
