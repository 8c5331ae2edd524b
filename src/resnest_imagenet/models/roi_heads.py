"""The heads that classify and refine proposals: one box stage, and masks."""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from resnest_imagenet.instances import Detections, Target
from resnest_imagenet.models.boxes import (
    BOX_SIDE,
    BoxHead,
    Samples,
    pool_boxes,
    sample_boxes,
    select_detections,
)
from resnest_imagenet.models.masks import POOLED_SIDE, MaskHead, compute_mask_loss, rasterise_masks
from resnest_imagenet.models.rcnn_options import RCNNOptions
from resnest_imagenet.torchvision_import import importing_torchvision

with importing_torchvision():
    from torchvision.models.detection._utils import BalancedPositiveNegativeSampler


class RoIHeads(nn.Module):
    """Classifies and refines boxes, and finds masks (detectron2, modeling/roi_heads/roi_heads.py, StandardROIHeads).

    Args:
        num_classes: of the data set.
        strides: of the pooled levels, in pixels.
        options: of the detector.
        norm_layer: of the heads' convolutions.
    """

    def __init__(
        self, num_classes: int, strides: Sequence[int], options: RCNNOptions, norm_layer: type[nn.Module] | None
    ) -> None:
        super().__init__()
        self.options, self.strides = options, tuple(strides)
        self.stages = nn.ModuleList(
            BoxHead(num_classes, weights, options, norm_layer) for _, weights in options.all_stages
        )
        self.masks = MaskHead(num_classes, options, norm_layer) if options.masks else None
        self._sampler = BalancedPositiveNegativeSampler(options.samples, options.positive)

    @property
    def box_heads(self) -> list[BoxHead]:
        """The box stages."""
        return cast(list[BoxHead], list(self.stages))

    @property
    def loss_names(self) -> tuple[str, ...]:
        """The names of the losses of a training step."""
        return (*self.box_loss_names, "masks") if self.options.masks else self.box_loss_names

    @property
    def box_loss_names(self) -> tuple[str, ...]:
        """The names of the box losses: classes and boxes of each stage."""
        return ("classes", "boxes")

    def forward(
        self, levels: Sequence[Tensor], proposals: Sequence[Tensor], sizes: Sequence[tuple[int, int]]
    ) -> list[Detections]:
        """Return the detections of each image.

        Args:
            levels: (B, C, H / stride, W / stride) each.
            proposals: (n, 4) of each image.
            sizes: (height, width) of each image, in pixels.
        """
        detections = self.detect_boxes(levels, proposals, sizes)
        return detections if self.masks is None else self._add_masks(self.masks, levels, detections)

    def compute_losses(
        self, levels: Sequence[Tensor], proposals: Sequence[Tensor], targets: Sequence[Target]
    ) -> dict[str, Tensor]:
        """Return the losses by name; every parameter gets a gradient, even if an image has no boxes.

        Args:
            levels: (B, C, H / stride, W / stride) each.
            proposals: (n, 4) of each image.
            targets: of the images.
        """
        min_iou, _ = self.options.all_stages[0]
        samples = sample_boxes(proposals, targets, min_iou, self._sampler)
        losses = dict(zip(self.box_loss_names, self.compute_box_losses(levels, samples, targets), strict=True))
        if self.masks is not None:
            losses["masks"] = self._compute_mask_loss(self.masks, levels, samples, targets)
        return losses

    def compute_box_losses(
        self, levels: Sequence[Tensor], samples: list[Samples], targets: Sequence[Target]
    ) -> list[Tensor]:
        """Return the losses of the box stages: classes and boxes of each."""
        (head,) = self.box_heads
        logits, differences = head(self.pool(levels, [image_samples.boxes for image_samples in samples]))
        return list(head.compute_losses(logits, differences, samples, targets))

    def detect_boxes(
        self, levels: Sequence[Tensor], proposals: Sequence[Tensor], sizes: Sequence[tuple[int, int]]
    ) -> list[Detections]:
        """Return the detections of each image without masks."""
        (head,) = self.box_heads
        logits, differences = head(self.pool(levels, proposals))
        boxes = head.decode(differences, torch.cat(list(proposals)))
        return self.select(boxes, logits.softmax(1), proposals, sizes)

    def select(
        self, boxes: Tensor, probabilities: Tensor, proposals: Sequence[Tensor], sizes: Sequence[tuple[int, int]]
    ) -> list[Detections]:
        """Split the boxes of all images, and return the detections of each; see `select_detections`."""
        counts = [len(image_boxes) for image_boxes in proposals]
        parts = zip(boxes.split(counts), probabilities.split(counts), sizes, strict=True)
        return [select_detections(*part, self.options) for part in parts]

    def pool(self, levels: Sequence[Tensor], boxes: Sequence[Tensor], side: int = BOX_SIDE) -> Tensor:
        """Return the features of the boxes of all images, (n, C, side, side)."""
        return pool_boxes(levels, boxes, self.strides, side, self.options)

    def _compute_mask_loss(
        self, head: MaskHead, levels: Sequence[Tensor], samples: Sequence[Samples], targets: Sequence[Target]
    ) -> Tensor:
        """Return the mask loss of the positive boxes."""
        chosen = [(image_samples.labels > 0).nonzero().flatten() for image_samples in samples]
        boxes = [image_samples.boxes[places] for image_samples, places in zip(samples, chosen, strict=True)]
        logits = head(self.pool(levels, boxes, POOLED_SIDE))
        labels = torch.cat([part.labels[places] for part, places in zip(samples, chosen, strict=True)]) - 1
        drawn = []
        for target, image_samples, places, within in zip(targets, samples, chosen, boxes, strict=True):
            assert target.masks is not None, "a mask head is trained on targets with masks"
            # The masks are rasterised on the host, which waits for the boxes here.
            drawn.append(rasterise_masks(target.masks, image_samples.matched[places].tolist(), within.cpu()))
        return compute_mask_loss(logits, labels, torch.cat(drawn).to(logits.device, non_blocking=True))

    def _add_masks(
        self, head: MaskHead, levels: Sequence[Tensor], detections: Sequence[Detections]
    ) -> list[Detections]:
        """Return the detections with masks."""
        logits = head(self.pool(levels, [image_detections.boxes for image_detections in detections], POOLED_SIDE))
        labels = torch.cat([image_detections.labels for image_detections in detections])
        masks = logits[torch.arange(len(labels), device=labels.device), labels].sigmoid()
        parts = masks.split([len(image_detections) for image_detections in detections])
        return [
            Detections(image_detections.boxes, image_detections.scores, image_detections.labels, part)
            for image_detections, part in zip(detections, parts, strict=True)
        ]
