"""The ResNeSt network (arXiv 2004.08955): a ResNet-D with split attention in place of the 3x3 convolution.

Module names are those of the official release, so that its weights load as they are.
"""

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from resnest_imagenet.models.pointwise import PointwiseConv2d
from resnest_imagenet.models.rectified import AveragePool, can_recompute, convolve_rectified, pool_rectified
from resnest_imagenet.models.split_attention import Implementation, SplitAttention

EXPANSION = 4  # output channels of a bottleneck over its planes


@dataclass(frozen=True)
class ResNeStSpec:
    """The numbers that tell the members of the family apart.

    Attributes:
        layers: number of blocks in layer1..layer4.
        radix, cardinality, width: the setting, written 2s1x64d in the ablation (section 5.2). With P planes, split
            attention has int(P * width / 64) * cardinality channels.
        stem_width: channels of the first two stem convolutions; the third has twice as many.
        avd_first: average downsampling before split attention ("fast") or after it.
        planes: planes of layer1, doubled in each layer; 64 in every published network.
    """

    layers: tuple[int, int, int, int]
    radix: int = 2
    cardinality: int = 1
    width: int = 64
    stem_width: int = 32
    avd_first: bool = False
    planes: int = 64


class Bottleneck(nn.Module):
    """1x1 convolution, split attention, 1x1 convolution, and a shortcut.

    x (B, C, H, W)
      -> conv1, bn1, ReLU          (B, G, H, W), G = int(planes * width / 64) * cardinality
      -> [avd_layer, if first]     3x3 average pool with the block's stride (section 4.1, average downsampling)
      -> conv2, split attention    (B, G, H', W'), no activation after it
      -> [avd_layer, if last]
      -> conv3, bn3                (B, 4 planes, H', W')
      -> + shortcut, ReLU

    The attribute names conv1, bn1, conv2, avd_layer, conv3, bn3 and downsample are the official ones; there is no bn2.
    """

    def __init__(
        self,
        spec: ResNeStSpec,
        in_channels: int,
        planes: int,
        stride: int,
        dilation: int,
        pool: bool,
        downsample: nn.Module | None,
    ) -> None:
        super().__init__()
        group_width = int(planes * spec.width / 64) * spec.cardinality
        out_channels = planes * EXPANSION
        self.conv1 = PointwiseConv2d(in_channels, group_width)
        self.bn1 = nn.BatchNorm2d(group_width)
        self.conv2 = SplitAttention(group_width, spec.radix, spec.cardinality, dilation=dilation)
        self.avd_layer = AveragePool(3, stride, padding=1) if pool else nn.Identity()
        self.avd_first = spec.avd_first
        self.conv3 = PointwiseConv2d(group_width, out_channels)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        out = self.conv1(x)
        if self._recomputes(out):
            out = self.conv2(out, self.bn1)
        else:
            out = F.relu(self.bn1(out), inplace=True)
            out = self.conv2(self.avd_layer(out) if self.avd_first else out)
        if not self.avd_first:
            out = self.avd_layer(out)
        out = self.bn3(self.conv3(out))
        return F.relu(out.add_(shortcut), inplace=True)

    def _recomputes(self, y: Tensor) -> bool:
        pools_first = self.avd_first and not isinstance(self.avd_layer, nn.Identity)
        return (
            isinstance(self.conv2, SplitAttention)
            and self.conv2.implementation != "reference"
            and not pools_first
            and can_recompute(y, self.bn1, self.conv2.conv)
        )


class Stem(nn.Sequential):
    """Convolutions with a batch norm and a ReLU between them; in training, the convolutions' inputs are recomputed."""

    def forward(self, x: Tensor) -> Tensor:
        """Map images (B, 3, H, W) to the last convolution's output."""
        modules: list[Any] = list(self)
        x, rest = modules[0](x), modules[1:]
        for bn, relu, conv in zip(rest[::3], rest[1::3], rest[2::3], strict=True):
            x = convolve_rectified(x, bn, conv) if can_recompute(x, bn, conv) else conv(relu(bn(x)))
        return x


