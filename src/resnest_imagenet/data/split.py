"""A folder of class folders, split into images to train on and images to evaluate on."""

import hashlib
import os
import shutil
from contextlib import suppress
from pathlib import Path

import numpy as np

from resnest_imagenet.data.demo import write_once
from resnest_imagenet.data.folder import ImageFolder, read_image_folder
from resnest_imagenet.data.source import require_root
from resnest_imagenet.errors import DataError


def split_classes(root: Path, out: Path, val_share: float, seed: int) -> bool:
    """Write out/train/<class>/<image> and out/val/<class>/<image>; the images in `root` stay as they are.

    They are linked, and copied only where they cannot be: `out` takes no space on the same disk.

    Args:
        root: has a folder for each class.
        out: a new or empty folder, not in `root`.
        val_share: of the images of each class, at least one of them, that are to evaluate on.
        seed: of the choice. It depends on each image's name alone: more images later move few of the others.

    Returns:
        False where `out` holds this split already.

    Raises:
        DataError: no class folders, a class with less than two images, or `out` holds something else.
    """
    require_root(str(root))
    root, out = root.absolute(), out.absolute()
    if root.resolve() in (out.resolve(), *out.resolve().parents):
        raise DataError(f"out={out} is in data.root={root}: choose another folder")
    images = read_image_folder(str(root.parent), root.name, "data.root")
    parts = choose_parts(images, val_share, seed)

    def write(folder: Path) -> None:
        for file, part in zip(images.files.tolist(), parts, strict=True):
            target = folder / part / os.fsdecode(file)
            target.parent.mkdir(parents=True, exist_ok=True)
            _link(root / os.fsdecode(file), target)

    settings: dict[str, int | str] = {
        "root": str(root),
        "val_share": str(val_share),
        "seed": seed,
        "images": len(images),
    }
    return write_once(out, settings, write, marker="split.json")


def choose_parts(images: ImageFolder, val_share: float, seed: int) -> list[str]:
    """Return "train" or "val" for each of N images.

    Raises:
        DataError: a class has less than two.
    """
    parts = ["train"] * len(images)
    for label, name in enumerate(images.classes):
        members: list[int] = np.flatnonzero(images.labels == label).tolist()
        if len(members) < 2:
            raise DataError(f"{images.root / name}: a class with 1 image: it needs two, one of them to evaluate on")
        members.sort(key=lambda index: hashlib.sha256(f"{seed}/".encode() + bytes(images.files[index])).digest())
        for index in members[: min(max(1, round(val_share * len(members))), len(members) - 1)]:
            parts[index] = "val"
    return parts


def _link(file: Path, target: Path) -> None:
    """Give a file a second name, or copy it to another disk."""
    with suppress(OSError):
        os.link(file.resolve(), target)
        return
    shutil.copy2(file, target)
