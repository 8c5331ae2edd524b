"""The ImageNet folder layout: <root>/<train or val>/<class>/<image>."""

import glob
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np

from resnest_imagenet.data.fetching import fetch_image, is_address
from resnest_imagenet.data.reading import read_file
from resnest_imagenet.data.source import ImageSource, find_part, list_folders, order_classes
from resnest_imagenet.errors import DataError

# Suffixes of decoding.FORMATS; the content decides a file's format.
IMAGE_SUFFIXES = (".jpeg", ".jpg", ".png", ".jpe", ".jfif", ".webp", ".bmp", ".tif", ".tiff")
# Suffixes of formats that the two loaders decode differently or not at all.
OTHER_SUFFIXES = (".gif", ".jp2", ".j2k", ".jxl", ".heic", ".heif", ".avif", ".ppm", ".pgm", ".pnm", ".svg", ".psd")

_ENCODED_SUFFIXES, _DOT = tuple(map(os.fsencode, IMAGE_SUFFIXES)), ord(".")

Kind = Literal["image", "hidden", "other format", "other file"]
# The listing's notes on names that it skips, or takes from an unusual place.
_NOTES: dict[str, str] = {
    "hidden": "hidden files or folders are skipped",
    "beside": "images beside the class folders are skipped: move them into one",
    "other format": f"images of other formats are skipped ({', '.join(IMAGE_SUFFIXES)} are taken)",
    "other file": "files without the name of an image are skipped",
    "nested": "images in folders below the class folders are taken",
}


def tell_by_name(name: str) -> Kind:
    """Return the kind of a file by its name. Files and folders whose names begin with a dot are never read."""
    if name.startswith("."):
        return "hidden"
    if name.lower().endswith(IMAGE_SUFFIXES):
        return "image"
    return "other format" if name.lower().endswith(OTHER_SUFFIXES) else "other file"


class ImageFolder(ImageSource):
    """The images of one folder: its folders are the classes, in `order_classes`; files are sorted by class and name."""

    def path(self, index: int) -> bytes:
        """Return the path of one image, encoded for the operating system."""
        return os.path.join(os.fsencode(self.root), self.files[index])

    def list_sizes(self, indices: np.ndarray) -> np.ndarray:
        """Return sizes in bytes of n images, int64 (n,); -1 for a missing file."""
        folder = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY)  # relative to it, looking up names is faster
        try:
            sizes = [_stat_size(file, folder) for file in self.files[indices].tolist()]
        finally:
            os.close(folder)
        return np.array(sizes, dtype=np.int64)

    def name(self, index: int) -> str:
        """Return the path of one image, for people."""
        return os.fsdecode(self.path(index))

    def fetch(self, index: int) -> bytes:
        """Return one image, encoded."""
        return read_file(self.path(index))


class Listing:
    """Names found below a folder, and the number of each kind that was skipped."""

    def __init__(self, root: str) -> None:
        self._root = root
        self._counts: dict[str, int] = {}
        self._firsts: dict[str, str] = {}

    def count(self, kind: str, path: str, number: int = 1) -> None:
        """Count files of one kind; the note shows the path of the first, below the root."""
        self._counts[kind] = self._counts.get(kind, 0) + number
        self._firsts.setdefault(kind, path)

    def walk(self, folder: str, above: tuple[str, ...] = ()) -> Iterator[str]:
        """Yield the images of a folder, sorted, then those of the folders in it.

        Args:
            folder: below the root.
            above: the real paths of the folders that contain this one: a link to one of them is not followed.

        Raises:
            DataError: it cannot be read.
        """
        place = os.path.join(self._root, folder)
        real = os.path.realpath(place)
        if real in above:
            return
        try:
            names = sorted(os.listdir(place))
        except OSError as error:
            raise DataError(f"{place}: cannot be read ({error.strerror})") from error
        folders = []
        for name in names:
            kind, path = tell_by_name(name), f"{folder}/{name}" if folder else name
            # Images are recognised by name alone: a million look-ups would be slow.
            if kind == "image":
                yield path
            elif kind != "hidden" and os.path.isdir(os.path.join(place, name)):
                folders.append(path)
            else:
                self.count(kind, path)
        for path in folders:
            yield from self.walk(path, (*above, real))

    @property
    def notes(self) -> tuple[str, ...]:
        """A line about each kind."""
        return tuple(
            f"{self._root}: {self._counts[kind]:,} {note} (the first: {self._firsts[kind]})"
            for kind, note in _NOTES.items()
            if kind in self._counts
        )


