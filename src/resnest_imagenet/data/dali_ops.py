"""The operations of `augment.Op` on DALI's images, (H, W, 3) uint8: `pillow_ops.py` in a DALI graph.

Where Pillow truncates and DALI rounds, a little less than a half is subtracted first.
"""

from collections.abc import Callable, Collection, Sequence

import numpy as np
from nvidia.dali import fn, math, types
from nvidia.dali.data_node import DataNode
from nvidia.dali.pipeline import do_not_convert

from resnest_imagenet.data.augment import CUTOUT_COLOUR, Op

TRUNCATION = -0.499  # not -0.5: a float32 result may lie slightly below the exact integer
LONGEST_SIDE = 1 << 16  # of an image, in pixels


def apply_operations(images: DataNode, operations: DataNode, slots: Sequence[Collection[Op]]) -> DataNode:
    """Apply operations (Op, value, x, y) in order.

    Args:
        images: the images.
        operations: float32 (S, 4) for each image.
        slots: the operations that occur at each of the S places.
    """
    for place, ops in enumerate(slots):
        images = _apply_one_of(sorted(ops), images, operations[place])
    return images


def _apply_one_of(ops: Sequence[Op], images: DataNode, operation: DataNode) -> DataNode:
    """Choose for each image by bisection: DALI runs both sides of an `if`, each on its share of the batch."""
    if len(ops) == 0:
        return images
    if len(ops) == 1:
        if operation[0] == int(ops[0]):
            images = _apply(ops[0], images, operation)
        return images
    middle = len(ops) // 2
    if operation[0] < int(ops[middle]):
        images = _apply_one_of(ops[:middle], images, operation)
    else:
        images = _apply_one_of(ops[middle:], images, operation)
    return images


@do_not_convert  # the operations have no conditionals: DALI would take a second or two to rewrite their source
def _apply(op: Op, images: DataNode, operation: DataNode) -> DataNode:
    return OPERATIONS[op](images, operation[1], operation[2], operation[3])


def _to_uint8(images: DataNode) -> DataNode:
    return fn.cast(images + TRUNCATION, dtype=types.UINT8)


def _blend(degenerate: DataNode, images: DataNode, factor: DataNode) -> DataNode:
    return _to_uint8(images * factor + degenerate * (1 - factor))


def _to_grey(images: DataNode) -> DataNode:
    return fn.color_space_conversion(images, image_type=types.RGB, output_type=types.GRAY)


def _size(images: DataNode) -> tuple[DataNode, DataNode]:
    size = images.shape(dtype=types.FLOAT)
    return size[0], size[1]


def _invert(images: DataNode, *_: DataNode) -> DataNode:
    return images ^ np.uint8(255)


def _equalize(images: DataNode, *_: DataNode) -> DataNode:
    # For each level, DALI counts the pixels up to it, Pillow those below it: on the inverted image the two agree.
    # Pillow also rounds pixels / 255 down: a difference of up to 1 + 255 * 255 / pixels levels remains.
    return _invert(fn.equalize(_invert(images)))


def _auto_contrast(images: DataNode, *_: DataNode) -> DataNode:
    low = fn.cast(fn.reductions.min(images, axes=[0, 1]), dtype=types.FLOAT)
    high = fn.cast(fn.reductions.max(images, axes=[0, 1]), dtype=types.FLOAT)
    flat = fn.cast(high == low, dtype=types.FLOAT)  # a flat channel does not change
    return _to_uint8((images - low * (1 - flat)) * (255 / (high - low + 255 * flat)))


def _posterize(images: DataNode, bits: DataNode, *_: DataNode) -> DataNode:
    return images & fn.cast(256 - math.pow(2, 8 - bits), dtype=types.UINT8)


def _solarize(images: DataNode, threshold: DataNode | int, *_: DataNode) -> DataNode:
    return images ^ (fn.cast(images >= threshold, dtype=types.UINT8) * np.uint8(255))


def _solarize_add(images: DataNode, value: DataNode, *_: DataNode) -> DataNode:
    return _solarize(fn.brightness(images, brightness_shift=math.floor(value) / 255), 128)


def _brightness(images: DataNode, factor: DataNode, *_: DataNode) -> DataNode:
    return fn.brightness(images, brightness=factor, brightness_shift=TRUNCATION / 255)


def _color(images: DataNode, factor: DataNode, *_: DataNode) -> DataNode:
    return _blend(_to_grey(images), images, factor)


def _contrast(images: DataNode, factor: DataNode, *_: DataNode) -> DataNode:
    mean = math.floor(fn.reductions.mean(_to_grey(images)) + 0.5)
    if images.device == "gpu":  # the mean is there too, and DALI takes arguments only from the CPU
        return _blend(mean, images, factor)
    return fn.brightness_contrast(images, contrast=factor, contrast_center=mean, brightness_shift=TRUNCATION / 255)


def _sharpness(images: DataNode, factor: DataNode, *_: DataNode) -> DataNode:
    kernel = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13
    smoothed = fn.filter(images, types.Constant(kernel, device=images.device))
    height, width = _size(images)
    # Pillow does not change the outermost pixels.
    border = fn.erase(images | np.uint8(255), anchor=[1.0, 1.0], shape=fn.stack(height - 2, width - 2))
    return (_blend(smoothed, images, factor) & _invert(border)) | (images & border)


