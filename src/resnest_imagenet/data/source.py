"""The source of a loader: encoded images with labels, wherever they are stored."""

import os
import re
import sys
import tarfile
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from resnest_imagenet.data.decoding import BadImage, find_fault
from resnest_imagenet.data.reading import open_regular, read_file, require_size, try_again
from resnest_imagenet.errors import DataError, list_names, printable

# What the parts of data sets are called.
_PARTS = {"train", "training", "val", "valid", "validation", "test", "images", "train2017", "val2017", "annotations"}


@dataclass(frozen=True)
class ImageSource(ABC):
    """One part of a data set.

    Attributes:
        root: its folder.
        classes: names of the classes, in the order of the labels.
        files: (N,) array of bytes, a name for each image that is unique below root. It is an array, not a list of
            strings: worker processes share it without copying, and 1.28 million entries take 40 MB.
        labels: (N,) int64.
        notes: lines about files that the listing has skipped, or taken from an unusual place.
    """

    root: Path
    classes: tuple[str, ...]
    files: np.ndarray
    labels: np.ndarray
    notes: tuple[str, ...] = field(default=(), kw_only=True)

    def __len__(self) -> int:
        return len(self.files)

    @property
    def shard_sizes(self) -> tuple[int, ...]:
        """How many images each shard holds, in order; () without shards."""
        return ()

    @abstractmethod
    def list_sizes(self, indices: np.ndarray) -> np.ndarray:
        """Return sizes in bytes of n images, encoded, int64 (n,); -1 for a missing file."""

    @abstractmethod
    def name(self, index: int) -> str:
        """Return the name by which a person can find the image."""

    def read(self, index: int) -> bytes:
        """Return one image, encoded.

        Raises:
            BadImage: it can never be used, such as a pipe or a device.
            LoadingError: the storage does not return it, after several tries.
        """
        return try_again(lambda: self.fetch(index), lambda: self.name(index))

    @abstractmethod
    def fetch(self, index: int) -> bytes:
        """Return one image, encoded, from its storage.

        Raises:
            BadImage: it can never be used.
            OSError: it cannot be read.
        """


def find_part(root: str, name: str, option: str) -> Path:
    """Return the folder of one part of a data set; a DataError names what there is instead.

    Args:
        root: the data set's folder.
        name: the part's folder within it, e.g. "train".
        option: the option that names this part.
    """
    require_root(root)
    part = Path(root, name)
    if not part.is_dir():
        folders = list_folders(root)
        there = list_names(folders, 5) or "no folders"
        raise DataError(f"{part}: no such folder (in {root}: {there}); set {option}{suggest_split(root, folders)}")
    return part


def require_root(root: str) -> None:
    """Raise a DataError where the folder of a data set is not there."""
    if not os.path.isdir(root):
        raise DataError(f"data.root={root}: no such folder")


def suggest_split(root: str, folders: Sequence[str]) -> str:
    """Return "; are these the classes? ..." where the folders look like classes, or "".

    Classes are not called as a part, and the first ones hold only files.
    """
    if len(folders) < 2 or not _PARTS.isdisjoint(folders):
        return ""
    places = [os.path.join(root, name) for name in folders[:3]]
    try:
        are_classes = all(os.listdir(place) and not list_folders(place) for place in places)
    except (OSError, DataError):
        return ""
    if not are_classes:
        return ""
    # Not every command has data.val_split, and not every layout.
    return (
        "; are these the classes? data.val_split=0.2 keeps a fifth of each for validation in training, resnest-data "
        "split makes folders of both parts"
    )


def list_folders(path: str | Path) -> list[str]:
    """Return the names of the folders in a folder, sorted; a link to itself is not a folder.

    Raises:
        DataError: it cannot be read.
    """
    try:
        return sorted(name for name in os.listdir(path) if os.path.isdir(os.path.join(path, name)))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error


def label_by_classes(images: ImageSource, classes: Sequence[str], whose: str) -> ImageSource:
    """Label the images by the given class list; the source may hold some of these classes only.

    Args:
        images: the source.
        classes: all class names, in the order of the labels.
        whose: the owner of that list, for the error message.

    Raises:
        DataError: a class of the source is not in the list.
    """
    label_of = {name: label for label, name in enumerate(classes)}
    unknown = [name for name in images.classes if name not in label_of]
    if unknown:
        raise DataError(f"{images.root}: {len(unknown)} of its classes are not among {whose}: {_some(unknown)}")
    new_labels = np.array([label_of[name] for name in images.classes], dtype=np.int64)
    return replace(images, classes=tuple(classes), labels=new_labels[images.labels])


