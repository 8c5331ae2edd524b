"""The transforms of training and evaluation images, and the geometry of crops, the same for every loader.

The random numbers of a crop are drawn here, from (seed, epoch, sample); the loaders only apply them. Windows are
(top, left, height, width) in pixels of the original image.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from resnest_imagenet.data.augment import NO_AUGMENTATION, Appearance, Augmentation, describe_operations
from resnest_imagenet.randomness import Purpose, uniform_rows

# Mean and deviation of ImageNet, in 0..255 and RGB order (FAIR's and Gluon's: .485 .456 .406 and .229 .224 .225).
MEAN = (0.485 * 255, 0.456 * 255, 0.406 * 255)
STD = (0.229 * 255, 0.224 * 255, 0.225 * 255)

Window = tuple[int, int, int, int]
Colour = tuple[float, float, float]

# Long side over short side. Of a longer image, only the middle is resized: a line of pixels would fill the memory.
LONGEST_RESIZED = 32


@dataclass(frozen=True)
class RandomResizedCrop:
    """A part of the image of random area and aspect (Szegedy et al. 2015, section 6).

    Attributes:
        min_area: smallest share of the image's area; the largest is 1.
        max_aspect: width / height lies between its inverse and itself, uniform in the logarithm.
        attempts: draws until the centre crop is taken instead.
    """

    min_area: float = 0.08
    max_aspect: float = 4 / 3
    attempts: int = 10

    def scale(self, u: np.ndarray) -> np.ndarray:
        """Turn uniform numbers in 0..1 into the draws of `window`.

        Both are (N, 2 + 2 * attempts). A draw is the vertical and horizontal position in 0..1, then the crop's height
        in each attempt, then its width, both divided by the square root of the image's area.
        """
        place, area, aspect = np.split(u, [2, 2 + self.attempts], axis=1)
        area = self.min_area + (1 - self.min_area) * area
        aspect = np.exp((2 * aspect - 1) * math.log(self.max_aspect))
        return np.concatenate([place, np.sqrt(area / aspect), np.sqrt(area * aspect)], axis=1)

    def window(self, height: int, width: int, draw: Sequence[float]) -> Window:
        """Return the crop of an image for a draw: the first attempt that fits, or the largest centre crop."""
        scale = math.sqrt(height * width)
        for relative_height, relative_width in zip(draw[2 : 2 + self.attempts], draw[2 + self.attempts :], strict=True):
            h, w = math.floor(scale * relative_height + 0.5), math.floor(scale * relative_width + 0.5)
            if 1 <= h <= height and 1 <= w <= width:
                return int(draw[0] * (height - h + 1)), int(draw[1] * (width - w + 1)), h, w
        h = min(height, math.floor(width * self.max_aspect + 0.5))
        w = min(width, math.floor(height * self.max_aspect + 0.5))
        return (height - h) // 2, (width - w) // 2, h, w


RANDOM_RESIZED_CROP = RandomResizedCrop()


def to_levels(mean: Sequence[float] | None, std: Sequence[float] | None) -> dict[str, Any]:
    """Return mean and deviation of red, green and blue as a transform takes them; None: ImageNet's.

    Args:
        mean: in 0..1.
        std: in 0..1.
    """
    given = {"mean": mean, "std": std}
    levels = {name: tuple(value * 255 for value in values) for name, values in given.items() if values is not None}
    return {"mean": MEAN, "std": STD, **levels}


@dataclass(frozen=True)
class ERandomCrop:
    """The random crop of Fast AutoAugment and of the released ResNeSt code (TensorFlow's distorted bounding box).

    The height is uniform, the area is not: larger crops are rarer than under RandomResizedCrop.

    Attributes:
        min_area: smallest share of the image's area; the largest is 1.
        max_aspect: width / height lies between its inverse and itself, uniform.
        crop: side of the output in pixels: it determines the centre square.
        attempts: draws until the centre square is taken instead; it is also taken for a crop of the whole image.
    """

    crop: int
    min_area: float = 0.1
    max_aspect: float = 4 / 3
    attempts: int = 10

    def scale(self, u: np.ndarray) -> np.ndarray:
        """Turn uniform numbers in 0..1 into the draws of `window`.

        Both are (N, 2 + 2 * attempts). A draw is the vertical and horizontal position in 0..1, then the crop's height
        in each attempt as a place between the smallest and the largest, then its aspect.
        """
        place, aspect = np.split(u, [2 + self.attempts], axis=1)
        return np.concatenate([place, 1 / self.max_aspect + (self.max_aspect - 1 / self.max_aspect) * aspect], axis=1)

    def window(self, height: int, width: int, draw: Sequence[float]) -> Window:
        """Return the crop of an image for a draw: the first attempt that fits, or the centre square."""
        area = height * width
        for place, aspect in zip(draw[2 : 2 + self.attempts], draw[2 + self.attempts :], strict=True):
            largest = min(round(math.sqrt(area / aspect)), height, math.floor(width / aspect))
            smallest = min(round(math.sqrt(self.min_area * area / aspect)), largest)
            h = round(smallest + place * (largest - smallest))
            w = round(h * aspect)
            if self.min_area * area <= h * w <= area and w <= width:
                if (h, w) == (height, width):
                    break
                return int(draw[0] * (height - h + 1)), int(draw[1] * (width - w + 1)), h, w
        return self.centre.square(height, width)

    @property
    def centre(self) -> "EvalTransform":
        """The transform whose square is taken if no attempt fits."""
        return EvalTransform(self.crop, "crop_resize", ratio=None)


@dataclass(frozen=True)
class TrainTransform:
    """A random crop, flips and other variations.

    Attributes:
        crop: side of the output in pixels.
        seed: the run's.
        cropping: the rule of the crop.
        antialias: whether the filter widens with the reduction, as Pillow's does and OpenCV's does not.
        interpolation: of the resize.
        augmentation: further variations.
        flip: probability of a horizontal flip.
        vertical_flip: probability of a vertical flip.
        mean: what is subtracted from red, green and blue, in 0..255.
        std: what divides them then.
    """

    crop: int
    seed: int
    cropping: RandomResizedCrop | ERandomCrop = RANDOM_RESIZED_CROP
    antialias: bool = False
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    augmentation: Augmentation = NO_AUGMENTATION
    flip: float = 0.5
    vertical_flip: float = 0.0
    mean: Colour = MEAN
    std: Colour = STD

    def draw_crops(self, epoch: int, indices: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Draw for samples of an epoch how they are mirrored and cropped.

        Returns:
            int32 (N, 2), 1 if mirrored horizontally and vertically, and the draws (N, ...) of `cropping.window`.
        """
        u = uniform_rows(self.seed, Purpose.CROP, epoch, indices, 4 + 2 * self.cropping.attempts)
        # The vertical flip was added last: the other draws are those of runs without it.
        mirrored = u[:, [0, -1]] < (self.flip, self.vertical_flip)
        return mirrored.astype(np.int32), self.cropping.scale(u[:, 1:-1])

    def draw_appearance(self, epoch: int, indices: Sequence[int]) -> Appearance:
        """Draw the other variations of samples of an epoch."""
        return self.augmentation.draw(self.seed, epoch, indices)

    def describe_draws(self, epoch: int, index: int, size: tuple[int, int]) -> tuple[str, str]:
        """Return how a sample of an epoch is varied, in words: what is done to the image, and to its crop.

        Args:
            epoch: counted from 0.
            index: of the sample.
            size: height and width of the image.
        """
        mirrored, crops = self.draw_crops(epoch, [index])
        appearance = self.draw_appearance(epoch, [index])
        _, _, height, width = self.cropping.window(*size, crops[0].tolist())
        flips = [
            name for name, is_done in zip(("mirrored", "upside down"), mirrored[0].tolist(), strict=True) if is_done
        ]
        offset = [f"colour {' '.join(f'{value:+.0f}' for value in appearance.offset[0].tolist())}"]
        crop = f"crop {100 * height * width / (size[0] * size[1]):.0f} %"
        after = [crop, *flips, *describe_operations(appearance.after[0]), *(offset if appearance.offset.any() else [])]
        return ", ".join(describe_operations(appearance.before[0])), ", ".join(after)


@dataclass(frozen=True)
class EvalTransform:
    """The centre of an image at one size: resized, then cropped, or the other way round.

    Attributes:
        crop: side of the output in pixels.
        order: "resize_crop": resize the short side to crop / ratio, then take the centre (the paper, section 5.1);
            "crop_resize": take the centre square of ratio * the short side, then resize it to crop.
        ratio: crop over the short side, above 0 and up to 1; None: crop / (crop + 32).
        interpolation: "auto": the paper's rule, bicubic above 256 pixels, else bilinear.
        antialias: whether the filter widens with the reduction, as Pillow's does and OpenCV's does not.
        mean: what is subtracted from red, green and blue, in 0..255.
        std: what divides them then.
    """

    crop: int
    order: Literal["resize_crop", "crop_resize"] = "resize_crop"
    ratio: float | None = 0.875
    interpolation: Literal["auto", "bilinear", "bicubic"] = "auto"
    antialias: bool = True
    mean: Colour = MEAN
    std: Colour = STD

    @classmethod
    def of(
        cls,
        crop: int,
        protocol: Iterable[tuple[str, Any]],
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> "EvalTransform":
        """Return the transform of a protocol, given as pairs of option and value, and of `to_levels(mean, std)`."""
        return cls(crop, **dict(protocol), **to_levels(mean, std))

    @property
    def resolved_ratio(self) -> float:
        """The ratio as a number."""
        return self.crop / (self.crop + 32) if self.ratio is None else self.ratio

    @property
    def resolved_interpolation(self) -> Literal["bilinear", "bicubic"]:
        """The interpolation that "auto" means."""
        if self.interpolation == "auto":
            return "bicubic" if self.crop > 256 else "bilinear"
        return self.interpolation

    @property
    def short_side(self) -> int:
        """Short side after the resize of "resize_crop", in pixels."""
        return math.floor(self.crop / self.resolved_ratio + 0.5)

    @property
    def protocol(self) -> str:
        """The rule in words, shown beside every accuracy."""
        how = self.resolved_interpolation
        if self.order == "crop_resize":
            rule = f"centre square of {self.resolved_ratio:.6g} of the short side, resized to {self.crop} {how}"
        else:
            rule = f"short side {self.short_side} {how}, centre crop {self.crop}"
        return rule if self.antialias else f"{rule}, no antialiasing"

    def source(self, height: int, width: int) -> Window:
        """Return the window that "resize_crop" resizes: the whole image, or its middle if it is too long.

        See LONGEST_RESIZED; the centre crop lies well within the middle.
        """
        longest = LONGEST_RESIZED * min(height, width)
        h, w = min(height, longest), min(width, longest)
        return (height - h) // 2, (width - w) // 2, h, w

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """Return the size of a source after the resize; the long side is rounded down."""
        short = min(height, width)
        return self.short_side * height // short, self.short_side * width // short

    def window(self, height: int, width: int) -> Window:
        """Return the centre crop of a resized image; odd margins are rounded half to even, as torchvision does."""
        return round((height - self.crop) / 2), round((width - self.crop) / 2), self.crop, self.crop

    def square(self, height: int, width: int) -> Window:
        """Return the window that "crop_resize" takes from an image.

        The side is a real number. Each edge of the square is rounded half to even, as Pillow crops a box of floats, so
        height and width may differ by a pixel. No edge lies outside the image.
        """
        side = self.resolved_ratio * min(height, width)
        top, left = round((height - side) / 2), round((width - side) / 2)
        # A side below a pixel may be rounded to 0.
        return top, left, max(1, round(top + side) - top), max(1, round(left + side) - left)
