"""Split attention as one operator with its own backward pass: less memory traffic and fewer saved activations.

Between the 3x3 convolution and the weighted sum, what is written out and kept is y alone, the convolution's output.
The splits U = relu(bn0(y)) are recomputed in the backward pass, and the gradient of y is written once. Where bn0 is
none of torch's, y is its output, which the splits replace.

    g (B, C, H, W)  gradient of V = sum_r a_r U_r
    gradient of a_r      = sum over pixels of g U_r
    gradient of bn0(y)_r = (a_r g + gradient of the pooled sum / HW) where U_r > 0
"""

from collections.abc import Callable, Iterable
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

Gate = Callable[[Tensor], Tensor]


class Statistics(NamedTuple):
    """What bn0 normalises with.

    Attributes:
        mean, variance: float32 (R C,).
        are_of_batch: whether they depend on y, and so take part in its gradient.
        eps: added to the variance.
    """

    mean: Tensor
    variance: Tensor
    are_of_batch: bool
    eps: float


class Splits:
    """The splits relu(bn0(y)) of one batch, and all that is computed from them, by torch's operators on any device.

    Args:
        y: (B, R C, H, W), radix-major, of either memory format.
        weight, bias: bn0's, (R C,), or None.
        statistics: bn0's, or None where y is normalised already; `rectify` then comes first.
        radix: R.
    """

    def __init__(
        self, y: Tensor, weight: Tensor | None, bias: Tensor | None, statistics: Statistics | None, radix: int
    ) -> None:
        self._y, self._weight, self._statistics, self._radix = y, weight, statistics, radix
        if statistics is None:
            self._x = y
        else:
            mean, variance, _, eps = statistics
            self._x = torch.native_batch_norm(y, weight, bias, mean, variance, False, 0.0, eps)[0].relu_()

    def rectify(self) -> None:
        """Put the splits in the place of y where it is normalised already: it is what the backward pass gets."""
        if self._statistics is None:
            self._y.relu_()

    def pool(self) -> Tensor:
        """Return the mean over the pixels of the sum over the splits, float32 (B, C)."""
        return self._divide(_sum_pixels(self._x)).sum(1) / self._x[0, 0].numel()

    def sum_weighted(self, weights: Tensor) -> Tensor:
        """Return the sum over the splits of weight * split, (B, C, H, W); weights: (B, R, C), of an r-softmax."""
        splits, weights = self._divide(self._x), weights.to(self._x.dtype)[..., None, None]
        if self._radix == 2:  # the weights of a softmax over two: u + a (v - u) reads each split once
            return torch.lerp(splits[:, 0], splits[:, 1], weights[:, 1])
        out = splits[:, 0] * weights[:, 0]
        for r in range(1, self._radix):
            out.addcmul_(splits[:, r], weights[:, r])
        return out

    def weight_gradient(self, gradient: Tensor) -> Tensor:
        """Return the sum over the pixels of gradient * split, float32 (B, R, C); gradient: (B, C, H, W)."""
        product = torch.empty_like(self._x)
        torch.mul(self._divide(self._x), gradient[:, None], out=self._divide(product))
        return self._divide(_sum_pixels(product))

    def input_gradient(
        self, gradient: Tensor, weights: Tensor, pooled: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return the gradients of y and of bn0's weight and bias.

        Args:
            gradient: of the weighted sum, (B, C, H, W).
            weights: (B, R, C).
            pooled: gradient of what `pool` returned, (B, C).
        """
        dtype, pixels = self._x.dtype, self._x[0, 0].numel()
        weights, pooled = weights.to(dtype)[..., None, None], (pooled / pixels).to(dtype)[:, None, :, None, None]
        out = torch.empty_like(self._x)
        torch.addcmul(pooled, weights, gradient[:, None], out=self._divide(out))
        torch.ops.aten.threshold_backward.grad_input(out, self._x, 0, grad_input=out)
        if self._statistics is None:
            return out, None, None
        mean, variance, are_of_batch, eps = self._statistics
        return torch.ops.aten.native_batch_norm_backward(
            *(out, self._y, self._weight, mean, variance, mean, (variance + eps).rsqrt()),
            *(are_of_batch, eps, [True, True, True]),
        )

    def _divide(self, x: Tensor) -> Tensor:
        """View (B, R C, ...) as (B, R, C, ...): dividing a dimension needs no copy in any memory format."""
        return x.unflatten(1, (self._radix, -1))


def _sum_pixels(x: Tensor) -> Tensor:
    """Sum over the pixels, accumulated in float32: (B, C, H, W) to float32 (B, C)."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    if not x.is_contiguous(memory_format=torch.channels_last) or x.is_cuda:
        return x.sum((2, 3), dtype=dtype)
    # On a CPU in channels_last a product with ones is faster than sum, and as exact.
    pixels = x.permute(0, 2, 3, 1).flatten(1, 2)
    ones = pixels.new_ones(1, 1, pixels.shape[1]).expand(len(x), -1, -1)
    return torch.bmm(ones, pixels)[:, 0].to(dtype)


def _choose_splits(y: Tensor) -> type[Splits]:
    """Return the Triton kernels where they can run; torch has Triton with it on Linux."""
    if not y.is_cuda or y.dtype not in (torch.float32, torch.bfloat16, torch.float16) or not find_spec("triton"):
        return Splits
    from resnest_imagenet.models.triton_attention import TritonSplits

    return TritonSplits


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        statistics: Statistics | None,
        radix: int,
        gate: Gate,
        *parameters: Tensor,
    ) -> tuple[Tensor, ...]:
        splits = _choose_splits(y)(y, weight, bias, statistics, radix)
        splits.rectify()
        # The gate has a graph of its own, some kilobytes: whatever it consists of, torch knows its gradients.
        with torch.enable_grad():
            pooled = splits.pool().requires_grad_()
            weights = gate(pooled)
        ctx.set_materialize_grads(False)  # nobody has a use for y once it is rectified
        ctx.save_for_backward(y, weight, bias)
        ctx.statistics, ctx.radix, ctx.gate = statistics, radix, (pooled, weights, parameters)
        out = splits.sum_weighted(weights.detach())
        if statistics is not None:
            return (out,)
        ctx.mark_dirty(y)
        return out, y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, *of_rectified: None) -> tuple[Tensor | None, ...]:
        y, weight, bias = ctx.saved_tensors
        splits = _choose_splits(y)(y, weight, bias, ctx.statistics, ctx.radix)
        pooled, weights, parameters = ctx.gate
        trained = [p for p in parameters if p.requires_grad]
        # Its graph is kept: whoever keeps the outer one for a second pass needs this one too.
        of_pooled, *of_trained = torch.autograd.grad(
            weights, [pooled, *trained], splits.weight_gradient(gradient), retain_graph=True
        )
        of_input = splits.input_gradient(gradient, weights.detach(), of_pooled)
        found = iter(of_trained)
        return *of_input, None, None, None, *(next(found) if p.requires_grad else None for p in parameters)


