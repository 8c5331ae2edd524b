"""Operators with their own backward pass that keep less than torch does: in eager training on a CPU.

conv(relu(bn(y))): torch keeps both y, for bn, and relu(bn(y)), for the convolution. Here the backward pass computes the
latter again, a pass over the map (a hundredth of a step), and passes the gradient through the ReLU in place.

maxpool(relu(bn(y))): a ReLU passes the gradient of a maximum if the maximum is positive, so its mask is the pooled map,
a quarter of the size, which the next layer keeps anyway.

Average pools: their gradient depends on no value of their input, which torch keeps.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from resnest_imagenet.models.norms import Statistics, differentiate_norm, is_plain, rectify_normalised, take_statistics
from resnest_imagenet.models.patches import differentiate_weight, differentiates_faster


def can_recompute(y: Tensor, bn: nn.Module, following: nn.Module) -> bool:
    """Return whether `convolve_rectified` or `pool_rectified` can stand for following(relu(bn(y))).

    Modules that somebody observes or changes with hooks must be called.
    """
    return (
        _is_trained_eagerly(y)
        and is_plain(bn)
        and (_is_plain_convolution(following) or (type(following) is nn.MaxPool2d and not following.return_indices))
        and not any(_has_hooks(module) for module in (bn, following))
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


def pool_rectified(y: Tensor, bn: nn.BatchNorm2d, pool: nn.MaxPool2d) -> Tensor:
    """Return pool(relu(bn(y))), and keep y and what is pooled; see `can_recompute`."""
    return _MaxPool.apply(y, bn.weight, bn.bias, take_statistics(y, bn), pool)


class AveragePool(nn.AvgPool2d):
    """torch's average pool; it does not keep its input in eager training on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C, H', W')."""
        return _AveragePool.apply(x, self) if _is_trained_eagerly(x) else super().forward(x)


def _is_trained_eagerly(x: Tensor) -> bool:
    """Return whether to use these operators.

    Nothing is kept without gradients, torch.compile recomputes by itself, exports need torch's operators, and no GPU
    has been measured.
    """
    is_graph = torch.compiler.is_compiling() or torch.compiler.is_exporting() or torch.jit.is_tracing()
    return x.device.type == "cpu" and torch.is_grad_enabled() and not is_graph


def _is_plain_convolution(module: nn.Module) -> bool:
    return (
        type(module) is nn.Conv2d
        and module.bias is None
        and module.padding_mode == "zeros"
        and not isinstance(module.padding, str)
    )


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
        return *differentiate_norm(of_x, y, weight, ctx.statistics, ctx.needs_input_grad[:3]), of_kernel, None, None


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


class _MaxPool(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y: Tensor, weight: Tensor | None, bias: Tensor | None, statistics: Statistics, pool: nn.MaxPool2d
    ) -> Tensor:
        x = rectify_normalised(y, weight, bias, statistics)
        ctx.options = pool.kernel_size, pool.stride, pool.padding, pool.dilation, pool.ceil_mode
        out, places = F.max_pool2d_with_indices(x, *ctx.options)
        ctx.save_for_backward(y, weight, bias, out, places)
        ctx.statistics = statistics
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        y, weight, _, out, places = ctx.saved_tensors
        gradient = torch.ops.aten.threshold_backward(gradient, out, 0)
        of_x = torch.ops.aten.max_pool2d_with_indices_backward(
            gradient, y, *map(_pair, ctx.options[:4]), ctx.options[4], places
        )
        return *differentiate_norm(of_x, y, weight, ctx.statistics, ctx.needs_input_grad[:3]), None, None


class _AveragePool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, pool: nn.AvgPool2d) -> Tensor:
        ctx.shape, ctx.pool, ctx.layout = x.shape, pool, _find_layout(x)
        return nn.AvgPool2d.forward(pool, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        pool = ctx.pool
        # Only its shape and layout are read: the memory is never touched.
        x = torch.empty(ctx.shape, dtype=gradient.dtype, device=gradient.device, memory_format=ctx.layout)
        sizes = map(_pair, (pool.kernel_size, pool.stride, pool.padding))
        return torch.ops.aten.avg_pool2d_backward(
            gradient, x, *sizes, pool.ceil_mode, pool.count_include_pad, pool.divisor_override
        ), None


def _pair(size: Any) -> list[int]:
    return [size, size] if isinstance(size, int) else list(size)


def _find_layout(x: Tensor) -> torch.memory_format:
    is_last = x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if is_last else torch.contiguous_format
