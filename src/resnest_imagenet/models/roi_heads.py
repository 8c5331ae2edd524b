"""The heads behind the proposals: boxes in one stage, and masks."""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler

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


class RoIHeads(nn.Module):
    """Boxes and classes, and masks of the boxes (detectron2, modeling/roi_heads/roi_heads.py, StandardROIHeads).

    Args:
        num_classes: of the data set.
        strides: of the levels that are pooled, in pixels.
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
        """The stages of boxes."""
        return cast(list[BoxHead], list(self.stages))

    @property
    def loss_names(self) -> tuple[str, ...]:
        """The losses of a training step, by name."""
        return (*self.box_loss_names, "masks") if self.options.masks else self.box_loss_names

    @property
    def box_loss_names(self) -> tuple[str, ...]:
        """The losses of the stages of boxes, classes and boxes of each."""
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
        """Return the losses by name; all parameters have a gradient, wherever there is nothing to learn from.

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
        """Return the losses of the stages of boxes, classes and boxes of each."""
        (head,) = self.box_heads
        logits, differences = head(self.pool(levels, [of_image.boxes for of_image in samples]))
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
        """Return the detections of each image among the boxes of all."""
        counts = [len(of_image) for of_image in proposals]
        parts = zip(boxes.split(counts), probabilities.split(counts), sizes, strict=True)
        return [select_detections(*part, self.options) for part in parts]

    def pool(self, levels: Sequence[Tensor], boxes: Sequence[Tensor], side: int = BOX_SIDE) -> Tensor:
        """Return the features of the boxes of all images, (n, C, side, side)."""
        return pool_boxes(levels, boxes, self.strides, side, self.options)

    def _compute_mask_loss(
        self, head: MaskHead, levels: Sequence[Tensor], samples: Sequence[Samples], targets: Sequence[Target]
    ) -> Tensor:
        """Return the loss of the masks of the positives."""
        chosen = [(of_image.labels > 0).nonzero().flatten() for of_image in samples]
        boxes = [of_image.boxes[places] for of_image, places in zip(samples, chosen, strict=True)]
        logits = head(self.pool(levels, boxes, POOLED_SIDE))
        labels = torch.cat([of_image.labels[places] for of_image, places in zip(samples, chosen, strict=True)]) - 1
        drawn = []
        for target, of_image, places, within in zip(targets, samples, chosen, boxes, strict=True):
            assert target.masks is not None, "a mask head is trained on targets with masks"
            # The host draws them: it waits for the boxes here.
            drawn.append(rasterise_masks(target.masks, of_image.matched[places].tolist(), within.cpu()))
        return compute_mask_loss(logits, labels, torch.cat(drawn).to(logits.device, non_blocking=True))

    def _add_masks(
        self, head: MaskHead, levels: Sequence[Tensor], detections: Sequence[Detections]
    ) -> list[Detections]:
        """Return detections with the masks of their boxes."""
        logits = head(self.pool(levels, [of_image.boxes for of_image in detections], POOLED_SIDE))
        labels = torch.cat([of_image.labels for of_image in detections])
        masks = logits[torch.arange(len(labels), device=labels.device), labels].sigmoid()
        parts = masks.split([len(of_image) for of_image in detections])
        return [
            Detections(of_image.boxes, of_image.scores, of_image.labels, part)
            for of_image, part in zip(detections, parts, strict=True)
        ]
