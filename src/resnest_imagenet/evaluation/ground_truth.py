"""The ground truth of an evaluation: the objects in the images of a set, from a file in COCO's form."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from resnest_imagenet.data.coco import Instances
from resnest_imagenet.data.masks import read_run_lengths
from resnest_imagenet.errors import DataError
from resnest_imagenet.evaluation.masks import import_masks, measure_area

Size = tuple[int, int]


@dataclass(frozen=True, eq=False)
class GroundTruth:
    """The G objects in the N images of a set, with K classes.

    Attributes:
        image_ids: (N,) int64, numbers of the images in the file, in the order of the set.
        sizes: (N, 2) int64, (height, width) of each image in pixels.
        category_ids: (K,) int64, numbers of the classes in the file, in the order of the labels.
        classes: K names.
        images: (G,) int64, the image of each object, by its index in the set.
        labels: (G,) int64, its class, 0..K-1.
        boxes: (G, 4) float64, x y width height in pixels, as in the file.
        areas: (G,) float64, in pixels: they decide which objects are small, medium and large.
        crowds: (G,) bool: several objects in one annotation; a detection of it is neither correct nor an error.
        masks: G compressed run-length codes of whole images; None: not read.
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
        """Return the number of objects of each class, without crowds, int64 (K,)."""
        return np.bincount(self.labels[~self.crowds], minlength=len(self.classes))


def open_ground_truth(instances: Instances, *, masks: bool) -> GroundTruth:
    """Read the objects and crowds of an evaluation; see `read_ground_truth`.

    Args:
        instances: of `open_coco`.
        masks: whether to read the masks too.
    """
    numbers = (instances.image_ids, instances.sizes, instances.category_ids)
    return read_ground_truth(instances.json, *numbers, instances.classes, masks=masks)


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

    As in COCO's own evaluation, crowds, objects without an area and objects outside of the image are read; objects of
    other images and categories are not. A missing "iscrowd" is 0, a missing "area" is that of the mask, or of the box.

    Args:
        path: of the file.
        image_ids: (N,) int64, see `GroundTruth`.
        sizes: (N, 2) int64, (height, width) of each image, as in the file.
        category_ids: (K,) int64.
        classes: K names.
        masks: whether to read the masks too.

    Raises:
        DataError: the file cannot be read; an object has no box, or no mask of its image's size; or there are only
            crowds.
        ConfigError: pycocotools is not installed.
    """
    sizes = np.asarray(sizes, np.int64).reshape(-1, 2)
    packer = _Packer(path, image_ids, sizes, category_ids, masks)
    try:
        content = json.loads(path.read_bytes(), object_hook=packer.take)
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"not JSON: {error}"
        raise DataError(f"{path}: {reason}") from error
    annotations = content.get("annotations") if isinstance(content, dict) else None
    if not isinstance(annotations, list):
        raise DataError(f"{path}: it has no list of annotations")
    for number, annotation in enumerate(annotations, start=1):
        if annotation is not None:  # not packed
            raise DataError(f"{path}: annotation {number} is not an object with an image_id")
    table = np.array(packer.rows, np.float64).reshape(-1, 8)
    truth = GroundTruth(
        *(image_ids, sizes, category_ids, tuple(classes)),
        *(table[:, 0].astype(np.int64), table[:, 1].astype(np.int64), table[:, 2:6], table[:, 6]),
        crowds=table[:, 7].astype(bool),
    )
    if truth.crowds.all():
        raise DataError(f"{path}: no objects in the {len(image_ids)} images: there is nothing to evaluate")
    return replace(truth, masks=tuple(packer.codes)) if masks else truth


class _Packer:
    """Packs each annotation while the file is parsed: as dictionaries they take seven times the size of the file.

    Attributes:
        rows: of each object: image, class, x, y, width, height, area, and 1 for a crowd.
        codes: the mask of each object; [] if masks are not read.
    """

    def __init__(
        self, path: Path, image_ids: np.ndarray, sizes: np.ndarray, category_ids: np.ndarray, masks: bool
    ) -> None:
        self._path, self._masks = path, masks
        self._sizes: list[list[int]] = sizes.tolist()
        self._images = {number: index for index, number in enumerate(image_ids.tolist())}
        self._labels = {number: label for label, number in enumerate(category_ids.tolist())}
        self._count = 0
        self.rows: list[tuple[float, ...]] = []
        self.codes: list[bytes] = []

    def take(self, value: dict[str, Any]) -> dict[str, Any] | None:
        """Pack an annotation and return None; return any other object unchanged."""
        if "image_id" not in value:
            return value
        self._count += 1
        image, label = _look_up(value["image_id"], self._images), _look_up(value.get("category_id"), self._labels)
        if image is not None and label is not None:
            try:
                self._pack(value, image, label)
            except ValueError as error:
                name = f"annotation {self._count}" + (f" (id {value['id']})" if "id" in value else "")
                raise DataError(f"{self._path}: {name}: {error}") from error
        return None

    def _pack(self, value: Mapping[str, Any], image: int, label: int) -> None:
        height, width = self._sizes[image]
        box = _read_box(value)
        code = _encode(value.get("segmentation"), (height, width)) if self._masks else None
        area = _read_area(value, box, code, (height, width))
        self.rows.append((image, label, *box, area, bool(value.get("iscrowd", 0))))
        if code is not None:
            self.codes.append(code)


def _look_up(number: Any, places: Mapping[Any, int]) -> int | None:
    return places.get(number) if isinstance(number, int | float) else None


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
        raise ValueError("its area is not a number")
    return area


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) < float("inf")  # false for NaN too


def _encode(segmentation: Any, size: Size) -> bytes:
    """Encode a mask in any of COCO's three forms as a compressed run-length code.

    Source: pycocotools, coco.py (annToRLE).

    Raises:
        ValueError: it has another form, or another size than the image.
    """
    if isinstance(segmentation, list) and segmentation:
        mask = import_masks()
        try:
            return mask.merge(mask.frPyObjects(segmentation, *size))["counts"]
        except Exception as error:  # it raises plain ones
            raise ValueError("its segmentation has a polygon that is not a list of x and y") from error
    if not isinstance(segmentation, dict) or not {"size", "counts"} <= segmentation.keys():
        raise ValueError("it has no segmentation")
    if segmentation["size"] != list(size):
        raise ValueError(f"its mask is of an image of {segmentation['size']}, not of {list(size)}")
    return read_run_lengths(segmentation)[0]
