"""The operations of `augment.Op` on Pillow images: their definition, and what the torchvision loader applies.

They are Pillow's own functions where it has one. The tests compare `dali_ops.py` with them.
"""

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageOps

from resnest_imagenet.data.augment import CUTOUT_COLOUR, Op

Picture = Image.Image


def apply_operations(image: Picture, operations: np.ndarray) -> Picture:
    """Apply operations (Op, value, x, y) in order; operations: (S, 4)."""
    for op, value, x, y in operations.tolist():
        image = OPERATIONS[Op(int(op))](image, value, x, y)
    return image


def _solarize_add(image: Picture, value: float) -> Picture:
    table = [min(pixel + int(value), 255) for pixel in range(256)] * 3
    return ImageOps.solarize(image.point(table), 128)


def _map_back(image: Picture, *matrix: float, bicubic: bool = False) -> Picture:
    """Take the pixel at (x, y) from (a x + b y + c, d x + e y + f)."""
    resample = Image.Resampling.BICUBIC if bicubic else Image.Resampling.NEAREST
    return image.transform(image.size, Image.Transform.AFFINE, matrix, resample)


def _cutout(image: Picture, side: float, x: float, y: float) -> Picture:
    """Fill a square around a point, including both its edges, as far as it lies in the image."""
    width, height = image.size
    left, top = int(max(0, x * width - side / 2)), int(max(0, y * height - side / 2))
    right, bottom = min(width, left + side), min(height, top + side)
    image = image.copy()
    ImageDraw.Draw(image).rectangle((left, top, right, bottom), CUTOUT_COLOUR)
    return image


OPERATIONS: dict[Op, Callable[[Picture, float, float, float], Picture]] = {
    Op.IDENTITY: lambda image, *_: image,
    Op.AUTO_CONTRAST: lambda image, *_: ImageOps.autocontrast(image),
    Op.EQUALIZE: lambda image, *_: ImageOps.equalize(image),
    Op.INVERT: lambda image, *_: ImageOps.invert(image),
    Op.POSTERIZE: lambda image, value, *_: ImageOps.posterize(image, int(value)),
    Op.SOLARIZE: lambda image, value, *_: ImageOps.solarize(image, value),
    Op.SOLARIZE_ADD: lambda image, value, *_: _solarize_add(image, value),
    Op.BRIGHTNESS: lambda image, value, *_: ImageEnhance.Brightness(image).enhance(value),
    Op.COLOR: lambda image, value, *_: ImageEnhance.Color(image).enhance(value),
    Op.CONTRAST: lambda image, value, *_: ImageEnhance.Contrast(image).enhance(value),
    Op.SHARPNESS: lambda image, value, *_: ImageEnhance.Sharpness(image).enhance(value),
    Op.ROTATE: lambda image, value, *_: image.rotate(value),
    Op.SHEAR_X: lambda image, value, *_: _map_back(image, 1, value, 0, 0, 1, 0),
    Op.SHEAR_Y: lambda image, value, *_: _map_back(image, 1, 0, 0, value, 1, 0),
    Op.SHEAR_X_BICUBIC: lambda image, value, *_: _map_back(image, 1, value, 0, 0, 1, 0, bicubic=True),
    Op.SHEAR_Y_BICUBIC: lambda image, value, *_: _map_back(image, 1, 0, 0, value, 1, 0, bicubic=True),
    Op.TRANSLATE_X: lambda image, value, *_: _map_back(image, 1, 0, value, 0, 1, 0),
    Op.TRANSLATE_Y: lambda image, value, *_: _map_back(image, 1, 0, 0, 0, 1, value),
    Op.TRANSLATE_X_REL: lambda image, value, *_: _map_back(image, 1, 0, int(value * image.width), 0, 1, 0),
    Op.TRANSLATE_Y_REL: lambda image, value, *_: _map_back(image, 1, 0, 0, 0, 1, int(value * image.height)),
    Op.CUTOUT: _cutout,
}
