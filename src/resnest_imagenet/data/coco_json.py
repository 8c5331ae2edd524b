"""The JSON files of COCO's layout: images, annotations and categories, read into arrays.

A file of 490 MB with 860,000 annotations took 28 s of CPU time with all checks, and 1.0 GB at the peak, of which 520 MB
stay, 150 MB without masks. Without any check `json.load` takes 27 s and 3.3 GB, orjson 13 s and 4.2 GB. So the standard
library parses the file, and an object hook packs each annotation at once.
"""

import json
import mmap
import os
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from resnest_imagenet.data.decoding import MAX_SIDE, BadImage
from resnest_imagenet.data.masks import MaskPacker, PackedMasks
from resnest_imagenet.data.reading import open_regular
from resnest_imagenet.errors import DataError

KEYS = ("images", "annotations", "categories")
_MOST = 2**63  # of ids
NO_MASK = "no segmentation, which masks need: train.masks=false trains boxes alone"  # the end of a fault's line
_LONGEST_WORD = 16  # most characters of a number or word in which a file was cut off


@dataclass(frozen=True, eq=False)
class CocoFile:
    """The content of a JSON file: N images and K categories sorted by their ids, M annotations in the file's order.

    Attributes:
        path: of the file.
        image_ids: int64 (N,).
        files: N names, below the folder of the images.
        sizes: int64 (N, 2), (height, width).
        category_ids: int64 (K,).
        classes: K names.
        annotation_ids: int64 (M,).
        images: int64 (M,), the index of each annotation's image; -1: the file does not list it.
        labels: int64 (M,), the index of its category.
        boxes: float64 (M, 4), x y width height as in the file.
        is_crowd: bool (M,).
        masks: of the M annotations, those of crowds empty; None: not read.
        faults: a line for each thing that cannot be used; the arrays do not have it.
    """

    path: Path
    image_ids: np.ndarray
    files: tuple[str, ...]
    sizes: np.ndarray
    category_ids: np.ndarray
    classes: tuple[str, ...]
    annotation_ids: np.ndarray
    images: np.ndarray
    labels: np.ndarray
    boxes: np.ndarray
    is_crowd: np.ndarray
    masks: PackedMasks | None
    faults: tuple[str, ...]


class _Row(int):
    """Replaces a packed annotation in the parsed list: its row."""

    __slots__ = ()


class _Fault(str):
    """Replaces an unusable annotation in the parsed list: the reason."""

    __slots__ = ()


class _Annotations:
    """Packs annotations while the file is parsed."""

    def __init__(self, masks: bool, evaluated: bool, needs_masks: bool) -> None:
        self._masks = MaskPacker() if masks else None
        self._evaluated, self._needs_masks = evaluated, needs_masks
        self._ids, self._images, self._categories = array("q"), array("q"), array("q")
        self._crowds, self._boxes = array("b"), array("d")

    def take(self, value: dict[str, Any]) -> Any:
        """Pack an annotation, and return its row or fault; return any other object unchanged."""
        if "image_id" not in value:
            return value
        if fault := _judge_annotation(value, self._evaluated):
            return _Fault(fault)
        is_crowd = bool(value.get("iscrowd", 0))
        if self._masks is not None:
            if self._needs_masks and "segmentation" not in value:
                return _Fault(f"{_name(value)}{NO_MASK}")
            try:
                self._masks.add(None if is_crowd else value.get("segmentation"))
            except ValueError as error:
                return _Fault(f"{_name(value)}{error}")
        self._ids.append(value["id"])
        self._images.append(value["image_id"])
        self._categories.append(value["category_id"])
        self._crowds.append(is_crowd)
        self._boxes.extend(value["bbox"])
        return _Row(len(self._ids) - 1)

    def pack(self, rows: Sequence[int]) -> tuple[np.ndarray, ...]:
        """Return ids, image ids, category ids, crowd flags and boxes of some rows."""
        columns = (self._ids, self._images, self._categories, self._crowds)
        boxes = np.array(self._boxes, np.float64).reshape(-1, 4)
        return (*(np.array(column, np.int64)[rows] for column in columns), boxes[rows])

    def pack_masks(self, rows: np.ndarray) -> PackedMasks | None:
        """Return the masks of some rows; None if masks are not read."""
        return None if self._masks is None else self._masks.pack().select(rows)


def _name(annotation: dict[str, Any]) -> str:
    """Return the start of a line about an annotation; "" if it has no id."""
    return f"annotation {annotation['id']}: " if type(annotation.get("id")) is int else ""


