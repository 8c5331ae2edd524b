"""Masks of a detector: the head of Mask R-CNN (arXiv 1703.06870), its loss and its training targets."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resnest_imagenet.errors import import_extra
from resnest_imagenet.instances import Mask, RunLengths
from resnest_imagenet.models.proposals import widen
from resnest_imagenet.models.rcnn_options import RCNNOptions
from resnest_imagenet.torchvision_import import importing_torchvision

with importing_torchvision():
    from torchvision import ops
    from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor

POOLED_SIDE = 14  # of a box's pooled features
MASK_SIDE = 28  # of its mask


class MaskHead(nn.Module):
    """Predicts a mask of each class within a box.

    pooled features (n, C, 14, 14)
      -> body: 3x3 convolutions (norm, ReLU)              (n, C, 14, 14)
      -> predictor: 2x2 transposed convolution, ReLU      (n, C, 28, 28)
                    1x1 convolution                       (n, num_classes, 28, 28)

    Initial weights are detectron2's (modeling/roi_heads/mask_head.py): N(0, 2 / fan out), and N(0, .001) for the last.

    Args:
        num_classes: of the data set.
        options: of the detector.
        norm_layer: of the convolutions.
    """

    def __init__(self, num_classes: int, options: RCNNOptions, norm_layer: type[nn.Module] | None) -> None:
        super().__init__()
        channels = options.channels
        self.body = MaskRCNNHeads(channels, [channels] * options.mask_convs, 1, norm_layer)
        self.predictor = MaskRCNNPredictor(channels, channels, num_classes)
        nn.init.normal_(self.predictor.mask_fcn_logits.weight, std=0.001)
        for layer in (self.predictor.conv5_mask, self.predictor.mask_fcn_logits):
            nn.init.zeros_(layer.bias)

    def forward(self, pooled: Tensor) -> Tensor:
        """Map pooled features (n, C, 14, 14) to logits (n, num_classes, 28, 28)."""
        return widen(self.predictor(self.body(pooled)))


def compute_mask_loss(logits: Tensor, labels: Tensor, expected: Tensor) -> Tensor:
    """Return the mean binary cross entropy of each box's own class; without boxes 0, with a gradient of 0.

    Args:
        logits: (n, num_classes, 28, 28).
        labels: int64 (n,), class indices.
        expected: (n, 28, 28), 0 or 1.
    """
    own = logits[torch.arange(len(labels), device=labels.device), labels]
    total = F.binary_cross_entropy_with_logits(own, expected.to(own.dtype), reduction="sum")
    return total / max(own.numel(), 1)


def rasterise_masks(masks: Sequence[Mask], matched: Sequence[int], boxes: Tensor, side: int = MASK_SIDE) -> Tensor:
    """Rasterise, for each box, the part of its object's mask that lies within it.

    Polygons are moved and scaled so that the box fills the result; pycocotools rasterises them, as in detectron2
    (structures/masks.py, PolygonMasks.crop_and_resize). Run lengths are decoded, pooled by RoIAlign and thresholded at
    one half (its BitMasks). torchvision pools all masks, without the threshold: its targets differ at the edge, and it
    takes four times as long.

    Args:
        masks: of the objects of one image, in its pixels.
        matched: the object of each box, by its place in `masks`.
        boxes: (n, 4) on the host, x1 y1 x2 y2 in pixels.
        side: of the result.

    Returns:
        bool (n, side, side).

    Raises:
        ConfigError: pycocotools is not installed.
    """
    drawn = torch.zeros(len(boxes), side, side, dtype=torch.bool)
    for number in sorted(set(matched)):
        places = [place for place, match in enumerate(matched) if match == number]
        mask, within = masks[number], boxes[places]
        if isinstance(mask, dict):
            drawn[places] = _cut_run_lengths(mask, within, side)
        else:
            pictures = [_fill_polygons(mask, box, side) for box in within.double().numpy()]
            drawn[places] = torch.from_numpy(np.stack(pictures))
    return drawn


def _fill_polygons(polygons: Sequence[np.ndarray], box: np.ndarray, side: int) -> np.ndarray:
    """Return the union of polygons within a box, bool (side, side)."""
    coco = import_extra("pycocotools.mask")
    scale = side / np.maximum(box[2:] - box[:2], 0.1)  # an empty box counts as a tenth of a pixel wide
    moved = [((np.asarray(polygon).reshape(-1, 2) - box[:2]) * scale).flatten() for polygon in polygons]
    codes = coco.frPyObjects(moved, side, side)
    return coco.decode(coco.merge(codes)).astype(bool)


def _cut_run_lengths(mask: RunLengths, boxes: Tensor, side: int) -> Tensor:
    """Return which cells of each box the mask covers by half or more, bool (n, side, side)."""
    coco = import_extra("pycocotools.mask")
    picture = torch.from_numpy(coco.decode(mask)).to(boxes.dtype)[None, None]
    rois = F.pad(boxes, (1, 0))
    return ops.roi_align(picture, rois, side, 1.0, 0, True)[:, 0] >= 0.5
