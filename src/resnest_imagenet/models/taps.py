"""3x3 convolutions that compute the gradient of their weights as nine products of matrices, one for each tap.

With a small batch and many channels, as in the heads of segmentation networks (make bench-segmentation) and of
detectors, oneDNN's gradient of these weights is several times slower than its forward pass. A product also skips the
pixels that a large dilation puts outside the map.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class TapConv2d(nn.Conv2d):
    """A 3x3 convolution of stride 1 that keeps the size, with the keys and result of `nn.Conv2d`.

    It uses products in training on a CPU, in full precision and channels_last; else it is torch's convolution.
    """

    def __init__(self, in_channels: int, out_channels: int, dilation: int = 1, bias: bool = False) -> None:
        super().__init__(in_channels, out_channels, 3, padding=dilation, dilation=dilation, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in_channels, H, W) to (B, out_channels, H, W)."""
        if self._is_product(x):
            return _Convolve.apply(x, self.weight, self.bias, self.dilation[0])
        return super().forward(x)

    def _is_product(self, x: Tensor) -> bool:
        return (
            x.device.type == "cpu"
            and torch.is_grad_enabled()
            and self.weight.requires_grad
            and not (torch.compiler.is_compiling() or torch.jit.is_tracing() or torch.is_autocast_enabled("cpu"))
            and x.is_contiguous(memory_format=torch.channels_last)
        )


def use_taps(module: nn.Module) -> None:
    """Replace each convolution in a module that a `TapConv2d` can compute by one with the same parameters."""
    for name, child in module.named_children():
        if type(child) is nn.Conv2d and _fits(child):
            with torch.device("meta"):  # no initial weights: they would draw from torch's generator
                bias = child.bias is not None
                tap = TapConv2d(child.in_channels, child.out_channels, child.dilation[0], bias)
            tap.weight, tap.bias = child.weight, child.bias
            setattr(module, name, tap)
        else:
            use_taps(child)


def _fits(module: nn.Conv2d) -> bool:
    shape = module.kernel_size, module.stride, module.groups, module.padding_mode
    return shape == ((3, 3), (1, 1), 1, "zeros") and module.padding == module.dilation


class _Convolve(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.dilation = dilation
        return F.conv2d(x, weight, bias, padding=dilation, dilation=dilation)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        size = [ctx.dilation] * 2
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x, _, _ = torch.ops.aten.convolution_backward(
                gradient, x, weight, None, [1, 1], size, size, False, [0, 0], 1, [True, False, False]
            )
        of_bias = gradient.sum((0, 2, 3)) if ctx.needs_input_grad[2] else None
        return of_x, _differentiate_weight(x, gradient, ctx.dilation), of_bias, None


def _differentiate_weight(x: Tensor, gradient: Tensor, dilation: int) -> Tensor:
    """Return the gradient (O, I, 3, 3) of the weights.

    Args:
        x: (B, I, H, W).
        gradient: (B, O, H, W), of the output.
        dilation: of the convolution.
    """
    x, gradient = x.permute(0, 2, 3, 1), gradient.permute(0, 2, 3, 1)
    channels, out_channels = x.shape[3], gradient.shape[3]
    # In channels_last, as the weights are: DistributedDataParallel expects that.
    of_weight = gradient.new_empty(out_channels, 3, 3, channels)
    for row in range(3):
        written_rows, read_rows = _overlap(x.shape[1], (row - 1) * dilation)
        for column in range(3):
            written_columns, read_columns = _overlap(x.shape[2], (column - 1) * dilation)
            read = x[:, read_rows, read_columns].reshape(-1, channels)
            written = gradient[:, written_rows, written_columns].reshape(-1, out_channels)
            of_weight[:, row, column] = written.t() @ read
    return of_weight.permute(0, 3, 1, 2)


def _overlap(side: int, shift: int) -> tuple[slice, slice]:
    """Return the outputs whose input, `shift` places further, lies within the map, and those inputs."""
    length, start = max(side - abs(shift), 0), max(-shift, 0)
    return slice(start, start + length), slice(start + shift, start + shift + length)
