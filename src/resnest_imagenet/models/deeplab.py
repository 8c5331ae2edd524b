"""DeepLabV3 (arXiv 1706.05587) on a backbone of the zoo, as in the paper's Table 7.

Heads and upsampling follow PyTorch-Encoding (encoding/models/sseg/deeplab.py, fcn.py) and GluonCV
(gluoncv/model_zoo/deeplabv3.py); both align the corners.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resnest_imagenet.models.features import Backbone, Norm
from resnest_imagenet.models.pointwise import PointwiseConv2d
from resnest_imagenet.models.taps import TapConv2d
from resnest_imagenet.models.zoo import build_model

RATES = (12, 24, 36)  # of the dilated convolutions at output stride 8


class DeepLabV3(nn.Module):
    """Semantic segmentation: a class for each pixel.

    images (B, 3, H, W)
      -> backbone                layer3 (B, C3, h, w), layer4 (B, C4, h, w); h = H / output stride, rounded up
      -> head on layer4          logits (B, num_classes, h, w)
      -> auxiliary on layer3     logits (B, num_classes, h, w), in training only
      -> bilinear upsampling     (B, num_classes, H, W)

    The heads' convolutions keep torch's default initial values, as in PyTorch-Encoding.

    Args:
        backbone: its features must be layer3 and layer4, or layer4 alone without an auxiliary head.
        num_classes: width of the logits.
        channels: of the head.
        rates: dilations of its 3x3 convolutions.
        auxiliary: whether there is an auxiliary head.
        norm: of the heads; see `build_deeplab`.
    """

    def __init__(
        self,
        backbone: Backbone,
        num_classes: int,
        channels: int = 256,
        rates: Sequence[int] = RATES,
        auxiliary: bool = True,
        norm: Norm = "bn",
    ) -> None:
        super().__init__()
        assert backbone.names == (("layer3", "layer4") if auxiliary else ("layer4",))
        self.backbone = backbone
        self.head = DeepLabHead(backbone.channels[-1], channels, num_classes, rates)
        self.auxiliary = FCNHead(backbone.channels[0], num_classes) if auxiliary else None
        if norm == "sync":
            self.head = nn.SyncBatchNorm.convert_sync_batchnorm(self.head)
            self.auxiliary = self.auxiliary and nn.SyncBatchNorm.convert_sync_batchnorm(self.auxiliary)
        self._has_frozen_norms = norm == "frozen"
        for module in self._list_frozen():
            module.requires_grad_(False)
        self.train()

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Map normalised images (B, 3, H, W) to logits (B, num_classes, H, W), in training those of both heads."""
        features = self.backbone(images)
        logits = _upsample(self.head(features[-1]), images)
        if self.auxiliary is None or not self.training:
            return logits
        return logits, _upsample(self.auxiliary(features[0]), images)

    def train(self, mode: bool = True) -> "DeepLabV3":
        """Set training or evaluation mode; what is frozen stays in evaluation mode."""
        super().train(mode)
        for module in self._list_frozen():
            module.eval()
        return self

    def _list_frozen(self) -> list[nn.Module]:
        heads = [module for head in (self.head, self.auxiliary) if head is not None for module in head.modules()]
        return [module for module in heads if self._has_frozen_norms and isinstance(module, nn.BatchNorm2d)]


class DeepLabHead(nn.Module):
    """Atrous spatial pyramid pooling and a classifier for each pixel.

    x (B, in_channels, h, w)
      -> branches: a 1x1 convolution, and a 3x3 convolution of each rate      (B, channels, h, w) each
         pooled: global average, 1x1 convolution                              (B, channels, 1, 1), repeated over h, w
      -> concatenated, project (1x1), dropout .5     (B, channels, h, w)
      -> block (3x3), dropout .1                     (B, channels, h, w)
      -> classify (1x1, with bias)                   (B, num_classes, h, w)

    Each convolution but the last has no bias and is followed by a batch norm and a ReLU.
    """

    def __init__(self, in_channels: int, channels: int, num_classes: int, rates: Sequence[int]) -> None:
        super().__init__()
        self.branches = nn.ModuleList([_make_unit(in_channels, channels, 1)])
        self.branches.extend(_make_unit(in_channels, channels, 3, rate) for rate in rates)
        self.pooled = _make_unit(in_channels, channels, 1)
        self.project = _make_unit((len(rates) + 2) * channels, channels, 1)
        self.block = _make_unit(channels, channels, 3)
        self.classify = nn.Conv2d(channels, num_classes, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in_channels, h, w) to logits (B, num_classes, h, w)."""
        branches = [branch(x) for branch in self.branches]
        # Bilinear upsampling of a single pixel, with aligned corners or without, repeats it.
        pooled = self.pooled(x.mean((2, 3), keepdim=True)).expand_as(branches[0])
        out = self.project(torch.cat([*branches, pooled], dim=1))
        out = self.block(F.dropout(out, 0.5, self.training))
        return self.classify(F.dropout(out, 0.1, self.training))


class FCNHead(nn.Module):
    """A classifier for each pixel: block (3x3) to a quarter of the channels, dropout .1, classify (1x1, with bias)."""

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__()
        self.block = _make_unit(in_channels, in_channels // 4, 3)
        self.classify = nn.Conv2d(in_channels // 4, num_classes, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in_channels, h, w) to logits (B, num_classes, h, w)."""
        return self.classify(F.dropout(self.block(x), 0.1, self.training))


def build_deeplab(
    name: str,
    num_classes: int,
    *,
    output_stride: int = 8,
    rates: Sequence[int] = RATES,
    channels: int = 256,
    norm: Norm = "bn",
    auxiliary: bool = True,
    zero_gamma: bool = True,
) -> DeepLabV3:
    """Build a DeepLabV3 with random weights.

    Args:
        name: of the backbone, one of `list_models()`.
        num_classes: width of the logits.
        output_stride: of the backbone: 8, 16 or 32. A dilated ResNeSt keeps the official code's pools.
        rates: dilations of the head's 3x3 convolutions.
        channels: of the head.
        norm: of backbone and heads: "bn", "frozen" (statistics, weights and biases stay as they are) or "sync"
            (statistics over all ranks; torch computes these on accelerators only).
        auxiliary: whether there is an auxiliary head.
        zero_gamma: see `build_model`.

    Raises:
        ConfigError: see `build_model`.
    """
    features = ("layer3", "layer4") if auxiliary else ("layer4",)
    backbone = build_model(
        name,
        zero_gamma=zero_gamma,
        output_stride=output_stride,
        features_only=True,
        out_features=features,
        norm=norm,
    )
    assert isinstance(backbone, Backbone)
    return DeepLabV3(backbone, num_classes, channels, rates, auxiliary, norm)


def _make_unit(in_channels: int, out_channels: int, kernel_size: int, rate: int = 1) -> nn.Sequential:
    convolution = (
        PointwiseConv2d(in_channels, out_channels)
        if kernel_size == 1
        else TapConv2d(in_channels, out_channels, dilation=rate)
    )
    return nn.Sequential(convolution, nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True))


def _upsample(logits: Tensor, images: Tensor) -> Tensor:
    if torch.is_grad_enabled():
        logits = logits.contiguous()  # the cross entropy would copy the upsampled logits out of channels_last
    return F.interpolate(logits, images.shape[2:], mode="bilinear", align_corners=True)
