"""COCO's layout: a folder of images for each part, and a JSON file with their objects.

It reads COCO as it is unpacked, `<root>/train2017/*.jpg` with `<root>/annotations/instances_train2017.json` and the
same with val2017, and any data set in this form. Boxes and masks are treated as in detectron2 (data/datasets/coco.py,
data/detection_utils.py): crowds are not objects, boxes are clipped to the image, those without an area are skipped.
"""

import hashlib
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from resnest_imagenet.data.coco_json import NO_MASK, CocoFile, read_coco
from resnest_imagenet.data.decoding import BadImage, Fault, decode_upright
from resnest_imagenet.data.folder import ImageFolder
from resnest_imagenet.data.masks import PackedMasks, require_pycocotools
from resnest_imagenet.data.source import find_part
from resnest_imagenet.errors import DataError
from resnest_imagenet.instances import Mask, list_corners

NO_AREA = 1e-5  # pixels: a box of this width or height or less has no area (detectron2, Boxes.nonempty)
JSON_FOLDER = "annotations"
FOLDERS = {"train": "train2017", "val": "val2017"}
Part = Literal["train", "val"]


@dataclass(frozen=True, eq=False)
class Instances:
    """One part of a data set: N images, sorted by their ids, with M objects.

    Attributes:
        images: the photographs; `images.classes` are the categories' names in the order of their ids.
        image_ids: int64 (N,), of the JSON file.
        sizes: int64 (N, 2), (height, width) of the images, upright.
        first: int64 (N + 1,), image n has the objects first[n]:first[n + 1], in the file's order.
        boxes: float32 (M, 4), x1 y1 x2 y2 in pixels of the image, within it and with an area.
        labels: int64 (M,), 0..K-1.
        masks: of the M objects; None: not read.
        classes: K names.
        category_ids: int64 (K,), of the JSON file; results are written with them.
        json: the annotation file; the evaluation reads it again, with crowds.
    """

    images: ImageFolder
    image_ids: np.ndarray
    sizes: np.ndarray
    first: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    masks: PackedMasks | None
    classes: tuple[str, ...]
    category_ids: np.ndarray
    json: Path

    def __len__(self) -> int:
        return len(self.images)

    @cached_property
    def groups(self) -> np.ndarray:
        """The format of each image, int8 (N,), for `BatchPlan.groups`: 1 if it is wider than high."""
        return (self.sizes[:, 1] > self.sizes[:, 0]).astype(np.int8)

    def objects(self, index: int) -> tuple[np.ndarray, np.ndarray, list[Mask] | None]:
        """Return boxes float32 (n, 4), labels int64 (n,) and masks of one image; the arrays are views."""
        rows = slice(int(self.first[index]), int(self.first[index + 1]))
        return self.boxes[rows], self.labels[rows], None if self.masks is None else self.masks[rows]

    def read(self, index: int) -> Image.Image:
        """Return an image, RGB, upright by its EXIF orientation.

        Raises:
            BadImage: it cannot be used, or its size is not that of the JSON file.
            LoadingError: the storage does not return it.
        """
        picture = decode_upright(self.images.read(index))
        height, width = self.sizes[index].tolist()
        if picture.size != (width, height):
            size = f"{picture.width} x {picture.height} pixels, in {self.json.name} {width} x {height}"
            raise BadImage(Fault("other size", size))
        return picture

    def name_fault(self, index: int) -> str | None:
        """Return why an image cannot be used, in one line; None if it can.

        Raises:
            LoadingError: the storage does not return it.
        """
        try:
            self.read(index)
        except BadImage as error:
            return f"{self.images.name(index)}: {error}"
        return None

    def digest(self) -> str:
        """Return a digest of all objects; a run resumes only with the same."""
        sha = hashlib.sha256()
        for values in (self.image_ids, self.sizes, self.first, self.boxes, self.labels, self.category_ids):
            sha.update(np.ascontiguousarray(values).tobytes())
        if self.masks is not None:
            for values in (self.masks.coordinates, self.masks.bounds, self.masks.polygons, self.masks.places):
                sha.update(np.ascontiguousarray(values).tobytes())
            sha.update(self.masks.codes)
        return sha.hexdigest()


def open_coco(
    root: str,
    part: Part,
    json: str | None = None,
    images: str | None = None,
    *,
    masks: bool = False,
    is_training: bool | None = None,
) -> Instances:
    """Read the annotations of one part of a data set, and find its images.

    Args:
        root: the data set's folder.
        part: "train" or "val"; an error names the options data.<part>_json and data.<part>_dir.
        json: the annotation file, below root or elsewhere; None: annotations/instances_<images>.json.
        images: the folder of the images, below root or elsewhere; None: train2017 or val2017. The names train and val
            also mean these, if no folder has that name.
        masks: whether to read the masks of the objects, which needs pycocotools.
        is_training: skip images without objects; if false, keep every image and require what COCO's evaluation reads;
            None: true for the training part.

    Raises:
        ConfigError: masks need pycocotools, which is not installed.
        DataError: folders, files or images are missing, or an annotation cannot be used.
    """
    is_training = part == "train" if is_training is None else is_training
    if masks:
        require_pycocotools()
    folder, path = find_files(root, part, json, images)
    file = read_coco(path, masks, evaluated=not is_training)
    if file.faults:
        raise DataError(f"{path}: {_describe_faults(file.faults)}")
    missing = find_missing(folder, file.files)
    if missing:
        what = f"no such file, but an image of {path}{_count_more(missing)}; set data.{part}_dir"
        raise DataError(f"{folder / missing[0]}: {what}")
    instances = select_objects(file, folder, is_training)
    if not len(instances):
        notes = "; ".join(instances.images.notes).removeprefix(f"{path}: ")
        what = f" with objects that can be used ({notes})" if is_training and file.files else ""
        raise DataError(f"{path}: no images{what}")
    return instances


