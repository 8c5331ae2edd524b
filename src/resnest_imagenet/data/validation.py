"""Which images of a set are kept for validation, where no folder or list tells."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from resnest_imagenet.data.source import require_root
from resnest_imagenet.errors import DataError


def choose_val(
    files: np.ndarray, labels: np.ndarray, classes: Sequence[str], share: float, seed: int, place: str | Path
) -> np.ndarray:
    """Choose images of each class for validation: a share of them, at least one, and at least one is not chosen.

    The choice depends on the seed and each image's name alone: more images later move few of the others.

    Args:
        files: bytes (N,), names of the images.
        labels: int64 (N,), positions in `classes`.
        classes: names.
        share: of the images of each class, in (0, 1).
        seed: of the choice.
        place: the folder or list, for the error.

    Returns:
        bool (N,).

    Raises:
        DataError: a class has one image.
    """
    is_val = np.zeros(len(files), dtype=bool)
    for label in np.unique(labels).tolist():
        members: list[int] = np.flatnonzero(labels == label).tolist()
        if len(members) < 2:
            raise DataError(
                f"{place}: {classes[label]}: a class with 1 image: it needs two, one of them to evaluate on"
            )
        members.sort(key=lambda index: hashlib.sha256(f"{seed}/".encode() + bytes(files[index])).digest())
        is_val[members[: min(max(1, round(share * len(members))), len(members) - 1)]] = True
    return is_val


def find_class_folders(root: str, train_dir: str, val_dir: str, option: str = "data.val_split") -> Path:
    """Return the folder whose classes are to be split: `<root>/<train_dir>` if it has class folders, else the root.

    Args:
        root: the data set's folder.
        train_dir: name of the part of training.
        val_dir: name of the part of validation.
        option: that asks for the split, for the error.

    Raises:
        DataError: there is no such root, or a folder to evaluate on.
    """
    require_root(root)
    train, val = Path(root, train_dir), Path(root, val_dir)
    if has_folders(val):
        raise DataError(
            f"{option}: {val} is there to evaluate on: remove {option}, or set data.root={train} to split that folder"
        )
    return train if has_folders(train) else Path(root)


def has_folders(path: Path) -> bool:
    """Return whether there is such a folder, with folders in it that are not hidden: it may be a part, but no class."""
    try:
        with os.scandir(path) as entries:
            return any(not entry.name.startswith(".") and entry.is_dir() for entry in entries)
    except OSError:
        return False