def _stat_size(file: bytes, folder: int) -> int:
    try:
        return os.stat(file, dir_fd=folder).st_size
    except OSError:
        return -1


def read_image_folder(root: str, name: str, option: str) -> ImageFolder:
    """List the images of `<root>/<name>`.

    Args:
        root: the data set's folder.
        name: the part's folder within it, e.g. "train".
        option: the option that names this part, for the error message.

    Raises:
        DataError: root or part missing, no classes, a class without images.
    """
    part = find_part(root, name, option)
    listing = Listing(str(part))
    folders = list_folders(part)
    classes = order_classes(entry for entry in folders if tell_by_name(entry) != "hidden")
    for entry in sorted(set(folders).difference(classes)):
        listing.count("hidden", entry)
    if not classes:
        raise DataError(f"{part}: no class folders; the layout is {part}/<class>/<image>.JPEG")
    for entry in sorted(set(os.listdir(part)).difference(classes)):
        if tell_by_name(entry) == "image":
            listing.count("beside", entry)
    # An array for each class, not a list of all names: that would take 150 MB for ImageNet.
    files = [_list_class(listing, part, name_of_class) for name_of_class in classes]
    labels = np.repeat(np.arange(len(classes), dtype=np.int64), list(map(len, files)))
    return ImageFolder(part, tuple(classes), np.concatenate(files), labels, notes=listing.notes)


def _list_class(listing: Listing, part: Path, name: str) -> np.ndarray:
    """Return the images of a class, bytes (n,): their paths below the part."""
    files = _list_plain(part / name, os.fsencode(name))
    if files is not None:
        return files
    images = list(listing.walk(name, (os.path.realpath(part),)))
    if not images:
        raise DataError(f"{part / name}: a class without images ({', '.join(IMAGE_SUFFIXES)})")
    nested = [image for image in images if image.count("/") > 1]
    if nested:
        listing.count("nested", nested[0], len(nested))
    return np.array(list(map(os.fsencode, images)))


def _list_plain(folder: Path, name: bytes) -> np.ndarray | None:
    """Return what `Listing.walk` yields for a folder that holds only images, in a third of the time, or None.

    None also if a name is not ASCII: bytes may have another order than text.
    """
    try:
        names = os.listdir(os.fsencode(folder))
    except OSError:
        return None
    is_plain = all(file.lower().endswith(_ENCODED_SUFFIXES) and file[0] != _DOT for file in names)
    if not (names and is_plain and b"".join(names).isascii()):
        return None
    names.sort()
    return np.array([b"%s/%s" % (name, file) for file in names])


def match_paths(pattern: str) -> list[str]:
    """Return the files and folders that a pattern names; an image at a web address is fetched into a file.

    Raises:
        DataError: there are none.
    """
    if is_address(pattern):
        return [fetch_image(pattern)]
    # A file's name may look like a pattern.
    paths = [pattern] if os.path.lexists(pattern) else sorted(glob.glob(pattern, recursive=True))
    if not paths:
        raise DataError(f"images={pattern}: no such file or folder")
    return paths


def find_images(patterns: list[str]) -> ImageFolder:
    """List images without classes, each once, in the order of the patterns.

    Args:
        patterns: files, folders (with all folders in them), patterns such as "photos/**/*.jpg", or web addresses of
            images, which are fetched.

    Raises:
        DataError: a pattern matches no image.
    """
    unique: dict[str, None] = {}
    notes: list[str] = []
    for pattern in patterns:
        images = []
        for path in match_paths(pattern):
            if os.path.isdir(path):
                listing = Listing(path)
                images += sorted(os.path.join(path, image) for image in listing.walk(""))
                notes += listing.notes
            else:
                images.append(path)
        if not images:
            raise DataError(f"images={pattern}: no images in it ({', '.join(IMAGE_SUFFIXES)})")
        unique.update(dict.fromkeys(images))
    files = np.array([os.fsencode(os.path.abspath(path)) for path in unique])
    labels = np.zeros(len(files), dtype=np.int64)
    return ImageFolder(Path(os.sep), ("",), files, labels, notes=tuple(dict.fromkeys(notes)))
