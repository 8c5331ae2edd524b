"""The ImageNet folder layout: <root>/<train or val>/<class>/<image>."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from resnest_imagenet.errors import DataError

IMAGE_SUFFIXES = (".jpeg", ".jpg", ".png")


@dataclass(frozen=True)
class ImageFolder:
    """The images of one folder with their labels.

    Attributes:
        root: the folder that holds one folder per class.
        classes: names of the class folders, sorted: the label is the position.
        files: (N,) array of bytes, paths below root, sorted by class and name. An array and not a list of strings:
            worker processes share it without copying, and 1.28 million entries take 40 MB.
        labels: (N,) int64.
    """

    root: Path
    classes: tuple[str, ...]
    files: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.files)

    def path(self, index: int) -> bytes:
        """Return the path of one image as the operating system knows it."""
        return os.path.join(os.fsencode(self.root), self.files[index])


def read_image_folder(root: str, name: str, option: str) -> ImageFolder:
    """List the images of `<root>/<name>`.

    Args:
        root: the data set's folder.
        name: the part's folder within it, e.g. "train".
        option: the option that names this part, for the error message.

    Raises:
        DataError: root or part missing, no classes, a class without images.
    """
    if not os.path.isdir(root):
        raise DataError(f"data.root={root}: no such folder")
    part = Path(root, name)
    if not part.is_dir():
        there = ", ".join(sorted(entry.name for entry in os.scandir(root) if entry.is_dir())) or "no folders"
        raise DataError(f"{part}: no such folder (in {root}: {there}); set {option}")
    classes = sorted(entry.name for entry in os.scandir(part) if entry.is_dir())
    if not classes:
        raise DataError(f"{part}: no class folders; the layout is {part}/<class>/<image>.JPEG")
    files: list[bytes] = []
    labels: list[np.ndarray] = []
    for label, name_of_class in enumerate(classes):
        images = sorted(
            entry.name for entry in os.scandir(part / name_of_class) if entry.name.lower().endswith(IMAGE_SUFFIXES)
        )
        if not images:
            raise DataError(f"{part / name_of_class}: a class without images ({', '.join(IMAGE_SUFFIXES)})")
        files += [os.fsencode(f"{name_of_class}/{image}") for image in images]
        labels.append(np.full(len(images), label, dtype=np.int64))
    return ImageFolder(part, tuple(classes), np.array(files), np.concatenate(labels))


def label_by_classes(folder: ImageFolder, classes: Sequence[str], whose: str) -> ImageFolder:
    """Number the images by the given class list, of which the folder may hold a part.

    Args:
        folder: the images.
        classes: all class names, in the order of the labels.
        whose: the owner of that list, for the error message.

    Raises:
        DataError: for a class folder that is not in the list.
    """
    label_of = {name: label for label, name in enumerate(classes)}
    unknown = [name for name in folder.classes if name not in label_of]
    if unknown:
        raise DataError(f"{folder.root}: {len(unknown)} of its classes are not among {whose}: {_some(unknown)}")
    new_labels = np.array([label_of[name] for name in folder.classes], dtype=np.int64)
    return ImageFolder(folder.root, tuple(classes), folder.files, new_labels[folder.labels])


def require_same_classes(train: ImageFolder, val: ImageFolder) -> None:
    """Raise a DataError unless both parts have the same class folders."""
    for one, other in ((train, val), (val, train)):
        missing = sorted(set(one.classes) - set(other.classes))
        if missing:
            raise DataError(f"{other.root} lacks {len(missing)} of the classes of {one.root}: {_some(missing)}")


def name_unreadable(paths: Iterable[bytes]) -> str | None:
    """Return one line about the first image that not every loader can decode, or None where all are sound."""
    for path in paths:
        try:
            with Image.open(os.fsdecode(path)) as image:
                if image.format not in ("JPEG", "PNG") or image.mode.startswith("I"):
                    return f"{os.fsdecode(path)}: neither a JPEG nor an 8-bit PNG image ({image.format}, {image.mode})"
                image.convert("RGB")
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            return f"{os.fsdecode(path)}: not a readable image ({error})"
    return None


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
