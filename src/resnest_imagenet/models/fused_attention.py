"""Split attention as one operator with its own backward pass: less memory traffic and fewer saved activations.

Between the 3x3 convolution and the weighted sum, only y, the convolution's output, is written and kept. The splits
U = relu(bn0(y)) are recomputed in the backward pass, and the gradient of y is written once. If bn0 is not a plain
BatchNorm2d, y is its output and is overwritten by the splits.

    g (B, C, H, W)  gradient of V = sum_r a_r U_r
    gradient of a_r      = sum over pixels of g U_r
    gradient of bn0(y)_r = (a_r g + gradient of the pooled sum / HW) where U_r > 0
"""

from collections.abc import Callable, Iterable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from resnest_imagenet.models.norms import Statistics, is_plain, take_statistics
from resnest_imagenet.models.splits import Splits

Gate = Callable[[Tensor], Tensor]


def choose_splits(device: torch.device, dtype: torch.dtype) -> type[Splits]:
    """Return the Triton kernels where they can run; on Linux, torch installs Triton."""
    is_written_for = device.type == "cuda" and dtype in (torch.float32, torch.bfloat16, torch.float16)
    if not is_written_for or not find_spec("triton"):
        return Splits
    from resnest_imagenet.models.triton_splits import TritonSplits

    return TritonSplits


def _make_splits(
    y: Tensor, weight: Tensor | None, bias: Tensor | None, statistics: Statistics | None, radix: int
) -> Splits:
    """Return the splits of one batch; of a tensor without memory, such as a fake one, not in kernels of ours."""
    implementation = choose_splits(y.device, y.dtype) if type(y) is Tensor else Splits
    return implementation(y, weight, bias, statistics, radix)


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
        splits = _make_splits(y, weight, bias, statistics, radix)
        splits.rectify()
        # The gate has a graph of its own, of some kilobytes: torch computes its gradients, whatever it consists of.
        with torch.enable_grad():
            pooled = splits.pool().requires_grad_()
            weights = gate(pooled)
        ctx.set_materialize_grads(False)  # y's own gradient is never needed after the in-place ReLU
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
        splits = _make_splits(y, weight, bias, ctx.statistics, ctx.radix)
        pooled, weights, parameters = ctx.gate
        trained = [p for p in parameters if p.requires_grad]
        # The gate's graph is kept: a caller that keeps the outer graph for a second pass needs this one too.
        # A scalar with this gradient of the weights: for a gradient that is given, torch would import SymPy.
        of_weights = splits.weight_gradient(gradient)
        with torch.enable_grad():
            scalar = (weights * of_weights).sum()
        of_pooled, *of_trained = torch.autograd.grad(scalar, [pooled, *trained], retain_graph=True)
        of_input = splits.input_gradient(gradient, weights.detach(), of_pooled)
        gradients = iter(of_trained)
        return *of_input, None, None, None, *(next(gradients) if p.requires_grad else None for p in parameters)


def attend(y: Tensor, bn: nn.Module, radix: int, gate: Gate, parameters: Iterable[Tensor]) -> Tensor:
    """Return the weighted sum of the splits relu(bn(y)).

    Args:
        y: (B, R C, H, W), radix-major, of either memory format.
        bn: bn0. If it is not torch's BatchNorm2d, it is called; its output, which it must not keep, is overwritten by
            the splits and kept instead of y.
        radix: R.
        gate: maps the pooled sum of the splits, (B, C), to their weights (B, R, C).
        parameters: the gate's.

    Returns:
        (B, C, H, W), in y's type and memory format.
    """
    weight: Tensor | None = None
    bias: Tensor | None = None
    statistics: Statistics | None = None
    if is_plain(bn):
        weight, bias, statistics = bn.weight, bn.bias, take_statistics(y, bn)
    else:
        y = bn(y)
    if not torch.is_grad_enabled():
        splits = _make_splits(y, weight, bias, statistics, radix)
        splits.rectify()
        return splits.sum_weighted(gate(splits.pool()))
    return _Attend.apply(y, weight, bias, statistics, radix, gate, *parameters)[0]
