"""Split attention, the block of ResNeSt (arXiv 2004.08955, section 3.1), in the radix-major form of section 3.2."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def r_softmax(logits: Tensor, radix: int, cardinality: int) -> Tensor:
    """Turn attention logits into the weights of the splits (section 3.1: the assignment weights a_i^k(c)).

    Args:
        logits: (B, cardinality * radix * C / cardinality, 1, 1), cardinality-major: [k][r][c / cardinality],
            the order in which the grouped second 1x1 convolution writes them.
        radix: number of splits R; with R = 1 the weights are a sigmoid, otherwise a softmax over the splits.
        cardinality: number of groups K.

    Returns:
        Weights of the same shape, radix-major: [r][k][c / cardinality], the order of the splits.
    """
    if radix == 1:
        return logits.sigmoid()
    batch = logits.shape[0]
    weights = logits.view(batch, cardinality, radix, -1).transpose(1, 2).softmax(dim=1)
    return weights.reshape(batch, -1, 1, 1)


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

    Raises:
        ValueError: in training with one image on the device, where bn1 has one value per channel.
    """

    def __init__(
        self,
        channels: int,
        radix: int = 2,
        cardinality: int = 1,
        stride: int = 1,
        dilation: int = 1,
        reduction: int = 4,
    ) -> None:
        super().__init__()
        self.radix = radix
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
        self.fc1 = nn.Conv2d(channels, inner, kernel_size=1, groups=cardinality)
        self.bn1 = nn.BatchNorm2d(inner)
        self.fc2 = nn.Conv2d(inner, channels * radix, kernel_size=1, groups=cardinality)

    def forward(self, x: Tensor) -> Tensor:
        if self.training and x.shape[0] == 1:
            raise ValueError(
                "split attention normalises one value per image and channel: train with at least 2 images per device"
            )
        x = F.relu(self.bn0(self.conv(x)), inplace=True)
        # Chunks are 4-dimensional views: a (B, R, C, H, W) reshape would throw channels_last away.
        splits = x.chunk(self.radix, dim=1)
        pooled = sum(splits[1:], splits[0]).mean((2, 3), keepdim=True)
        logits = self.fc2(F.relu(self.bn1(self.fc1(pooled))))
        # Autocast computes the softmax in float32; kept so, the full-size products would be float32 too.
        weights = r_softmax(logits, self.radix, self.cardinality).to(x.dtype).chunk(self.radix, dim=1)
        out = weights[0] * splits[0]
        for weight, split in zip(weights[1:], splits[1:], strict=True):
            out = torch.addcmul(out, weight, split)
        return out
