"""Objects in images: a detector's training targets, and its detections."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

# The mask of one object. Polygons: a list of arrays float64 (2k,), x y x y ... in pixels, k >= 3. Or pycocotools'
# compressed run-length code: {"size": [height, width], "counts": bytes}.
Polygons: TypeAlias = list[np.ndarray]
RunLengths: TypeAlias = dict[str, Any]
STRIDE = 32  # of a backbone: the sides of a batch of images are multiples of it
Mask: TypeAlias = Polygons | RunLengths


@dataclass(frozen=True)
class Pixels:
    """How a detector's images are normalised.

    The defaults are those of the authors' ResNeSt configurations (detectron2-ResNeSt, configs/COCO-Detection/
    faster_rcnn_ResNeSt_50_FPN_syncbn_range-scale_1x.yaml); they differ from the classifiers' mean in the last digit.

    Attributes:
        mean, std: of the channels in their order, of pixels 0 to 255.
        is_bgr: whether blue comes first.
    """

    mean: tuple[float, float, float] = (123.68, 116.779, 103.939)
    std: tuple[float, float, float] = (58.393, 57.12, 57.375)
    is_bgr: bool = False


@dataclass(frozen=True, eq=False)
class Target:
    """The objects of one image; in a padded batch the image lies in the top left corner of its place.

    Attributes:
        index: of the image in its part of the data set.
        size: (height, width) of the image as it is shown, in pixels, without the padding.
        original: (height, width) of the image in its file, upright.
        boxes: float32 (n, 4), x1 y1 x2 y2 in pixels of `size`, within it and with an area; n may be 0.
        labels: int64 (n,), 0..K-1: the background has none.
        masks: of the n objects, in pixels of `size`, on the host; None: masks are not trained.
    """

    index: int
    size: tuple[int, int]
    original: tuple[int, int]
    boxes: Tensor
    labels: Tensor
    masks: Sequence[Mask] | None = None

    def __len__(self) -> int:
        return len(self.boxes)

    def to(self, device: torch.device) -> "Target":
        """Return the target with its tensors on a device."""
        boxes, labels = (value.to(device, non_blocking=True) for value in (self.boxes, self.labels))
        return replace(self, boxes=boxes, labels=labels)

    def pin_memory(self) -> "Target":
        """Return the target with its tensors in pinned memory: torch's DataLoader calls this."""
        return replace(self, boxes=self.boxes.pin_memory(), labels=self.labels.pin_memory())


@dataclass(frozen=True, eq=False)
class Detections:
    """What a detector finds in one image, the most certain first.

    Attributes:
        boxes: float32 (n, 4), x1 y1 x2 y2 in pixels of the image as it was shown, `Target.size`.
        scores: float32 (n,), 0..1, descending.
        labels: int64 (n,), 0..K-1.
        masks: float32 (n, 28, 28), the probability that a cell of the box belongs to the object; None: boxes only.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    masks: Tensor | None = None

    def __len__(self) -> int:
        return len(self.boxes)

    def to(self, device: torch.device) -> "Detections":
        """Return the detections on a device."""
        masks = None if self.masks is None else self.masks.to(device)
        return Detections(self.boxes.to(device), self.scores.to(device), self.labels.to(device), masks)


def list_corners(boxes: np.ndarray) -> np.ndarray:
    """Return boxes (n, 4), x y width height, as x1 y1 x2 y2."""
    return np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
