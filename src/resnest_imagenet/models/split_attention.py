"""Split attention, the block of ResNeSt (arXiv 2004.08955, section 3.1), in the radix-major form of section 3.2."""

from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resnest_imagenet.models.fused_attention import attend
from resnest_imagenet.models.pointwise import PointwiseConv2d
from resnest_imagenet.models.rectified import convolve_rectified

Implementation = Literal["auto", "fused", "reference"]


def r_softmax(logits: Tensor, radix: int, cardinality: int) -> Tensor:
    """Turn attention logits into the weights of the splits (section 3.1: the assignment weights a_i^k(c)).

    Args:
        logits: (B, K R C / K), cardinality-major: [k][r][c / K], the order of the second grouped 1x1 convolution's
            outputs.
        radix: number of splits R. The weights are a sigmoid if R = 1, otherwise a softmax over the splits.
        cardinality: number of groups K.

    Returns:
        (B, R, C), the channels in the order of the splits, [k][c / K].
    """
    if radix == 1:
        return logits.sigmoid()[:, None]
    return logits.unflatten(1, (cardinality, radix, -1)).softmax(dim=2).transpose(1, 2).flatten(2)


class SplitAttention(nn.Module):
    """A 3x3 convolution into `radix` splits per group and the attention that sums them (section 3.1).

    x (B, C, H, W)
      -> conv, bn0, ReLU    (B, R C, H', W'), groups = R K, radix-major: [r][k][c / K]
      -> sum over splits, global average pooling     (B, C, 1, 1), s^k of section 3.1
      -> fc1, bn1, ReLU, fc2 (1x1 convolutions in K groups, with biases), r-softmax: a_i^k(c)
      -> sum over splits of weight * split           (B, C, H', W')

    Args:
        channels: C, of the input and of the output; a multiple of cardinality.
        radix: R, number of splits within a group.
        cardinality: K, number of groups.
        stride: of the 3x3 convolution.
        dilation: of the 3x3 convolution; its padding is the same.
        reduction: the inner width is max(C * R // reduction, 32).
        implementation: "reference", the formula above in torch's operators; "fused", one operator with its own backward
            pass (`fused_attention`); "auto", the fused one in eager mode and the formula under torch.compile, which
            fuses it itself. An export always gets the formula.

    Raises:
        ValueError: in training with one image on the device, because bn1 then has one value per channel. A frozen bn1
            (in evaluation mode) and a SyncBatchNorm take one image.
    """

    def __init__(
        self,
        channels: int,
        radix: int = 2,
        cardinality: int = 1,
        stride: int = 1,
        dilation: int = 1,
        reduction: int = 4,
        implementation: Implementation = "auto",
    ) -> None:
        super().__init__()
        self.radix = radix
        self.implementation = implementation
        self.is_recomputed = False  # in the backward pass: see `Backbone.recompute`
        self.cardinality = cardinality
        inner = max(channels * radix // reduction, 32)
        self.conv = nn.Conv2d(
            channels,
            channels * radix,
            kernel_size=3,
            stride=stride,
            padding=dilation,
            dilation=dilation,
            groups=cardinality * radix,
            bias=False,
        )
        self.bn0 = nn.BatchNorm2d(channels * radix)
        self.fc1 = PointwiseConv2d(channels, inner, groups=cardinality, bias=True)
        self.bn1 = nn.BatchNorm2d(inner)
        self.fc2 = PointwiseConv2d(inner, channels * radix, groups=cardinality, bias=True)

    def forward(self, x: Tensor, norm: nn.BatchNorm2d | None = None) -> Tensor:
        """Map x, or relu(norm(x)) if there is a norm before (see `can_recompute`), to (B, C, H', W')."""
        if type(self.bn1) is nn.BatchNorm2d and self.bn1.training and x.shape[0] == 1:
            raise ValueError(
                "split attention normalises one value per image and channel: train with at least 2 images per device"
            )
        y = self.conv(x) if norm is None else convolve_rectified(x, norm, self.conv)
        # The attention stays float32 under autocast: its products are small, and casts would make them slower.
        with self._in_full_precision(y.device.type):
            if self._is_fused(y):
                gate = [*self.fc1.parameters(), *self.bn1.parameters(), *self.fc2.parameters()]
                weigh = self._weigh_and_keep if self.is_recomputed else self._weigh
                return attend(y, self.bn0, self.radix, weigh, gate)
            # Chunks are 4-dimensional views: a sum over a fifth dimension would lose channels_last.
            splits = F.relu(self.bn0(y), inplace=True).chunk(self.radix, dim=1)
            weights = self._weigh(sum(splits[1:], splits[0]).mean((2, 3)))[..., None, None].to(y.dtype)
            products = [split * weights[:, r] for r, split in enumerate(splits)]
            return sum(products[1:], products[0])

    def _is_fused(self, y: Tensor) -> bool:
        if torch.compiler.is_exporting() or torch.jit.is_tracing() or y.device.type not in ("cpu", "cuda"):
            return False
        if self.implementation == "auto":
            return not torch.compiler.is_compiling()
        return self.implementation == "fused"

    @staticmethod
    def _in_full_precision(device: str) -> AbstractContextManager[None]:
        # The meta device has no autocast.
        return nullcontext() if device == "meta" else torch.autocast(device, enabled=False)

    def _weigh_and_keep(self, pooled: Tensor) -> Tensor:
        """Do the same as `_weigh`, and keep its activations, some kilobytes.

        The gate's graph is built inside the backward pass: without them, the block would be recomputed a second time.
        """
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
            return self._weigh(pooled)

    def _weigh(self, pooled: Tensor) -> Tensor:
        """Map the pooled sum of the splits, (B, C), to their weights, (B, R, C)."""
        hidden = self.fc1.project(pooled.to(self.fc1.weight.dtype))
        hidden = F.relu(self.bn1(hidden[..., None, None])).flatten(1)
        return r_softmax(self.fc2.project(hidden), self.radix, self.cardinality)
