"""Cascade R-CNN (arXiv 1712.00726): several box stages, each trained on the previous stage's boxes at a higher IoU."""

from collections.abc import Sequence

import torch
from torch import Tensor

from resnest_imagenet.instances import Detections, Target
from resnest_imagenet.models.boxes import BOX_SIDE, Samples, label_boxes
from resnest_imagenet.models.roi_heads import RoIHeads
from resnest_imagenet.torchvision_import import importing_torchvision

with importing_torchvision():
    from torchvision import ops


class CascadeHeads(RoIHeads):
    """Several box stages and one mask head (detectron2, modeling/roi_heads/cascade_rcnn.py, CascadeROIHeads).

    Proposals are sampled once, for the first stage. Later stages label the refined boxes again and keep all of them.
    The losses of all stages are summed; the features get the mean of the stages' gradients. A detection has the mean
    probabilities of the stages and the box of the last one. Masks are trained on the first stage's positives.

    Args: see `RoIHeads`.
    """

    @property
    def box_loss_names(self) -> tuple[str, ...]:
        """The names of the box losses: classes and boxes of each stage."""
        return tuple(f"{loss}{number + 1}" for number in range(len(self.stages)) for loss in ("classes", "boxes"))

    def compute_box_losses(
        self, levels: Sequence[Tensor], samples: list[Samples], targets: Sequence[Target]
    ) -> list[Tensor]:
        """Return the losses of the box stages: classes and boxes of each."""
        losses: list[Tensor] = []
        sizes, boxes = [target.size for target in targets], [image_boxes.boxes for image_boxes in samples]
        for number, (head, (min_iou, _)) in enumerate(zip(self.box_heads, self.options.all_stages, strict=True)):
            if number:
                boxes = [image_boxes[_have_area(image_boxes)] for image_boxes in boxes]
                samples = [label_boxes(*part, min_iou) for part in zip(boxes, targets, strict=True)]
            logits, differences = head(self._pool_scaled(levels, boxes))
            losses += head.compute_losses(logits, differences, samples, targets)
            boxes = _refine(head.decode(differences.detach(), torch.cat(boxes)), boxes, sizes)
        return losses

    def detect_boxes(
        self, levels: Sequence[Tensor], proposals: Sequence[Tensor], sizes: Sequence[tuple[int, int]]
    ) -> list[Detections]:
        """Return the detections of each image without masks."""
        probabilities, boxes = [], list(proposals)
        for head in self.box_heads:
            logits, differences = head(self.pool(levels, boxes))
            probabilities.append(logits.softmax(1))
            # Keep boxes without an area: the probabilities of all stages belong to the same boxes.
            boxes = _refine(head.decode(differences, torch.cat(boxes)), boxes, sizes)
        return self.select(torch.cat(boxes)[:, None], torch.stack(probabilities).mean(0), proposals, sizes)

    def _pool_scaled(self, levels: Sequence[Tensor], boxes: Sequence[Tensor]) -> Tensor:
        """Pool features whose gradient is divided by the number of stages."""
        pooled = self.pool(levels, boxes, BOX_SIDE)
        if pooled.requires_grad:
            pooled.register_hook(lambda gradient: gradient / len(self.stages))
        return pooled


def _refine(decoded: Tensor, boxes: Sequence[Tensor], sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """Split a stage's refined boxes (all images, 1, 4) by image, and clip them to it: (n, 4) each.

    A box with NaN becomes empty: with NaN, RoIAlign would read outside its memory.
    """
    parts = decoded[:, 0].nan_to_num().split([len(image_boxes) for image_boxes in boxes])
    return [ops.clip_boxes_to_image(*part) for part in zip(parts, sizes, strict=True)]


def _have_area(boxes: Tensor) -> Tensor:
    """Return which boxes have an area, bool (n,); boxes with NaN have none."""
    return (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