class ResNeSt(nn.Module):
    """ResNeSt for classification.

    images (B, 3, H, W)
      -> conv1 (three 3x3 convolutions, the first of stride 2), bn1, ReLU   (B, 2 stem_width, H/2, W/2)
      -> maxpool                                                            (B, 2 stem_width, H/4, W/4)
      -> layer1 .. layer4         (B, 4 planes, H/4), (.., 8, /8), (.., 16, /16), (.., 32, /output_stride)
      -> global average pooling, dropout, fc                                (B, num_classes)

    Args:
        spec: the member of the family.
        num_classes: width of the classifier.
        dropout: probability before the classifier.
        zero_gamma: start each block as the identity: the last BN's weight is 0 (section 4.2).
        output_stride: 32, or 16 or 8 for dense prediction: the strides of layer4 (and layer3) become dilations. As in
            the official code, the first block of such a layer keeps its 3x3 average pool, with stride 1.
        split_attention: how it is computed; see `SplitAttention`.

    Raises:
        ValueError: for another output_stride.
    """

    layer1: nn.Sequential
    layer2: nn.Sequential
    layer3: nn.Sequential
    layer4: nn.Sequential

    def __init__(
        self,
        spec: ResNeStSpec,
        num_classes: int = 1000,
        dropout: float = 0.0,
        zero_gamma: bool = True,
        output_stride: int = 32,
        split_attention: Implementation = "auto",
    ) -> None:
        super().__init__()
        if output_stride not in (8, 16, 32):
            raise ValueError(f"output_stride is 8, 16 or 32, not {output_stride}")
        width = spec.stem_width
        stem = nn.Sequential if split_attention == "reference" else Stem
        self.conv1 = stem(
            nn.Conv2d(3, width, kernel_size=3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, width, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, width * 2, kernel_size=3, padding=1, bias=False),
        )
        self.bn1 = nn.BatchNorm2d(width * 2)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        channels, dilation = width * 2, 1
        for index, blocks in enumerate(spec.layers):
            stride = 1 if index == 0 else 2
            first_dilation = dilation
            if 2 ** (index + 2) > output_stride:
                stride, dilation = 1, dilation * 2
            planes = spec.planes * 2**index
            layer = _make_layer(spec, channels, planes, blocks, stride, first_dilation, dilation, pool=index > 0)
            setattr(self, f"layer{index + 1}", layer)
            channels = planes * EXPANSION
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, SplitAttention):
                module.implementation = split_attention
            elif isinstance(module, Bottleneck) and zero_gamma:
                nn.init.zeros_(module.bn3.weight)

    def forward_features(self, x: Tensor) -> Tensor:
        """Map images (B, 3, H, W) to the features of layer4 (B, 32 planes, H / output_stride, W / output_stride)."""
        x = self.conv1(x)
        if isinstance(self.conv1, Stem) and can_recompute(x, self.bn1, self.maxpool):
            x = pool_rectified(x, self.bn1, self.maxpool)
        else:
            x = self.maxpool(F.relu(self.bn1(x), inplace=True))
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))

    def forward(self, x: Tensor) -> Tensor:
        """Map normalised images (B, 3, H, W) to logits (B, num_classes)."""
        return self.fc(self.dropout(self.forward_features(x).mean((2, 3))))


def _make_layer(
    spec: ResNeStSpec,
    in_channels: int,
    planes: int,
    blocks: int,
    stride: int,
    first_dilation: int,
    dilation: int,
    pool: bool,
) -> nn.Sequential:
    """Stack the blocks of one layer. The first changes channels and resolution and pools its shortcut (ResNet-D)."""
    out_channels = planes * EXPANSION
    downsample = nn.Sequential(
        OrderedDict(
            {
                "0": nn.Identity()
                if stride == 1
                else nn.AvgPool2d(stride, stride, ceil_mode=True, count_include_pad=False),
                "1": PointwiseConv2d(in_channels, out_channels),
                "2": nn.BatchNorm2d(out_channels),
            }
        )
    )
    layer = [Bottleneck(spec, in_channels, planes, stride, first_dilation, pool, downsample)]
    for _ in range(1, blocks):
        layer.append(Bottleneck(spec, out_channels, planes, 1, dilation, pool=False, downsample=None))
    return nn.Sequential(*layer)
