"""resnest-data check for scenes: images, masks and their pairs, in the layouts of `scenes.py`."""

import hashlib
import os
from functools import partial
from pathlib import Path

import numpy as np

from resnest_imagenet.data.check import Part, Report, guess_folder, watch
from resnest_imagenet.data.decoding import BadImage, open_image
from resnest_imagenet.data.examine import Examined, Finding, Judge, count_cores, examine_files
from resnest_imagenet.data.scenes import VOID, Layout, choose_layout, decode_mask, describe_sizes, pair_files
from resnest_imagenet.data.source import require_root, require_separate

Sizes = dict[str, tuple[int, int]]  # (width, height) by path


def check_scenes(
    kind: str, root: str, train_dir: str | None, val_dir: str | None, workers: int | None = None
) -> Report:
    """Pair the files of both parts, and decode every image and every mask.

    Args:
        kind: ade20k, cityscapes or masks.
        root: the data set's folder.
        train_dir: the part to train on, see `open_scenes`, or None.
        val_dir: the part to evaluate on, or None.
        workers: number of processes; None means one for each core that this process may use.

    Raises:
        ConfigError: an unknown kind.
        DataError: there is no such folder or no class names, or the processes keep dying.
    """
    layout, workers = choose_layout(kind), workers or count_cores()
    require_root(root)
    names = {"data.train_dir": train_dir, "data.val_dir": val_dir}
    chosen = {option: layout.folder(name) for option, name in names.items() if name is not None}
    if len(chosen) == 2:
        require_separate(*(Path(root, layout.images, name) for name in chosen.values()))
    classes = layout.read_classes(Path(root))
    parts: list[Part] = []
    mask_of: dict[str, str] = {}
    for option, name in chosen.items():
        part, masks = _list_part(layout, root, name, option)
        part.classes = dict.fromkeys(classes, 0)
        parts.append(part)
        mask_of |= dict(zip(part.images, masks, strict=True))
    findings = [finding for part in parts for finding in part.findings]
    sizes = examine_images(parts, root, workers, findings)
    table = layout.read_table(len(classes)).tobytes()
    mask_sizes = _examine_masks(parts, mask_of, root, workers, table, findings)
    for image, size in sizes.items():
        mask = mask_of[image]
        if mask_sizes.get(mask, size) != size:
            findings.append(Finding("other size", mask, describe_sizes(size, mask_sizes[mask])))
    for part in parts:
        folder = f"{layout.masks}/{part.name}"
        if not part.images:  # reported already
            continue
        findings += [Finding("absent class", folder, name) for name, count in part.classes.items() if not count]
    return Report(root, tuple(parts), tuple(findings))


def _list_part(layout: Layout, root: str, name: str, option: str) -> tuple[Part, list[str]]:
    """Return a part with its images that have masks, and the masks; all paths are below the root."""
    part = Part(name)
    image_root, mask_root = (f"{folder}/{name}" for folder in (layout.images, layout.masks))
    for path in (image_root, mask_root):
        above = os.path.join(root, os.path.dirname(path))
        if not os.path.isdir(above):
            part.add("missing folder", path, f"no {above}: is data.root the data set's own folder?")
        elif not os.path.isdir(os.path.join(root, path)):
            part.add("missing folder", path, guess_folder(above, name, option))
    if part.findings:
        return part, []
    pairing = pair_files(layout, Path(root, image_root), Path(root, mask_root))
    for image in pairing.lone_images:
        part.add("missing mask", f"{image_root}/{image}", f"no {mask_root}/{layout.name_mask(image)}")
    for mask in pairing.lone_masks:
        part.add("missing image", f"{mask_root}/{mask}", f"no image for it in {image_root}")
    if not pairing.images:
        part.add("no images", image_root, "none with a mask")
    part.images += [f"{image_root}/{image}" for image in pairing.images]
    return part, [f"{mask_root}/{mask}" for mask in pairing.masks]


def examine_images(
    parts: list[Part], root: str, workers: int, findings: list[Finding], judge: Judge | None = None
) -> Sizes:
    """Return the sizes of the images that can be used; append faults and oddities to the findings.

    Args:
        parts: their images are examined.
        root: the data set's folder.
        workers: number of processes.
        findings: appended to.
        judge: see `examine_files`.
    """
    part_of = {path: part.name for part in parts for path in part.images}
    originals: dict[bytes, str] = {}
    sizes: Sizes = {}
    for result in watch(examine_files(root, list(part_of), workers, judge), root, "images", len(part_of)):
        findings += result.findings
        if result.sha256 and result.size:
            sizes[result.path] = result.size
            original = originals.setdefault(result.sha256, result.path)
            if original != result.path:
                is_shared = part_of[original] != part_of[result.path]
                kind = "in train and val" if is_shared else "twice in a part"
                findings.append(Finding(kind, result.path, f"the same as {original}"))
    return sizes


def _examine_masks(
    parts: list[Part], mask_of: dict[str, str], root: str, workers: int, table: bytes, findings: list[Finding]
) -> Sizes:
    """Do the same for the masks, and count the images of each class in the parts."""
    part_of = {mask_of[path]: part for part in parts for path in part.images}
    names = list(parts[0].classes)
    sizes: Sizes = {}
    results = examine_files(root, list(part_of), workers, partial(judge_mask, table))
    for result in watch(results, root, "masks", len(part_of)):
        findings += result.findings
        if result.size:
            sizes[result.path] = result.size
        for label in result.labels:
            part_of[result.path].classes[names[label]] += 1
    return sizes


def judge_mask(table: bytes, path: str, encoded: bytes) -> Examined:
    """Decode a mask and return its faults and oddities.

    Args:
        table: 256 bytes, see `Scenes.table`.
        path: of the file, for the findings.
        encoded: its content.
    """
    try:
        mask = decode_mask(encoded, table)
    except BadImage as error:
        return Examined(path, (Finding(error.fault.kind, path, error.fault.detail),))
    with open_image(encoded) as image:
        has_palette = image.mode == "P"
    findings = (Finding("palette mask", path, "its indices are the classes"),) * has_palette
    labels = np.flatnonzero(np.bincount(mask.ravel(), minlength=256)[:VOID])
    size = (mask.shape[1], mask.shape[0])
    return Examined(path, findings, hashlib.sha256(encoded).digest(), size=size, labels=tuple(labels.tolist()))