def find_files(root: str, part: Part, json: str | None, images: str | None) -> tuple[Path, Path]:
    """Return the folder of the images and the annotation file of a part; a DataError lists what is there instead.

    Args: see `open_coco`.
    """
    images = images or part
    if not os.path.isdir(os.path.join(root, images)):
        images = FOLDERS.get(images, images)
    folder = find_part(root, images, f"data.{part}_dir")
    path = Path(root, json or f"{JSON_FOLDER}/instances_{folder.name}.json")
    if not path.is_file():
        others = sorted(other.name for other in path.parent.glob("*.json")) if path.parent.is_dir() else []
        what = f"in {path.parent}: {', '.join(others[:6])}" if others else f"no .json in {path.parent}"
        raise DataError(f"{path}: no such file ({what}); set data.{part}_json")
    return folder, path


def find_missing(folder: Path, files: tuple[str, ...]) -> list[str]:
    """Return the files that are not in a folder or its subfolders; each folder is listed once."""
    listings: dict[str, set[str]] = {}
    missing = []
    for file in files:
        place, name = os.path.split(file)
        if place not in listings:
            try:
                listings[place] = set(os.listdir(folder / place))
            except OSError:
                listings[place] = set()
        if name not in listings[place]:
            missing.append(file)
    return missing


def select_objects(file: CocoFile, folder: Path, is_training: bool) -> Instances:
    """Return the usable objects of a file, with their images.

    Args:
        file: without faults.
        folder: where its images are.
        is_training: skip images without objects.
    """
    boxes, has_area = clip_boxes(file)
    has_mask = np.ones_like(has_area) if file.masks is None else ~file.masks.is_empty
    is_listed = file.images >= 0
    rows = np.flatnonzero(is_listed & ~file.is_crowd & has_area & has_mask)
    rows = rows[np.argsort(file.images[rows], kind="stable")]
    counts = np.bincount(file.images[rows], minlength=len(file.files))
    kept = np.flatnonzero(counts) if is_training else np.arange(len(file.files))
    skipped = {
        "crowds": int(np.count_nonzero(is_listed & file.is_crowd)),
        "boxes of no area": int(np.count_nonzero(is_listed & ~file.is_crowd & ~has_area)),
        "objects of no mask": int(np.count_nonzero(is_listed & ~file.is_crowd & has_area & ~has_mask)),
        "annotations of images that are not listed": int(np.count_nonzero(~is_listed)),
        "images without objects": len(file.files) - len(kept),
    }
    names = np.array([os.fsencode(file.files[image]) for image in kept] or [b""])[: len(kept)]
    notes = describe_skipped(file.path, skipped)
    return Instances(
        images=ImageFolder(folder, file.classes, names, np.zeros(len(kept), np.int64), notes=notes),
        image_ids=file.image_ids[kept],
        sizes=file.sizes[kept],
        first=np.append(0, np.cumsum(counts[kept])),
        boxes=boxes[rows].astype(np.float32),
        labels=file.labels[rows],
        masks=None if file.masks is None else file.masks.select(rows),
        classes=file.classes,
        category_ids=file.category_ids,
        json=file.path,
    )


def clip_boxes(file: CocoFile) -> tuple[np.ndarray, np.ndarray]:
    """Clip boxes to their image: return x1 y1 x2 y2, float64 (M, 4), and which have an area, bool (M,)."""
    if not len(file.sizes):
        return file.boxes, np.zeros(len(file.boxes), bool)
    limits = np.tile(file.sizes[file.images][:, ::-1], 2)  # of index -1 those of the last image: unused
    corners = list_corners(file.boxes).clip(0, limits)
    return corners, (corners[:, 2:] - corners[:, :2] > NO_AREA).all(1)


def require_separate_images(train: Instances, val: Instances) -> None:
    """Raise a DataError if an image is in both parts, which may share a folder."""
    if train.images.root.resolve() != val.images.root.resolve():
        return
    shared = np.intersect1d(train.images.files, val.images.files)
    if len(shared):
        name = os.fsdecode(shared[0])
        both = f"{train.images.root / name}: of {len(shared):,} images in both {train.json} and {val.json}"
        raise DataError(f"{both}: set data.val_json, or data.val_dir")


def describe_skipped(path: Path, skipped: dict[str, int]) -> tuple[str, ...]:
    """Return one line with the number of things skipped in a file, by kind; () if nothing is skipped."""
    parts = [f"{count:,} {what}" for what, count in skipped.items() if count]
    return (f"{path}: skipped: {', '.join(parts)}",) if parts else ()


def _describe_faults(faults: tuple[str, ...]) -> str:
    """Return the first fault and the number of others; resnest-data check lists all but those about masks."""
    listed = [fault for fault in faults if not fault.endswith(NO_MASK)]
    if listed:
        return f"{listed[0]}{_count_more(listed)}"
    return faults[0] + (f" (and {len(faults) - 1:,} more)" if len(faults) > 1 else "")


def _count_more(lines: list[str] | tuple[str, ...]) -> str:
    return f" (and {len(lines) - 1:,} more: resnest-data check lists them)" if len(lines) > 1 else ""
