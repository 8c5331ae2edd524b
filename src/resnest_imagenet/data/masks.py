"""Masks of objects: checks and packs them when they are read, then scales and mirrors them with their image.

pycocotools encodes and decodes run-length codes; polygons alone need no library.
"""

import itertools
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, overload

import numpy as np
from PIL import Image

from resnest_imagenet.errors import import_extra
from resnest_imagenet.instances import Mask

_BITS = 5  # of a number in each character of a run-length code
_MORE, _SIGN = 0x20, 0x10  # bits of a character: another one follows; of a number's last: it is negative
_FIRST = 48  # the character "0" stands for 0


@dataclass(frozen=True, eq=False)
class PackedMasks(Sequence[Mask]):
    """The masks of M objects in a few arrays, so that worker processes share the memory of a whole data set.

    Attributes:
        coordinates: float64 (C,), x y x y ... of all polygons. float32 would round COCO's hundredths of pixels, and
            pycocotools, which rasterises by fifths, would put 2 pixels of a mask on the other side of an edge.
        bounds: int64 (P + 1,), polygon p has coordinates[bounds[p] : bounds[p + 1]].
        polygons: int64 (M, 2), object m has the polygons polygons[m, 0] up to, not including, polygons[m, 1].
        codes: all compressed run-length codes, concatenated.
        places: int64 (M, 2), begin and end of object m's code; equal if it has polygons.
        sizes: int32 (M, 2), (height, width) of a run-length code; 0 of polygons.
    """

    coordinates: np.ndarray
    bounds: np.ndarray
    polygons: np.ndarray
    codes: bytes
    places: np.ndarray
    sizes: np.ndarray

    def __len__(self) -> int:
        return len(self.polygons)

    @overload
    def __getitem__(self, index: int) -> Mask: ...
    @overload
    def __getitem__(self, index: slice) -> list[Mask]: ...

    def __getitem__(self, index: int | slice) -> Mask | list[Mask]:
        """Return a mask; [] if the object has none."""
        if isinstance(index, slice):
            return [self[position] for position in range(*index.indices(len(self)))]
        begin, end = self.places[index].tolist()
        if end > begin:
            return {"size": self.sizes[index].tolist(), "counts": self.codes[begin:end]}
        bounds = self.bounds[slice(*(self.polygons[index] + (0, 1)))].tolist()
        return [self.coordinates[start:stop] for start, stop in itertools.pairwise(bounds)]

    @property
    def is_empty(self) -> np.ndarray:
        """Whether an object has no mask, bool (M,)."""
        return (self.polygons[:, 0] == self.polygons[:, 1]) & (self.places[:, 0] == self.places[:, 1])

    def select(self, indices: np.ndarray) -> "PackedMasks":
        """Return the masks of some objects, in this order, as views."""
        rows = {name: getattr(self, name)[indices] for name in ("polygons", "places", "sizes")}
        return replace(self, **rows)


class MaskPacker:
    """Packs masks in the form of a JSON file, one by one."""

    def __init__(self) -> None:
        self._coordinates, self._bounds = array("d"), array("q", [0])
        self._polygons, self._places, self._sizes = array("q"), array("q"), array("i")
        self._codes = bytearray()

    def add(self, mask: Any) -> None:
        """Add the mask of one object; None: it has none.

        Polygons of fewer than three points, or of half a point, are skipped, as detectron2 does
        (detectron2/data/datasets/coco.py).

        Raises:
            ValueError: it is not a mask, and was not added.
        """
        num_polygons, num_bytes, size = len(self._bounds) - 1, len(self._codes), (0, 0)
        if isinstance(mask, dict):
            code, size = read_run_lengths(mask)
            self._codes += code
        elif mask is not None:
            self._add_polygons(mask)
        self._polygons.extend((num_polygons, len(self._bounds) - 1))
        self._places.extend((num_bytes, len(self._codes)))
        self._sizes.extend(size)

    def _add_polygons(self, polygons: Any) -> None:
        before, num_bounds = len(self._coordinates), len(self._bounds)
        try:
            for polygon in polygons:
                if not isinstance(polygon, list):
                    raise TypeError
                if len(polygon) >= 6 and len(polygon) % 2 == 0:
                    self._coordinates.extend(polygon)
                    self._bounds.append(len(self._coordinates))
        except TypeError:
            del self._coordinates[before:], self._bounds[num_bounds:]
            what = "neither lists of numbers (polygons) nor a run-length code with size and counts"
            raise ValueError(f"its segmentation is {what}") from None

    def pack(self) -> PackedMasks:
        """Return all masks that were added."""
        return PackedMasks(
            np.frombuffer(self._coordinates, np.float64) if self._coordinates else np.zeros(0),
            np.array(self._bounds, np.int64),
            np.array(self._polygons, np.int64).reshape(-1, 2),
            bytes(self._codes),
            np.array(self._places, np.int64).reshape(-1, 2),
            np.array(self._sizes, np.int32).reshape(-1, 2),
        )


