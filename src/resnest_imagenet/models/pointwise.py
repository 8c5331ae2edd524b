"""1x1 convolutions that are computed as products of matrices where that is faster."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEW_PIXELS = 14 * 14  # of a map: up to this size a product is faster than the convolution in float32 too


class PointwiseConv2d(nn.Conv2d):
    """A 1x1 convolution of stride 1 with the keys, initial values and result of `nn.Conv2d`.

    On CPUs with AVX2, and on Intel's with AVX-512, a training step is 3 to 6 % faster with products of matrices than
    with oneDNN's convolutions, above all for the gradient of the weight. On an AMD processor with AVX-512 it is up to
    4 % slower in float32, and in bfloat16 between 3 % slower and 5 % faster. An evaluation is not faster, and
    torch.compile is faster with the convolution (docs/performance.md).
    """

    def __init__(self, in_channels: int, out_channels: int, groups: int = 1, bias: bool = False) -> None:
        super().__init__(in_channels, out_channels, kernel_size=1, groups=groups, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in_channels, H, W) to (B, out_channels, H, W)."""
        if self._is_product(x):
            return self.project(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return super().forward(x)

    def project(self, x: Tensor) -> Tensor:
        """Map vectors (..., in_channels) to (..., out_channels)."""
        # Through (O, 1, 1, I) the gradient gets the strides of channels_last, which DistributedDataParallel expects.
        weight = self.weight.permute(0, 2, 3, 1).flatten(1)
        if self.groups == 1:
            return F.linear(x, weight, self.bias)
        x, weight = x.unflatten(-1, (self.groups, -1)), weight.unflatten(0, (self.groups, -1))
        out = torch.einsum("...gi,goi->...go", x, weight).flatten(-2)
        return out if self.bias is None else out + self.bias

    def _is_product(self, x: Tensor) -> bool:
        return (
            x.device.type == "cpu"
            and torch.is_grad_enabled()
            and self.groups == 1
            and not (torch.compiler.is_compiling() or torch.jit.is_tracing())
            and x.is_contiguous(memory_format=torch.channels_last)
            and (x.shape[2] * x.shape[3] <= FEW_PIXELS or torch.is_autocast_enabled("cpu"))
        )
