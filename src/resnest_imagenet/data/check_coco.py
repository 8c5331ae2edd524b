"""resnest-data check of images with objects: judges the annotations and the images, and compares the two."""

import importlib.util
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from resnest_imagenet.data.check import Part, Report, guess_folder
from resnest_imagenet.data.check_scenes import examine_images
from resnest_imagenet.data.coco import FOLDERS, find_files, find_missing, select_objects
from resnest_imagenet.data.coco import Part as PartName
from resnest_imagenet.data.coco_json import CocoFile, read_coco
from resnest_imagenet.data.decoding import find_turn
from resnest_imagenet.data.examine import Examined, Finding, count_cores, judge_image
from resnest_imagenet.data.folder import Listing
from resnest_imagenet.data.source import require_root
from resnest_imagenet.errors import DataError

# The orientations that exchange width and height.
_QUARTER_TURNS = (
    Image.Transpose.TRANSPOSE,
    Image.Transpose.TRANSVERSE,
    Image.Transpose.ROTATE_90,
    Image.Transpose.ROTATE_270,
)


def check_coco(
    root: str,
    train_dir: str | None,
    val_dir: str | None,
    workers: int | None = None,
    train_json: str | None = None,
    val_json: str | None = None,
) -> Report:
    """Judge every annotation of both parts and decode every image; judge masks too if pycocotools is installed.

    Args:
        root: the data set's folder.
        train_dir: folder of the training images, see `open_coco`; None: skip them.
        val_dir: folder of the validation images; None: skip them.
        workers: processes; None: one for each core that this process may use.
        train_json: annotations of the training images; None: see `open_coco`.
        val_json: annotations of the validation images; None: the same.

    Raises:
        DataError: there is no such folder, or the processes keep dying.
    """
    require_root(root)
    places: dict[PartName, tuple[str | None, str | None]] = {
        "train": (train_dir, train_json),
        "val": (val_dir, val_json),
    }
    parts: list[Part] = []
    expected: dict[str, tuple[int, int]] = {}  # (width, height) by path
    for name, (images, json) in places.items():
        if images is not None:
            part, sizes = _list_part(root, name, images, json)
            for path in sorted(expected.keys() & sizes):
                part.add("in train and val", path, "both annotation files name it")
            parts.append(part)
            expected |= sizes
    for folder in sorted({part.name for part in parts if part.images}):  # both parts may share a folder
        names = (f"{folder}/{image}" for image in Listing(os.path.join(root, folder)).walk(""))
        part = next(part for part in parts if part.name == folder)
        for path in sorted(set(names) - expected.keys()):
            part.add("unlisted image", path, "no annotation file names it")
    findings = [finding for part in parts for finding in part.findings]
    for path, size in examine_images(parts, root, workers or count_cores(), findings, judge_upright).items():
        if size != expected[path]:
            detail = "{} x {} pixels, in the annotations {} x {}".format(*size, *expected[path])
            findings.append(Finding("other size", path, detail))
    return Report(root, tuple(parts), tuple(findings))


def judge_upright(path: str, encoded: bytes) -> Examined:
    """Decode an image; return its faults and notes, and its size when it is upright."""
    result = judge_image(path, encoded)
    if result.size and find_turn(encoded) in _QUARTER_TURNS:
        result = replace(result, size=result.size[::-1])
    return result


def _list_part(root: str, name: PartName, images: str, json: str | None) -> tuple[Part, dict[str, tuple[int, int]]]:
    """Return a part with its existing images, and the (width, height) that each must have, by path."""
    part = Part(images)
    if not any(os.path.isdir(os.path.join(root, folder)) for folder in (images, FOLDERS.get(images, images))):
        part.add("missing folder", images, guess_folder(root, images, f"data.{name}_dir"))
        return part, {}
    try:
        folder, path = find_files(root, name, json, images)
    except DataError as error:
        part.add("no annotations", images, str(error))
        return part, {}
    part.name, shown = os.path.relpath(folder, root), os.path.relpath(path, root)
    has_masks = importlib.util.find_spec("pycocotools") is not None
    try:
        file = read_coco(path, has_masks, evaluated=name == "val", needs_masks=False)
    except DataError as error:
        part.add("bad annotations", shown, str(error))
        return part, {}
    for fault in file.faults:
        part.add("bad annotations", shown, fault)
    return part, _compare(part, file, folder, shown, is_training=name == "train")


def _compare(part: Part, file: CocoFile, folder: Path, shown: str, is_training: bool) -> dict[str, tuple[int, int]]:
    """Compare annotations with the files of a folder; return the (width, height) of the existing images, by path."""
    missing = set(find_missing(folder, file.files))
    for name in sorted(missing):
        part.add("missing image", f"{part.name}/{name}", f"an image of {shown}")
    if not file.files:
        part.add("no images", part.name, f"{shown} has none")
    instances = select_objects(file, folder, is_training)
    for note in instances.images.notes:
        part.add("skipped objects", shown, note.partition("skipped: ")[2])
    if not is_training and (file.annotation_ids == 0).any():
        part.add("id 0", shown, "of an annotation: pycocotools takes a match with it for no match; number from 1 on")
    counts = np.bincount(instances.labels, minlength=len(file.classes)).tolist()
    part.classes = dict(zip(file.classes, counts, strict=True))
    for name in [name for name, count in part.classes.items() if not count]:
        part.add("absent class", shown, name)
    sizes = zip(file.files, file.sizes.tolist(), strict=True)
    present = {f"{part.name}/{name}": (width, height) for name, (height, width) in sizes if name not in missing}
    part.images += present
    return present