def _judge_annotation(annotation: dict[str, Any], evaluated: bool) -> str | None:
    """Return what is wrong with an annotation, in one line; None if nothing is."""
    for key in ("id", "image_id", "category_id"):
        value = annotation.get(key)
        if type(value) is not int or not -_MOST <= value < _MOST:
            return f"{_name(annotation)}{_describe(annotation, key, 'a whole number')}"
    box = annotation.get("bbox")
    if not isinstance(box, list) or len(box) != 4 or not all(type(side) in (int, float) for side in box):
        return f"{_name(annotation)}{_describe(annotation, 'bbox', 'four numbers: x, y, width, height')}"
    if not all(abs(side) < 1e9 for side in box):  # false for nan and infinity too
        return f"{_name(annotation)}{_describe(annotation, 'bbox', 'in pixels')}"
    if annotation.get("iscrowd", 0) not in (0, 1):
        return f"{_name(annotation)}{_describe(annotation, 'iscrowd', '0 or 1')}"
    if evaluated:
        for key in ("area", "iscrowd"):  # pycocotools' COCOeval reads both
            if type(annotation.get(key)) not in (int, float, bool):
                return f"{_name(annotation)}{_describe(annotation, key, 'a number, which the evaluation needs')}"
    return None


def _describe(value: dict[str, Any], key: str, wanted: str) -> str:
    if key not in value:
        return f"no {key} ({wanted})"
    text = repr(value[key])
    return f"{key}={text if len(text) < 60 else text[:57] + '...'} is not {wanted}"


def read_coco(path: Path, masks: bool = False, evaluated: bool = False, needs_masks: bool = True) -> CocoFile:
    """Read a JSON file.

    Args:
        path: of the file.
        masks: whether to read the masks.
        evaluated: whether to require the keys that only the evaluation reads.
        needs_masks: whether an annotation without a segmentation is a fault if masks are read.

    Raises:
        DataError: the file cannot be read, or is not in COCO's layout.
    """
    annotations = _Annotations(masks, evaluated, needs_masks)
    content = _parse(path, annotations)
    missing = [key for key in KEYS if not isinstance(content.get(key), list)]
    if missing:
        what = f"no list of {' and none of '.join(missing)}: not in COCO's layout"
        raise DataError(f"{path}: {what}; set data.train_json or data.val_json to instances_*.json")
    faults: list[str] = []
    image_ids, files, sizes = _read_images(content["images"], faults)
    category_ids, classes = _read_categories(content["categories"], faults)
    rows = []
    for position, value in enumerate(content["annotations"]):
        if type(value) is _Row:
            rows.append(value)
        else:
            fault = value if type(value) is _Fault else "not an object with an image_id"
            faults.append(f"annotations[{position}]: {fault}")
    ids, images, categories, crowds, boxes = annotations.pack(rows)
    _find_duplicates(ids, "annotation", faults)
    labels = _look_up(categories, category_ids)
    for row in np.flatnonzero(labels < 0).tolist():
        faults.append(f"annotation {ids[row]}: no category has its category_id={categories[row]}")
    known = np.flatnonzero(labels >= 0)
    file = CocoFile(
        path=path,
        image_ids=image_ids,
        files=files,
        sizes=sizes,
        category_ids=category_ids,
        classes=classes,
        annotation_ids=ids[known],
        images=_look_up(images, image_ids)[known],
        labels=labels[known],
        boxes=boxes[known],
        is_crowd=crowds[known] > 0,
        masks=annotations.pack_masks(np.array(rows, np.int64)[known]),
        faults=(),
    )
    return replace(file, faults=(*faults, *_judge_masks(file)))


def _parse(path: Path, annotations: _Annotations) -> dict[str, Any]:
    """Parse a file, and return its outermost object; the annotations are packed."""
    try:
        text = _read_text(path)
        content = json.loads(text, object_hook=annotations.take)
    except json.JSONDecodeError as error:
        is_near_end = len(text) - error.pos < _LONGEST_WORD and error.msg != "Extra data" and error.pos > 0
        is_cut = is_near_end or error.msg.startswith("Unterminated string")
        what = "ends too early: is it cut off?" if is_cut else f"not JSON ({error.msg})"
        raise DataError(f"{path}: {what} (line {error.lineno}, character {error.colno})") from error
    except RecursionError as error:
        raise DataError(f"{path}: not in COCO's layout: nested too deeply") from error
    if isinstance(content, dict):
        return content
    hint = ": results of a detector, not annotations?" if isinstance(content, list) else ""
    raise DataError(f"{path}: not in COCO's layout: no object with {', '.join(KEYS)}{hint}")


