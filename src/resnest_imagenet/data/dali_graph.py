"""The DALI loader's graphs: decoding, cropping, augmentation and normalisation.

Image sizes are known only inside the graph, so the graph calls the rules of `transforms.py`.
"""

from collections.abc import Callable, Sequence
from functools import partial

from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.data_node import DataNode

from resnest_imagenet.data.augment import PIXELWISE
from resnest_imagenet.data.dali_decoding import Vectors, compute_by_size, decode_window
from resnest_imagenet.data.dali_ops import apply_operations
from resnest_imagenet.data.decoders import Decoder
from resnest_imagenet.data.transforms import (
    Colour,
    ERandomCrop,
    EvalTransform,
    RandomResizedCrop,
    TrainTransform,
    Window,
)

INTERPOLATIONS = {"bilinear": types.INTERP_LINEAR, "bicubic": types.INTERP_CUBIC}

Source = Callable[[], tuple]


def _split(window: Window) -> Vectors:
    top, left, *size = window
    return (top, left), size


def _find_window(cropping: RandomResizedCrop | ERandomCrop, height: int, width: int, draw: Sequence[float]) -> Vectors:
    return _split(cropping.window(height, width, draw))


def _find_decoded_and_window(
    cropping: RandomResizedCrop | ERandomCrop,
    height: int,
    width: int,
    draw: Sequence[float],
    operations: Sequence[Sequence[float]],
) -> Vectors:
    """Return the window to decode, and the window of the crop in it; operations: those before the crop."""
    start, shape = _find_window(cropping, height, width, draw)
    if all(op in PIXELWISE for op, *_ in operations):
        return start, shape, (0, 0), shape
    return (0, 0), (height, width), start, shape


def _find_square(transform: EvalTransform, height: int, width: int) -> Vectors:
    return _split(transform.square(height, width))


def _find_centre(transform: EvalTransform, height: int, width: int) -> Vectors:
    """Return the window to resize (start, shape), its size after that, and the start of the centre crop in it."""
    start, shape = _split(transform.source(height, width))
    size = transform.resized(*shape)
    return start, shape, size, transform.window(*size)[:2]


def _normalise(images: DataNode, mean: DataNode | Colour, std: Colour, mirror: DataNode | int = 0) -> DataNode:
    # The channels stay last: permuted to NCHW, that is channels_last.
    return fn.crop_mirror_normalize(images, mirror=mirror, mean=mean, std=std, dtype=types.FLOAT, output_layout="HWC")


@pipeline_def(enable_conditionals=True)
def train_pipeline(source: Source, transform: TrainTransform, decoder: Decoder) -> tuple[DataNode, DataNode]:
    """Return the graph's images, normalised (crop, crop, 3), and labels; the source is of `dali.DaliLoader`."""
    before, after = transform.augmentation.slots_before, transform.augmentation.slots_after
    # Ask for the operations and vertical flips only if there are some: DALI warns about an unused input.
    num_outputs = 5 + bool(before or after) + bool(transform.vertical_flip)
    encoded, labels, draw, mirror, mean, *drawn = fn.external_source(source, num_outputs=num_outputs)
    if before:
        rule = partial(_find_decoded_and_window, transform.cropping)
        *decoded, start, shape = compute_by_size(rule, 4, encoded, draw, drawn[0][: len(before)])
        images = apply_operations(decode_window(encoded, tuple(decoded), decoder), drawn[0], before)
        images = fn.slice(images, start=start, shape=shape, axes=[0, 1])
    else:
        images = decode_window(
            encoded, compute_by_size(partial(_find_window, transform.cropping), 2, encoded, draw), decoder
        )
    resampling = {"interp_type": INTERPOLATIONS[transform.interpolation], "antialias": transform.antialias}
    images = fn.resize(images, size=[transform.crop] * 2, **resampling)
    if after:
        images = apply_operations(images, drawn[0][len(before) :], after)
    if transform.vertical_flip:
        images = fn.flip(images, horizontal=0, vertical=drawn[-1])
    return _normalise(images, mean, transform.std, mirror), labels


@pipeline_def
def eval_pipeline(source: Source, transform: EvalTransform, decoder: Decoder) -> tuple[DataNode, DataNode]:
    """Return the graph's images, normalised (crop, crop, 3), and labels."""
    encoded, labels = fn.external_source(source, num_outputs=2)
    crop = transform.crop
    resampling = {"interp_type": INTERPOLATIONS[transform.resolved_interpolation], "antialias": transform.antialias}
    if transform.order == "crop_resize":
        images = decode_window(encoded, compute_by_size(partial(_find_square, transform), 2, encoded), decoder)
        images = fn.resize(images, size=[crop, crop], **resampling)
    else:
        *window, size, corner = compute_by_size(partial(_find_centre, transform), 4, encoded)
        images = decode_window(encoded, tuple(window), decoder)
        images = fn.resize(images, size=fn.cast(size, dtype=types.FLOAT), **resampling)
        images = fn.slice(images, start=corner, shape=[crop, crop], axes=[0, 1])
    return _normalise(images, transform.mean, transform.std), labels
