"""A folder of class folders, split into images to train on and images to evaluate on."""

import os
import shutil
from contextlib import suppress
from pathlib import Path

from resnest_imagenet.data.demo import write_once
from resnest_imagenet.data.folder import read_image_folder
from resnest_imagenet.data.source import require_root
from resnest_imagenet.data.validation import choose_val
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
    is_val = choose_val(images.files, images.labels, images.classes, val_share, seed, images.root)

    def write(folder: Path) -> None:
        for file, chosen in zip(images.files.tolist(), is_val.tolist(), strict=True):
            target = folder / ("val" if chosen else "train") / os.fsdecode(file)
            target.parent.mkdir(parents=True, exist_ok=True)
            _link(root / os.fsdecode(file), target)

    settings: dict[str, int | str] = {
        "root": str(root),
        "val_share": str(val_share),
        "seed": seed,
        "images": len(images),
    }
    return write_once(out, settings, write, marker="split.json")


def _link(file: Path, target: Path) -> None:
    """Give a file a second name, or copy it to another disk."""
    with suppress(OSError):
        os.link(file.resolve(), target)
        return
    shutil.copy2(file, target)