def _read_text(path: Path) -> str:
    """Return the text of a file; its bytes are mapped, so that memory does not hold both."""
    try:
        with open(open_regular(path), "rb") as file:
            if not os.fstat(file.fileno()).st_size:
                raise DataError(f"{path}: is empty")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                return str(content, "utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not JSON: no text in UTF-8 (byte {error.start})") from error
    except (OSError, BadImage) as error:
        raise DataError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error


def _read_images(values: list[Any], faults: list[str]) -> tuple[np.ndarray, tuple[str, ...], np.ndarray]:
    """Return ids, files and sizes, sorted by id."""
    rows: list[tuple[int, str, int, int]] = []
    for position, value in enumerate(values):
        if fault := _judge_image(value):
            faults.append(f"images[{position}]: {fault}")
        else:
            rows.append((value["id"], value["file_name"], value["height"], value["width"]))
    rows.sort()
    ids = np.array([row[0] for row in rows], np.int64)
    _find_duplicates(ids, "image", faults)
    files = tuple(row[1] for row in rows)
    for name, count in Counter(files).items():
        if count > 1:
            faults.append(f"{count} images have the file_name {name}")
    return ids, files, np.array([row[2:] for row in rows], np.int64).reshape(-1, 2)


def _judge_image(image: Any) -> str | None:
    if not isinstance(image, dict):
        return "not an object"
    if type(image.get("id")) is not int or not -_MOST <= image["id"] < _MOST:
        return _describe(image, "id", "a whole number")
    label = f"image {image['id']}: "
    name = image.get("file_name")
    if not isinstance(name, str) or not name or "\0" in name:
        return label + _describe(image, "file_name", "a name")
    for key in ("height", "width"):
        if type(image.get(key)) is not int or not 0 < image[key] <= MAX_SIDE:
            return label + _describe(image, key, "a number of pixels")
    return None


def _read_categories(values: list[Any], faults: list[str]) -> tuple[np.ndarray, tuple[str, ...]]:
    """Return ids and names, sorted by id."""
    names: dict[int, str] = {}
    for position, value in enumerate(values):
        where = f"categories[{position}]: "
        if not isinstance(value, dict):
            faults.append(where + "not an object")
        elif type(value.get("id")) is not int or not -_MOST <= value["id"] < _MOST:
            faults.append(where + _describe(value, "id", "a whole number"))
        elif not isinstance(value.get("name"), str) or not value["name"].strip():
            faults.append(where + _describe(value, "name", "a name"))
        elif value["id"] in names:
            faults.append(f"{where}id={value['id']} is there twice")
        elif value["name"] in names.values():
            faults.append(f"{where}name={value['name']} is there twice")
        else:
            names[value["id"]] = value["name"]
    if not names and not faults:
        faults.append("categories: none")
    ids = sorted(names)
    return np.array(ids, np.int64), tuple(names[identity] for identity in ids)


def _find_duplicates(ids: np.ndarray, what: str, faults: list[str]) -> None:
    values, counts = np.unique(ids, return_counts=True)
    for value, count in zip(values[counts > 1].tolist(), counts[counts > 1].tolist(), strict=True):
        faults.append(f"{count} {what}s have the id {value}")


def _look_up(values: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Return the index of each value in sorted ids; -1 for an unknown value."""
    if not len(ids):
        return np.full(len(values), -1)
    places = np.searchsorted(ids, values).clip(max=len(ids) - 1)
    return np.where(ids[places] == values, places, -1)


def _judge_masks(file: CocoFile) -> list[str]:
    """Return a line for each run-length code whose size is not its image's, and for coordinates of nan or infinity."""
    masks = file.masks
    if masks is None:
        return []
    faults = []
    is_known = (file.images >= 0) & (masks.sizes[:, 0] > 0)
    rows = np.flatnonzero(is_known)
    for row in rows[(masks.sizes[rows] != file.sizes[file.images[rows]]).any(1)].tolist():
        height, width = masks.sizes[row].tolist()
        size = "{} x {}".format(*file.sizes[file.images[row]])
        faults.append(f"annotation {file.annotation_ids[row]}: its mask is {height} x {width}, its image {size}")
    broken = np.flatnonzero(~np.isfinite(masks.coordinates))
    if len(broken):
        polygons = np.searchsorted(masks.bounds, broken, side="right") - 1
        for row in np.flatnonzero(_contain(masks.polygons, np.unique(polygons))).tolist():
            faults.append(f"annotation {file.annotation_ids[row]}: its segmentation has nan or infinity")
    return faults


def _contain(ranges: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """Return which half-open ranges (R, 2) contain any of some sorted numbers, bool (R,)."""
    return np.searchsorted(numbers, ranges[:, 0]) < np.searchsorted(numbers, ranges[:, 1])