def require_pycocotools() -> None:
    """Raise a ConfigError if the library of run-length codes is not installed."""
    import_extra("pycocotools.mask")


def read_run_lengths(mask: dict[str, Any]) -> tuple[bytes, tuple[int, int]]:
    """Return the compressed code of a mask with `size` and `counts`, and its (height, width).

    The lengths are checked here: pycocotools with NumPy 1 takes -5 as 4,294,967,291.

    Raises:
        ValueError: it is not a run-length code, is damaged, or does not have as many pixels as its size.
    """
    size, counts = mask.get("size"), mask.get("counts")
    if not (isinstance(size, list) and len(size) == 2 and all(type(side) is int and side > 0 for side in size)):
        raise ValueError("the size of its segmentation is not [height, width]")
    height, width = size
    if isinstance(counts, str):
        code = counts.encode("ascii", "replace")
        num_pixels = count_pixels(code)
    elif isinstance(counts, list) and all(type(run) is int and run >= 0 for run in counts):
        num_pixels = sum(counts)
    else:
        raise ValueError("the counts of its segmentation are neither a string nor whole numbers")
    if num_pixels != height * width:
        what = "are damaged" if num_pixels is None else f"are of {num_pixels:,} pixels"
        raise ValueError(f"the counts of its segmentation {what}, its size is {height} x {width}")
    if isinstance(counts, list):
        code = import_extra("pycocotools.mask").frPyObjects({"size": size, "counts": counts}, height, width)["counts"]
    return code, (height, width)


def count_pixels(code: bytes) -> int | None:
    """Return the number of pixels of a compressed run-length code; None if it is damaged.

    pycocotools decodes some damaged codes to random memory. A run is a number with 5 bits per character, the lowest
    first; from the fourth run on it is the difference from the last but one (cocoapi, common/maskApi.c).
    """
    values = np.frombuffer(code, np.uint8).astype(np.int64) - _FIRST
    ends = np.flatnonzero(values & _MORE == 0)
    if len(ends) == 0 or ends[-1] != len(values) - 1 or values.min() < 0 or values.max() >= 64:
        return None
    starts = np.append(0, ends[:-1] + 1)
    lengths = ends + 1 - starts
    if lengths.max() > 7:  # more bits than a run has
        return None
    digits = np.arange(len(values)) - np.repeat(starts, lengths)
    runs = np.add.reduceat((values & 31) << _BITS * digits, starts)
    runs[values[ends] & _SIGN > 0] -= (1 << _BITS * lengths)[values[ends] & _SIGN > 0]
    runs[1::2], runs[2::2] = np.cumsum(runs[1::2]), np.cumsum(runs[2::2])
    return None if runs.min() < 0 else int(runs.sum())


def move_mask(mask: Mask, original: tuple[int, int], size: tuple[int, int], is_mirrored: bool) -> Mask | None:
    """Scale a mask with its image, then mirror it from left to right.

    A run-length code is scaled by Pillow's nearest filter, as in detectron2.

    Args:
        mask: polygons or a run-length code.
        original: (height, width) of the image.
        size: (height, width) of the scaled image.
        is_mirrored: whether it is then mirrored.

    Returns:
        The moved mask; None if a run-length code has no pixels afterwards.
    """
    (height, width), (new_height, new_width) = original, size
    if isinstance(mask, list):
        factors = np.array([new_width / width, new_height / height])
        moved = [(polygon.reshape(-1, 2) * factors) for polygon in mask]
        if is_mirrored:
            for polygon in moved:
                polygon[:, 0] = new_width - polygon[:, 0]
        return [polygon.ravel() for polygon in moved]
    from pycocotools.mask import decode, encode

    # By columns, as codes run: Pillow gets the transposed mask.
    pixels = np.array(Image.fromarray(decode(mask).T).resize((new_height, new_width), Image.Resampling.NEAREST))
    if is_mirrored:
        pixels = np.ascontiguousarray(pixels[::-1])
    return encode(pixels.T) if pixels.any() else None
