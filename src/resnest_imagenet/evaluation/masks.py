"""Masks of objects: converts the cells of a box to pixels of an image, and to COCO's run-length codes."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from resnest_imagenet.errors import import_extra
from resnest_imagenet.instances import RunLengths

THRESHOLD = 0.5  # of the probability that a pixel belongs to an object


class Patch(NamedTuple):
    """A rectangle of an image that contains a mask.

    Attributes:
        pixels: bool (h, w).
        top, left: its corner, in pixels of the image.
    """

    pixels: np.ndarray
    top: int
    left: int


def paste_mask(probabilities: Tensor, box: Sequence[float], size: tuple[int, int]) -> Patch:
    """Return the pixels of an image that belong to an object.

    The probability at the centre of a pixel is interpolated between the centres of the four nearest cells; outside of
    the box it is 0. Only the pixels around the box are computed, because a mask has no others.

    Source: detectron2, layers/mask_ops.py (paste_masks_in_image, _do_paste_mask).

    Args:
        probabilities: float32 (m, m), of the cells of the box.
        box: x1 y1 x2 y2 in pixels of the image, with an area.
        size: (height, width) of the image.
    """
    x1, y1, x2, y2 = box
    columns, rows = _cover(x1, x2, size[1]), _cover(y1, y2, size[0])
    x, y = (
        (torch.arange(pixels.start, pixels.stop, dtype=torch.float32) + 0.5 - low) / (high - low) * 2 - 1
        for pixels, low, high in ((columns, x1, x2), (rows, y1, y2))
    )
    grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)[None]
    pasted = F.grid_sample(probabilities[None, None], grid, align_corners=False)[0, 0]
    return Patch((pasted >= THRESHOLD).numpy(), rows.start, columns.start)


def _cover(low: float, high: float, length: int) -> range:
    """Return the pixels along an axis that a box from `low` to `high` touches, and one more at each end."""
    start = min(max(int(low) - 1, 0), length)
    return range(start, max(start, min(int(high) + 2, length)))


def paste_masks(probabilities: Tensor, boxes: Tensor, size: tuple[int, int]) -> Iterator[Patch]:
    """Yield the pixels of an image that belong to each of n objects; see `paste_mask`.

    Args:
        probabilities: float32 (n, m, m), on the host.
        boxes: float32 (n, 4), x1 y1 x2 y2 in pixels of the image, each with an area.
        size: (height, width) of the image.
    """
    for cells, box in zip(probabilities, boxes.tolist(), strict=True):
        yield paste_mask(cells, box, size)


def encode_patch(patch: Patch, size: tuple[int, int]) -> RunLengths:
    """Return the mask of an image as a compressed run-length code: {"size": [height, width], "counts": bytes}.

    The code runs down the columns. It is computed from the patch alone: for pictures of COCO's size that takes a
    quarter of the time of the encoder, which reads all pixels.

    Args:
        patch: the pixels of the mask, within the image.
        size: (height, width) of the image.
    """
    height, width = size
    padded = np.zeros((patch.pixels.shape[1], patch.pixels.shape[0] + 2), np.int8)
    padded[:, 1:-1] = patch.pixels.T
    columns, rows = np.nonzero(np.diff(padded, axis=1))  # alternating begins and ends of runs
    edges = (columns + patch.left) * height + rows + patch.top
    # A run that ends at the lower border continues in one that begins at the upper border of the next column.
    meets = np.flatnonzero(edges[1:] == edges[:-1])
    edges = np.delete(edges, np.concatenate([meets, meets + 1]))
    counts = np.diff(edges, prepend=0, append=height * width).tolist()
    if counts[-1] == 0:
        del counts[-1]
    return import_masks().frPyObjects({"size": [height, width], "counts": counts}, height, width)


def encode_masks(probabilities: Tensor, boxes: Tensor, size: tuple[int, int]) -> list[bytes]:
    """Return the masks of n objects as compressed run-length codes of the whole image, without its size.

    Args:
        probabilities: float32 (n, m, m), see `paste_masks`.
        boxes: float32 (n, 4).
        size: (height, width) of the image.
    """
    return [encode_patch(patch, size)["counts"] for patch in paste_masks(probabilities, boxes, size)]


def decode_mask(counts: bytes, size: tuple[int, int]) -> np.ndarray:
    """Return the pixels of a mask, bool (height, width).

    Args:
        counts: a compressed run-length code.
        size: (height, width) of the image.
    """
    return import_masks().decode({"size": list(size), "counts": counts}).astype(bool)


def measure_area(counts: bytes, size: tuple[int, int]) -> int:
    """Return the number of pixels of a mask; see `decode_mask`."""
    return int(import_masks().area({"size": list(size), "counts": counts}))


def import_masks() -> Any:
    """Return pycocotools.mask; raise a ConfigError if it is not installed."""
    return import_extra("pycocotools.mask")
