"""Detectors of the paper's Tables 5 and 6: Faster, Cascade and Mask R-CNN on a backbone of the zoo.

They are built from torchvision's parts by the authors' configurations; `RCNNOptions` lists where the two differ.
"""

import itertools
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from resnest_imagenet.instances import Detections, Target
from resnest_imagenet.models.boxes import no_numbers
from resnest_imagenet.models.cascade import CascadeHeads
from resnest_imagenet.models.features import STAGES, Backbone
from resnest_imagenet.models.proposals import ProposalNetwork, widen
from resnest_imagenet.models.rcnn_options import RCNNOptions
from resnest_imagenet.models.roi_heads import RoIHeads
from resnest_imagenet.models.taps import use_taps
from resnest_imagenet.models.zoo import build_model
from resnest_imagenet.torchvision_import import importing_torchvision

with importing_torchvision():
    from torchvision.ops import FeaturePyramidNetwork
    from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

LEVELS = tuple(STAGES)[1:]  # of the backbone: strides 4 to 32


class RCNN(nn.Module):
    """A detector: boxes with classes, and optionally masks.

    images (B, 3, H, W), padded at the right and at the bottom to a multiple of 32
      -> backbone       layer1 to layer4, (B, ., H/4, W/4) to (B, ., H/32, W/32)
      -> fpn            5 levels (B, channels, H/4, W/4) to (B, channels, H/64, W/64), the last rounded up
      -> rpn            proposals, boxes of each image
      -> roi_heads      boxes, classes and masks, from the first 4 levels

    The anchors and proposals that a step is trained on are sampled by torch's global generator.

    Args:
        backbone: with the features layer1 to layer4.
        num_classes: of the data set, without the background.
        options: see `RCNNOptions`.
    """

    def __init__(self, backbone: Backbone, num_classes: int, options: RCNNOptions) -> None:
        super().__init__()
        assert backbone.names == LEVELS
        self.backbone = backbone
        norm = options.norm_of_heads
        norm_layer = None if norm == "none" else nn.BatchNorm2d
        strides = (*backbone.strides, 2 * backbone.strides[-1])
        heads = CascadeHeads if options.cascade else RoIHeads
        self.fpn = FeaturePyramidNetwork(backbone.channels, options.channels, LastLevelMaxPool(), norm_layer)
        self.rpn = ProposalNetwork(strides, options)
        self.roi_heads = heads(num_classes, backbone.strides, options, norm_layer)
        if norm == "sync":
            self.fpn, self.roi_heads = map(_synchronise, (self.fpn, self.roi_heads))
        for part in (self.fpn, self.rpn.head, self.roi_heads):
            use_taps(part)
        self._has_frozen_heads = norm == "frozen"
        for module in self._list_frozen():
            module.requires_grad_(False)
        self.train()

    @property
    def loss_names(self) -> tuple[str, ...]:
        """The names of the losses of a training step; each step has all of them."""
        return ("objectness", "rpn_boxes", *self.roi_heads.loss_names)

    def forward(
        self, images: Tensor, instances: Sequence[Target] | Sequence[tuple[int, int]]
    ) -> dict[str, Tensor] | list[Detections]:
        """Return the losses of a training step, or in evaluation the detections of each image.

        Args:
            images: (B, 3, H, W), normalised, then padded with zeros at the right and at the bottom.
            instances: in training the images' targets; in evaluation their sizes (height, width) without the padding,
                in pixels.

        Returns:
            In training scalars by `loss_names`, whose sum is the loss. In evaluation the detections, with boxes in
            pixels of the images; one detection with a score of NaN if features or outputs of an image are not finite.
        """
        levels = self.pyramid(images)
        pooled = levels[: len(self.backbone.names)]
        if self.training:
            targets = cast(Sequence[Target], instances)
            proposals, losses = self.rpn.propose(images, levels, [target.size for target in targets], targets)
            return losses | self.roi_heads.compute_losses(pooled, proposals, targets)
        sizes = cast(Sequence[tuple[int, int]], instances)
        proposals, _ = self.rpn.propose(images, levels, sizes)
        detections = self.roi_heads(pooled, proposals, sizes)
        # NaN fails every comparison, so the image would look like one without objects.
        outputs = self.rpn.head(levels) if min(map(len, proposals)) == 0 else ([], [])
        # Minimum and maximum keep NaN. isfinite() of every value would take four passes over the memory.
        bounds = [bound(x, (1, 2, 3)) for x in itertools.chain(levels, *outputs) for bound in (torch.amin, torch.amax)]
        are_finite = torch.stack(bounds).isfinite().all(0)
        return [
            detected if is_finite else no_numbers(images)
            for detected, is_finite in zip(detections, are_finite.tolist(), strict=True)
        ]

    def pyramid(self, images: Tensor) -> list[Tensor]:
        """Map images (B, 3, H, W) to the levels of the pyramid, strides 4 to 64."""
        features = OrderedDict(zip(self.backbone.names, self.backbone(images), strict=True))
        return list(self.fpn(features).values())

    def train(self, mode: bool = True) -> "RCNN":
        """Set training or evaluation mode; frozen norms stay in evaluation mode."""
        super().train(mode)
        for module in self._list_frozen():
            module.eval()
        return self

    def _list_frozen(self) -> list[nn.Module]:
        modules = [module for part in (self.fpn, self.roi_heads) for module in part.modules()]
        return [module for module in modules if self._has_frozen_heads and isinstance(module, nn.BatchNorm2d)]


def _synchronise(part: nn.Module) -> Any:
    """Return a part of a detector with synchronised batch norms; some ranks may have no boxes for them."""
    part = nn.SyncBatchNorm.convert_sync_batchnorm(part)
    for module in part.modules():
        if isinstance(module, nn.SyncBatchNorm):
            module.register_forward_pre_hook(_widen_nothing)
    return part


def _widen_nothing(norm: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    """Give a norm its input in float32 if it is empty.

    The statistics that ranks exchange are float32. For an empty input torch sends them in the input's own precision: in
    bf16 and fp16 that is half of the bytes that the other ranks expect.
    """
    (x,) = inputs
    return (x if x.numel() else widen(x),)


def build_rcnn(name: str, num_classes: int, **options: Any) -> RCNN:
    """Build a detector with random weights.

    Args:
        name: of the backbone, one of `list_models()`.
        num_classes: of the data set, without the background.
        options: of `RCNNOptions`; the defaults are the paper's.

    Raises:
        ConfigError: see `build_model` and `RCNNOptions`.
    """
    settings = RCNNOptions(**options)
    backbone = build_model(
        name,
        zero_gamma=settings.zero_gamma,
        features_only=True,
        out_features=LEVELS,
        freeze_at=settings.freeze_at,
        norm=settings.norm,
    )
    assert isinstance(backbone, Backbone)
    if settings.checkpoint_activations:
        backbone.recompute()
    return RCNN(backbone, num_classes, settings)
