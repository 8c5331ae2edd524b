"""Transforms an image with its boxes and masks: it is scaled by the short side, then mirrored.

Sizes, filter and order are detectron2's (data/transforms/augmentation_impl.py, ResizeShortestEdge and RandomFlip): the
long side is bounded first, then sizes are rounded half up; Pillow's bilinear filter resizes uint8 pixels.
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
        is_mirrored: whether it is then mirrored, from left to right.
    """

    height: int
    width: int
    is_mirrored: bool


@dataclass(frozen=True)
class InstanceTransform:
    """A random short side and flip.

    Attributes:
        seed: the run's.
        short_sides: in pixels, such as `tuple(range(640, 801))`; one of them is drawn for each image. An evaluation has
            only one.
        longest: largest long side in pixels; an image that would be longer is scaled to it instead.
        flip: probability of mirroring; 0 in an evaluation.
    """

    seed: int
    short_sides: tuple[int, ...]
    longest: int = 1333
    flip: float = 0.5

    def draw(self, epoch: int, index: int, height: int, width: int) -> View:
        """Draw the view of an image of this size in an epoch."""
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
            index: in the plan; the draws depend on it.
            used: index of the image that is shown, where a substitute replaces a damaged one; None: `index`.

        Returns:
            The image, uint8 (height, width, 3), and its objects without those that have no area or mask afterwards.
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
    """Return (height, width) of an image scaled to a short side, with its long side at most `longest`."""
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
