"""The objects that a detector should find in the images of a set, from a file in COCO's form."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from resnest_imagenet.errors import DataError
from resnest_imagenet.evaluation.masks import import_masks, measure_area

Size = tuple[int, int]


@dataclass(frozen=True, eq=False)
class GroundTruth:
    """The G objects in the N images of a set, with K classes.

    Attributes:
        image_ids: (N,) int64, the data set's own numbers of the images, in the order of the set.
        sizes: (N, 2) int64, (height, width) of each image in pixels.
        category_ids: (K,) int64, the data set's own numbers of the classes, in the order of the labels.
        classes: K names.
        images: (G,) int64, the image of each object, by its index in the set.
        labels: (G,) int64, its class, 0..K-1.
        boxes: (G, 4) float64, x y width height in pixels, as the file has them.
        areas: (G,) float64, in pixels: which objects are small, medium and large is told by it.
        crowds: (G,) bool: several objects in one; finding it neither counts nor is an error.
        masks: G compressed run-length codes of whole images; None: none were read.
    """

    image_ids: np.ndarray
    sizes: np.ndarray
    category_ids: np.ndarray
    classes: tuple[str, ...]
    images: np.ndarray
    labels: np.ndarray
    boxes: np.ndarray
    areas: np.ndarray
    crowds: np.ndarray
    masks: tuple[bytes, ...] | None = None

    def __len__(self) -> int:
        return len(self.images)

    def size(self, image: int) -> Size:
        """Return (height, width) of an image in pixels."""
        height, width = self.sizes[image].tolist()
        return height, width

    def count_objects(self) -> np.ndarray:
        """Return the objects of each class that are no crowd, int64 (K,)."""
        return np.bincount(self.labels[~self.crowds], minlength=len(self.classes))


def read_ground_truth(
    path: Path,
    image_ids: np.ndarray,
    sizes: np.ndarray,
    category_ids: np.ndarray,
    classes: Sequence[str],
    *,
    masks: bool,
) -> GroundTruth:
    """Read the objects of some images from a file in COCO's form.

    As with COCO's own evaluation, crowds, objects without an area and those outside of the image are read, and objects
    of other images and categories are not. Where the file has no "iscrowd" it is 0, and where it has no "area" it is
    that of the mask, or of the box.

    Args:
        path: of the file.
        image_ids: (N,) int64, see `GroundTruth`.
        sizes: (N, 2) int64, (height, width) of each image as the file has them.
        category_ids: (K,) int64.
        classes: K names.
        masks: whether the masks are read too.

    Raises:
        DataError: the file cannot be read, an object has no box, or no mask of its image's size, or none of the objects
            counts.
        ConfigError: pycocotools is not installed.
    """
    sizes = np.asarray(sizes, np.int64).reshape(-1, 2)
    index_of = {number: index for index, number in enumerate(image_ids.tolist())}
    label_of = {number: label for label, number in enumerate(category_ids.tolist())}
    rows: list[tuple[float, ...]] = []
    codes: list[bytes] = []
    for name, annotation in _list_annotations(path):
        image, label = (_look_up(annotation, *key) for key in (("image_id", index_of), ("category_id", label_of)))
        if image is None or label is None:
            continue
        size = (int(sizes[image, 0]), int(sizes[image, 1]))
        try:
            box = _read_box(annotation)
            if masks:
                codes.append(_encode(annotation.get("segmentation"), size))
            area = _read_area(annotation, box, codes[-1] if masks else None, size)
        except ValueError as error:
            raise DataError(f"{path}: {name}: {error}") from error
        rows.append((image, label, *box, area, bool(annotation.get("iscrowd", 0))))
    table = np.array(rows, np.float64).reshape(-1, 8)
    truth = GroundTruth(
        *(image_ids, sizes, category_ids, tuple(classes)),
        *(table[:, 0].astype(np.int64), table[:, 1].astype(np.int64), table[:, 2:6], table[:, 6]),
        crowds=table[:, 7].astype(bool),
    )
    if truth.crowds.all():
        raise DataError(f"{path}: no objects in the {len(image_ids)} images, so that there is nothing to evaluate")
    return replace(truth, masks=tuple(codes)) if masks else truth


def _list_annotations(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the annotations of a file, each with a name for messages."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"not JSON: {error}"
        raise DataError(f"{path}: {reason}") from error
    annotations = content.get("annotations") if isinstance(content, dict) else None
    if not isinstance(annotations, list):
        raise DataError(f"{path}: it has no list of annotations")
    for number, annotation in enumerate(annotations):
        name = f"annotation {number + 1}"
        if not isinstance(annotation, dict):
            raise DataError(f"{path}: {name} is no object")
        yield f"{name} (id {annotation['id']})" if "id" in annotation else name, annotation


def _look_up(annotation: Mapping[str, Any], key: str, numbers: Mapping[Any, int]) -> int | None:
    value = annotation.get(key)
    return numbers.get(value) if isinstance(value, int | float) else None


def _read_box(annotation: Mapping[str, Any]) -> list[float]:
    box = annotation.get("bbox")
    if not isinstance(box, list) or len(box) != 4 or not all(_is_number(value) for value in box):
        raise ValueError("its bbox is not [x, y, width, height]")
    return box


def _read_area(annotation: Mapping[str, Any], box: Sequence[float], code: bytes | None, size: Size) -> float:
    area = annotation.get("area")
    if area is None:
        return box[2] * box[3] if code is None else measure_area(code, size)
    if not _is_number(area):
        raise ValueError("its area is no number")
    return area


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) < float("inf")  # which NaN is not


def _encode(segmentation: Any, size: Size) -> bytes:
    """Return a mask of any of COCO's three forms as a compressed run-length code.

    Source: pycocotools, coco.py (annToRLE).

    Raises:
        ValueError: it is none of them, or not of the image's size.
    """
    mask = import_masks()
    if isinstance(segmentation, list) and segmentation:
        try:
            return mask.merge(mask.frPyObjects(segmentation, *size))["counts"]
        except Exception as error:  # it raises plain ones
            raise ValueError("its segmentation has a polygon that is no list of x and y") from error
    if not isinstance(segmentation, dict) or not {"size", "counts"} <= segmentation.keys():
        raise ValueError("it has no segmentation")
    if segmentation["size"] != list(size):
        raise ValueError(f"its mask is of an image of {segmentation['size']}, not of {list(size)}")
    counts = segmentation["counts"]
    if isinstance(counts, list):
        try:
            return mask.frPyObjects(segmentation, *size)["counts"]
        except (TypeError, OverflowError, ValueError) as error:
            raise ValueError("its run-length code has other things than lengths") from error
    return counts.encode() if isinstance(counts, str) else counts
