"""conv(relu(bn(y))) as one operator with its own backward pass: it keeps y and recomputes the convolution's input.

torch keeps both y, for bn, and relu(bn(y)), for the convolution. To compute the latter again is a pass over the map,
which costs a thousandth of a step; the gradient passes through the ReLU in place.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from resnest_imagenet.models.norms import Statistics, differentiate_norm, is_plain, rectify_normalised, take_statistics
from resnest_imagenet.models.patches import differentiate_weight, differentiates_faster


def can_recompute(y: Tensor, bn: nn.Module, conv: nn.Module) -> bool:
    """Return whether `convolve_rectified` can stand for conv(relu(bn(y))).

    It is for eager training on a CPU: nothing is kept without gradients, torch.compile recomputes by itself, exports
    need the formula, and no GPU has been measured. Modules that somebody observes or changes with hooks are called.
    """
    return (
        y.device.type == "cpu"
        and torch.is_grad_enabled()
        and not (torch.compiler.is_compiling() or torch.compiler.is_exporting() or torch.jit.is_tracing())
        and is_plain(bn)
        and type(conv) is nn.Conv2d
        and conv.bias is None
        and conv.padding_mode == "zeros"
        and not isinstance(conv.padding, str)
        and not any(_has_hooks(module) for module in (bn, conv))
        and (not torch.is_autocast_enabled("cpu") or y.dtype == torch.get_autocast_dtype("cpu"))
    )


def convolve_rectified(y: Tensor, bn: nn.BatchNorm2d, conv: nn.Conv2d) -> Tensor:
    """Return conv(relu(bn(y))), and keep y only; see `can_recompute`.

    Args:
        y: (B, C, H, W).
        bn: in training it updates its running statistics.
        conv: without a bias.
    """
    return _Convolve.apply(y, bn.weight, bn.bias, conv.weight.to(y.dtype), take_statistics(y, bn), conv)


def _has_hooks(module: nn.Module) -> bool:
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    return any(hooks)


class _Convolve(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        kernel: Tensor,
        statistics: Statistics,
        conv: nn.Conv2d,
    ) -> Tensor:
        ctx.save_for_backward(y, weight, bias, kernel)
        ctx.statistics, ctx.conv = statistics, conv
        x = rectify_normalised(y, weight, bias, statistics)
        return F.conv2d(x, kernel, None, conv.stride, conv.padding, conv.dilation, conv.groups)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        y, weight, bias, kernel = ctx.saved_tensors
        x = rectify_normalised(y, weight, bias, ctx.statistics)
        needs_input, needs_kernel = any(ctx.needs_input_grad[:3]), ctx.needs_input_grad[3]
        of_x, of_kernel = _differentiate(gradient, x, kernel, ctx.conv, needs_input, needs_kernel)
        if of_x is None:
            return None, None, None, of_kernel, None, None
        torch.ops.aten.threshold_backward.grad_input(of_x, x, 0, grad_input=of_x)
        of_norm = differentiate_norm(of_x, y, weight, ctx.statistics)
        needed = zip(of_norm, ctx.needs_input_grad, strict=False)
        return *(value if needs else None for value, needs in needed), of_kernel, None, None


def _differentiate(
    gradient: Tensor, x: Tensor, kernel: Tensor, conv: nn.Conv2d, needs_input: bool, needs_kernel: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of a convolution's input and kernel, None where not needed."""
    by_products = needs_kernel and differentiates_faster(x, conv)
    of_x, of_kernel, _ = torch.ops.aten.convolution_backward(
        *(gradient, x, kernel, None, conv.stride, conv.padding, conv.dilation, False, [0, 0], conv.groups),
        [needs_input, needs_kernel and not by_products, False],
    )
    return of_x, differentiate_weight(x, gradient, conv.groups) if by_products else of_kernel