def require_same_classes(train: ImageSource, val: ImageSource, places: Sequence[str] | None = None) -> None:
    """Raise a DataError unless both parts have the same classes, with the same labels.

    Args:
        train: the part to train on.
        val: the part to evaluate on.
        places: names of both for the error; None: their folders.
    """
    train_place, val_place = places or (str(train.root), str(val.root))
    for part, place, other_part, other_place in (
        (train, train_place, val, val_place),
        (val, val_place, train, train_place),
    ):
        missing = sorted(set(part.classes) - set(other_part.classes))
        if missing:
            raise DataError(f"{other_place} lacks {len(missing)} of the classes of {place}: {_some(missing)}")
    if train.classes != val.classes:
        raise DataError(f"{val_place} and {train_place} have the same classes, but in another order")


def read_numbers(classes: Sequence[str]) -> list[int] | None:
    """Return class names as numbers, with or without leading zeros; None unless all names are numbers."""
    return [int(name) for name in classes] if all(re.fullmatch("[0-9]{1,9}", name) for name in classes) else None


def read_class_names(path: Path) -> tuple[str, ...]:
    """Return the lines of a text file in UTF-8, with line ends of any system.

    Raises:
        DataError: it is not such a file, or has an empty line or a line twice.
    """
    try:
        content = read_file(path).removeprefix(b"\xef\xbb\xbf").replace(b"\r\n", b"\n")  # Windows writes these
    except (OSError, BadImage) as error:
        raise DataError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
    if b"\0" in content:
        raise DataError(f"{path}: not text in UTF-8 (in UTF-16?); write one class per line, in the labels' order")
    classes = tuple(os.fsdecode(content).removesuffix("\n").split("\n"))
    if len(set(classes)) < len(classes) or "" in classes:
        raise DataError(f"{path}: an empty line or a name twice; write one class per line, in the labels' order")
    return classes


def order_classes(names: Iterable[str]) -> list[str]:
    """Return class names in the order of their labels: sorted as text, or as numbers if they are 0 to N - 1."""
    names = sorted(names)
    numbers = read_numbers(names) or []
    return sorted(names, key=int) if sorted(numbers) == list(range(len(names))) else names


def require_separate(train: Path, val: Path) -> None:
    """Raise a DataError if both parts are the same folder, or one contains the other: images would be in both."""
    train_path, val_path = train.resolve(), val.resolve()
    if train_path == val_path or train_path in val_path.parents or val_path in train_path.parents:
        how = "are the same folder" if train_path == val_path else "overlap (one contains the other)"
        raise DataError(f"{train} and {val} {how}: set data.train_dir and data.val_dir to separate folders")


def describe_counts(labels: np.ndarray, classes: Sequence[str]) -> str:
    """Return how many images, or objects, the classes have, from the fewest to the most.

    Args:
        labels: int64 (N,), of all images or objects.
        classes: names, in the order of the labels.
    """
    counts = np.bincount(labels, minlength=len(classes))
    least, most = int(counts.argmin()), int(counts.argmax())
    if counts[least] == counts[most]:
        return f"{counts[most]:,} in each of {len(classes)} classes"
    return (
        f"{counts[least]:,} ({classes[least]}) to {counts[most]:,} ({classes[most]}), half of the classes have "
        f"{int(np.median(counts)):,} or more"
    )


def print_notes(*sources: ImageSource) -> None:
    """Print the notes of the listings to stderr, each once."""
    for note in dict.fromkeys(note for source in sources for note in source.notes):
        print(printable(note), file=sys.stderr, flush=True)


def are_numbers(classes: Sequence[str]) -> bool:
    """Return whether the class names are just their labels' numbers, as in shards without names."""
    return list(classes) == [str(label) for label in range(len(classes))]


def name_unreadable(images: ImageSource, indices: Iterable[int]) -> str | None:
    """Return one line about the first of these images that cannot be used, or None if all can.

    Raises:
        LoadingError: the storage does not return one.
    """
    for index in indices:
        try:
            fault = find_fault(images.read(index))
        except BadImage as error:
            fault = error.fault
        if fault:
            return f"{images.name(index)}: {fault.detail}"
    return None


def read_named(name: str) -> bytes:
    """Return an image, encoded, by the name that `ImageSource.name` returned.

    Raises:
        BadImage: it is no longer a file.
        OSError: it is missing now, or its shard is damaged.
    """
    shard, _, member = name.partition(".tar: ")
    if not member:
        return read_file(name)
    try:
        with open(open_regular(shard + ".tar"), "rb") as file, tarfile.open(fileobj=file) as archive:
            for entry in archive:
                if entry.name == member and (content := archive.extractfile(entry)):
                    require_size(entry.size)
                    return content.read()
    except tarfile.TarError as error:
        raise OSError(f"{shard}.tar: {error}") from error
    raise FileNotFoundError(name)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