def _rotate(images: DataNode, degrees: DataNode, *_: DataNode) -> DataNode:
    height, width = _size(images)
    return _warp(images, fn.transforms.rotation(angle=degrees, center=fn.stack(width / 2, height / 2)), fill_value=0)


def _warp(images: DataNode, matrix: DataNode, fill_value: float | None = None) -> DataNode:
    """Take each pixel (x, y) from the place that the matrix (2, 3) maps it to; outside, from the nearest edge pixel."""
    return fn.warp_affine(images, matrix=matrix, inverse_map=True, interp_type=types.INTERP_NN, fill_value=fill_value)


def _rows(*values: DataNode | float) -> DataNode:
    """Return a matrix (2, 3) with these six scalars."""
    nodes = [fn.cast(value, dtype=types.FLOAT) if isinstance(value, DataNode) else _scalar(value) for value in values]
    return fn.reshape(fn.stack(*nodes), shape=[2, 3])


def _scalar(value: float) -> DataNode:
    return types.Constant(value, dtype=types.FLOAT, shape=[], device="cpu")


def _shear_matrix(slope: DataNode, axis: int, shift: float = 0) -> DataNode:
    """Return the matrix of a shear along x (axis 1) or y (axis 0), with a shift along the same axis."""
    return _rows(1, slope, shift, 0, 1, 0) if axis == 1 else _rows(1, 0, 0, slope, 1, shift)


def _shear(images: DataNode, slope: DataNode, axis: int) -> DataNode:
    return _warp(images, _shear_matrix(slope, axis), fill_value=0)


def _shear_bicubic(images: DataNode, slope: DataNode, axis: int) -> DataNode:
    """Shear with Keys' cubic of a = -1, as Pillow's `transform` does; DALI's warp has no cubic.

    All pixels of a line are shifted by the same fraction, so the result is four copies of the image, shifted by whole
    pixels and weighted by line.
    """
    across = 1 - axis
    number = fn.cast(images.shape()[across : across + 1], dtype=types.INT32)
    every_line = types.Constant(np.arange(LONGEST_SIDE, dtype=np.float32), device="cpu")
    distance = slope * (fn.slice(every_line, start=[0], shape=number, axes=[0]) + 0.5)
    t = fn.reshape(distance - math.floor(distance), shape=[1, -1, 1] if across == 1 else [-1, 1, 1])
    if images.device == "gpu":
        t = t.gpu()
    weights = (-t * (1 - t) * (1 - t), 1 - t * t * (2 - t), t + t * t * (1 - t), -t * t * (1 - t))
    sheared = sum(weight * _warp(images, _shear_matrix(slope, axis, tap - 1.5)) for tap, weight in enumerate(weights))
    inside = _warp(images | np.uint8(255), _shear_matrix(slope, axis), fill_value=0)
    return _to_uint8(sheared) & inside


def _translate(images: DataNode, x: DataNode | float, y: DataNode | float) -> DataNode:
    return _warp(images, _rows(1, 0, x, 0, 1, y), fill_value=0)


def _toward_zero(value: DataNode) -> DataNode:
    return math.floor(math.max(value, 0)) + math.ceil(math.min(value, 0))


def _translate_x_rel(images: DataNode, share: DataNode, *_: DataNode) -> DataNode:
    return _translate(images, _toward_zero(share * _size(images)[1]), 0)


def _translate_y_rel(images: DataNode, share: DataNode, *_: DataNode) -> DataNode:
    return _translate(images, 0, _toward_zero(share * _size(images)[0]))


def _cutout(images: DataNode, side: DataNode, x: DataNode, y: DataNode) -> DataNode:
    height, width = _size(images)
    top = math.floor(math.max(y * height - side / 2, 0))
    left = math.floor(math.max(x * width - side / 2, 0))
    # Both edges belong to the square.
    return fn.erase(
        images, anchor=fn.stack(top, left), shape=fn.stack(side + 1, side + 1), fill_value=list(CUTOUT_COLOUR)
    )


OPERATIONS: dict[Op, Callable[[DataNode, DataNode, DataNode, DataNode], DataNode]] = {
    Op.AUTO_CONTRAST: _auto_contrast,
    Op.EQUALIZE: _equalize,
    Op.INVERT: _invert,
    Op.POSTERIZE: _posterize,
    Op.SOLARIZE: _solarize,
    Op.SOLARIZE_ADD: _solarize_add,
    Op.BRIGHTNESS: _brightness,
    Op.COLOR: _color,
    Op.CONTRAST: _contrast,
    Op.SHARPNESS: _sharpness,
    Op.ROTATE: _rotate,
    Op.SHEAR_X: lambda images, slope, *_: _shear(images, slope, axis=1),
    Op.SHEAR_Y: lambda images, slope, *_: _shear(images, slope, axis=0),
    Op.SHEAR_X_BICUBIC: lambda images, slope, *_: _shear_bicubic(images, slope, axis=1),
    Op.SHEAR_Y_BICUBIC: lambda images, slope, *_: _shear_bicubic(images, slope, axis=0),
    Op.TRANSLATE_X: lambda images, pixels, *_: _translate(images, pixels, 0),
    Op.TRANSLATE_Y: lambda images, pixels, *_: _translate(images, 0, pixels),
    Op.TRANSLATE_X_REL: _translate_x_rel,
    Op.TRANSLATE_Y_REL: _translate_y_rel,
    Op.CUTOUT: _cutout,
}
