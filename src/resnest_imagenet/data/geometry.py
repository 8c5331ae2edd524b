"""The training transform of a scene: an image and its mask are flipped, scaled and cropped together.

The order follows the code behind the paper's Table 7 (gluon-cv data/segbase.py, PyTorch-Encoding datasets/base.py):
flip, scale the long side, pad right and bottom, crop, blur.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter

from resnest_imagenet.data.scenes import VOID
from resnest_imagenet.randomness import Purpose, uniform_rows

FLIP = 0.5  # probability


@dataclass(frozen=True)
class Placement:
    """Where a crop lies in a scaled scene.

    Attributes:
        height, width: of the scene after scaling, in pixels.
        top, left: first row and column of the crop in it.
        is_mirrored: whether the scene is mirrored from left to right before the crop.
        blur: radius of the blur, in pixels of the crop; 0 means none.
    """

    height: int
    width: int
    top: int
    left: int
    is_mirrored: bool
    blur: float = 0.0


@dataclass(frozen=True)
class SceneTransform:
    """A random scale, flip and crop.

    Attributes:
        crop: side of the output in pixels.
        base: the long side that a scene gets at scale 1, in pixels.
        seed: the run's.
        scales: the smallest and the largest scale; the long side is a whole number of pixels, uniform between them.
        blur: probability of a Gaussian blur with a radius uniform in 0 to 1 pixel.
    """

    crop: int
    base: int
    seed: int
    scales: tuple[float, float] = (0.5, 2.0)
    blur: float = 0.0

    def draw(self, epoch: int, index: int, height: int, width: int) -> Placement:
        """Draw the placement of a scene of the given size in an epoch."""
        flip, size, vertical, horizontal = uniform_rows(self.seed, Purpose.CROP, epoch, [index], 4)[0].tolist()
        shortest, longest = (int(self.base * scale) for scale in self.scales)
        scaled_height, scaled_width = scale_long_side(height, width, shortest + int(size * (longest - shortest + 1)))
        return Placement(
            scaled_height,
            scaled_width,
            top=int(vertical * (max(scaled_height - self.crop, 0) + 1)),
            left=int(horizontal * (max(scaled_width - self.crop, 0) + 1)),
            is_mirrored=flip < FLIP,
            blur=self._draw_blur(epoch, index),
        )

    def _draw_blur(self, epoch: int, index: int) -> float:
        if self.blur == 0:
            return 0.0
        chance, radius = uniform_rows(self.seed, Purpose.APPEARANCE, epoch, [index], 2)[0].tolist()
        return radius if chance < self.blur else 0.0

    def apply(self, picture: Image.Image, mask: np.ndarray, epoch: int, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Transform a scene.

        Args:
            picture: RGB.
            mask: uint8 (H, W), of the same size.
            epoch: counted from 0.
            index: of the scene, for the draws.

        Returns:
            The image, uint8 (crop, crop, 3), black outside the scene, and its mask, uint8 (crop, crop), VOID there.
        """
        place = self.draw(epoch, index, picture.height, picture.width)
        return crop_image(picture, place, self.crop), crop_mask(mask, place, self.crop)


def scale_long_side(height: int, width: int, long_side: int) -> tuple[int, int]:
    """Return the size with the given long side and the same aspect; the short side is rounded half up."""
    if height > width:
        return long_side, max(1, int(width * long_side / height + 0.5))
    return max(1, int(height * long_side / width + 0.5)), long_side


def crop_image(picture: Image.Image, place: Placement, crop: int) -> np.ndarray:
    """Return a crop of a scaled image, uint8 (crop, crop, 3), by Pillow's bilinear filter.

    Only the part that the crop shows is resampled. Up to rounding, the pixels are those of a crop of the whole scaled
    image.
    """
    top, left, height, width = _find_window(place, crop)
    down, across = picture.height / place.height, picture.width / place.width
    right, bottom = min((left + width) * across, picture.width), min((top + height) * down, picture.height)
    box = (left * across, top * down, right, bottom)
    pixels = np.asarray(picture.resize((width, height), Image.Resampling.BILINEAR, box))
    result = np.zeros((crop, crop, 3), np.uint8)
    result[:height, :width] = pixels[:, ::-1] if place.is_mirrored else pixels
    if place.blur > 0:
        result = np.array(Image.fromarray(result).filter(ImageFilter.GaussianBlur(place.blur)))
    return result


def crop_mask(mask: np.ndarray, place: Placement, crop: int) -> np.ndarray:
    """Return the same crop of a mask, uint8 (crop, crop): the value at each pixel's centre, in integer arithmetic."""
    top, left, height, width = _find_window(place, crop)
    rows = (2 * np.arange(top, top + height) + 1) * mask.shape[0] // (2 * place.height)
    columns = (2 * np.arange(left, left + width) + 1) * mask.shape[1] // (2 * place.width)
    if place.is_mirrored:
        columns = columns[::-1]
    result = np.full((crop, crop), VOID, np.uint8)
    result[:height, :width] = mask.take(rows, 0).take(columns, 1)
    return result


def _find_window(place: Placement, crop: int) -> tuple[int, int, int, int]:
    """Return top, left, height and width of the part that a crop shows, in the scaled scene before the flip."""
    height, width = min(crop, place.height), min(crop, place.width)
    left = place.width - place.left - width if place.is_mirrored else place.left
    return place.top, left, height, width
