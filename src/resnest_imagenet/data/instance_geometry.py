"""What is done to an image with objects: it is scaled by its short side and mirrored, its boxes and masks with it.

The sizes, the filter and the order are detectron2's (data/transforms/augmentation_impl.py, ResizeShortestEdge and
RandomFlip): sizes are rounded half up, the bound of the long side comes before that, Pillow's bilinear filter on uint8.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from resnest_imagenet.data.coco import NO_AREA
from resnest_imagenet.data.masks import move_mask
from resnest_imagenet.instances import Mask, Target
from resnest_imagenet.randomness import Purpose, uniform_rows


@dataclass(frozen=True)
class View:
    """How an image is shown.

    Attributes:
        height, width: after scaling, in pixels.
        is_mirrored: whether it is mirrored then, from left to right.
    """

    height: int
    width: int
    is_mirrored: bool


@dataclass(frozen=True)
class InstanceTransform:
    """A random short side and flip.

    Attributes:
        seed: the run's.
        short_sides: in pixels, one of them is drawn for each image: `tuple(range(640, 801))`, or a few; one for
            evaluation.
        longest: bound of the long side in pixels; an image that would be longer is scaled to it instead.
        flip: probability of mirroring; 0 for evaluation.
    """

    seed: int
    short_sides: tuple[int, ...]
    longest: int = 1333
    flip: float = 0.5

    def draw(self, epoch: int, index: int, height: int, width: int) -> View:
        """Draw for an image of the given size, in an epoch."""
        size, flip = uniform_rows(self.seed, Purpose.SIZE, epoch, [index], 2)[0].tolist()
        short_side = self.short_sides[int(size * len(self.short_sides))]
        return View(*scale_short_side(height, width, short_side, self.longest), is_mirrored=flip < self.flip)

    def apply(
        self,
        picture: Image.Image,
        boxes: np.ndarray,
        labels: np.ndarray,
        masks: Sequence[Mask] | None,
        epoch: int,
        index: int,
        used: int | None = None,
    ) -> tuple[np.ndarray, Target]:
        """Transform an image with its objects.

        Args:
            picture: RGB, upright.
            boxes: float32 (n, 4), x1 y1 x2 y2 in its pixels.
            labels: int64 (n,).
            masks: of the n objects, or None.
            epoch: counted from 0.
            index: of the image, for the draws.
            used: of the image that it is; None: the same.

        Returns:
            The image, uint8 (height, width, 3), and its objects: those of which something is left.
        """
        view = self.draw(epoch, index, picture.height, picture.width)
        original, size = (picture.height, picture.width), (view.height, view.width)
        moved = move_boxes(boxes, original, view)
        is_kept = (moved[:, 2:] - moved[:, :2] > NO_AREA).all(1)
        kept_masks = None
        if masks is not None:
            every = [move_mask(mask, original, size, view.is_mirrored) for mask in masks]
            is_kept &= np.array([mask is not None for mask in every], bool)
            kept_masks = [mask for mask, keep in zip(every, is_kept.tolist(), strict=True) if mask is not None and keep]
        target = Target(
            index=index if used is None else used,
            size=size,
            original=original,
            boxes=torch.from_numpy(moved[is_kept]),
            labels=torch.from_numpy(labels[is_kept]),
            masks=kept_masks,
        )
        return resize_picture(picture, view), target


def scale_short_side(height: int, width: int, short_side: int, longest: int) -> tuple[int, int]:
    """Return the (height, width) of an image whose short side is given, and whose long side is at most `longest`."""
    scale = short_side / min(height, width)
    new_height, new_width = (short_side, scale * width) if height < width else (scale * height, short_side)
    if max(new_height, new_width) > longest:
        scale = longest / max(new_height, new_width)
        new_height, new_width = new_height * scale, new_width * scale
    return max(1, int(new_height + 0.5)), max(1, int(new_width + 0.5))


def resize_picture(picture: Image.Image, view: View) -> np.ndarray:
    """Return an image as it is shown, uint8 (height, width, 3)."""
    pixels = picture.resize((view.width, view.height), Image.Resampling.BILINEAR)
    return np.array(pixels.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if view.is_mirrored else pixels)


def move_boxes(boxes: np.ndarray, original: tuple[int, int], view: View) -> np.ndarray:
    """Return boxes as they are shown, float32 (n, 4), within the image.

    Args:
        boxes: float32 (n, 4), x1 y1 x2 y2 in pixels of the original.
        original: its (height, width).
        view: how it is shown.
    """
    height, width = original
    moved = boxes * np.tile([view.width / width, view.height / height], 2)
    if view.is_mirrored:
        moved[:, [0, 2]] = view.width - moved[:, [2, 0]]
    return moved.clip(0, np.tile([view.width, view.height], 2)).astype(np.float32)