def attend(y: Tensor, bn: nn.Module, radix: int, gate: Gate, parameters: Iterable[Tensor]) -> Tensor:
    """Return the weighted sum of the splits relu(bn(y)).

    Args:
        y: (B, R C, H, W), radix-major, of either memory format.
        bn: bn0; one that is not torch's BatchNorm2d is called, and its output, which it must not keep, becomes the
            splits, and is kept in place of y.
        radix: R.
        gate: maps the pooled sum of the splits, (B, C), to their weights (B, R, C).
        parameters: the gate's.

    Returns:
        (B, C, H, W), of y's type and memory format.
    """
    weight: Tensor | None = None
    bias: Tensor | None = None
    statistics: Statistics | None = None
    if type(bn) is nn.BatchNorm2d and bn.running_mean is not None and bn.momentum is not None:
        weight, bias, statistics = bn.weight, bn.bias, _take_statistics(y, bn)
    else:
        y = bn(y)
    if not torch.is_grad_enabled():
        splits = _choose_splits(y)(y, weight, bias, statistics, radix)
        splits.rectify()
        return splits.sum_weighted(gate(splits.pool()))
    return _Attend.apply(y, weight, bias, statistics, radix, gate, *parameters)[0]


@torch.no_grad()
def _take_statistics(y: Tensor, bn: nn.BatchNorm2d) -> Statistics:
    """Return what bn normalises y with; in training its running statistics move, as in its own forward."""
    assert bn.running_mean is not None and bn.running_var is not None and bn.num_batches_tracked is not None
    if not bn.training:
        return Statistics(bn.running_mean, bn.running_var, False, bn.eps)
    bn.num_batches_tracked.add_(1)
    mean, variance = torch.ops.aten.batch_norm_update_stats(y, bn.running_mean, bn.running_var, bn.momentum)
    return Statistics(mean, variance, True, bn.eps)
