"""The ImageNet folder layout: <root>/<train or val>/<class>/<image>."""

import glob
import os
from pathlib import Path

import numpy as np

from resnest_imagenet.data.source import ImageSource, find_part, list_folders
from resnest_imagenet.errors import DataError

IMAGE_SUFFIXES = (".jpeg", ".jpg", ".png")


class ImageFolder(ImageSource):
    """The images of one folder: the classes are its folders, sorted; the files are sorted by class and name."""

    def path(self, index: int) -> bytes:
        """Return the path of one image as the operating system knows it."""
        return os.path.join(os.fsencode(self.root), self.files[index])

    def list_sizes(self, indices: np.ndarray) -> np.ndarray:
        """Return sizes in bytes of n images, int64 (n,); -1 for a file that is not there."""
        folder = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY)  # names below it are found faster
        try:
            sizes = [_stat_size(file, folder) for file in self.files[indices].tolist()]
        finally:
            os.close(folder)
        return np.array(sizes, dtype=np.int64)

    def name(self, index: int) -> str:
        """Return the path of one image, for people."""
        return os.fsdecode(self.path(index))

    def read(self, index: int) -> bytes:
        """Return one image, encoded."""
        with open(self.path(index), "rb") as file:
            return file.read()


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
    classes = list_folders(part)
    if not classes:
        raise DataError(f"{part}: no class folders; the layout is {part}/<class>/<image>.JPEG")
    files: list[bytes] = []
    labels: list[np.ndarray] = []
    for label, name_of_class in enumerate(classes):
        try:
            images = sorted(name for name in os.listdir(part / name_of_class) if name.lower().endswith(IMAGE_SUFFIXES))
        except OSError as error:
            raise DataError(f"{part / name_of_class}: cannot be read ({error.strerror})") from error
        if not images:
            raise DataError(f"{part / name_of_class}: a class without images ({', '.join(IMAGE_SUFFIXES)})")
        files += [os.fsencode(f"{name_of_class}/{image}") for image in images]
        labels.append(np.full(len(images), label, dtype=np.int64))
    return ImageFolder(part, tuple(classes), np.array(files), np.concatenate(labels))


def find_images(patterns: list[str]) -> ImageFolder:
    """List images that have no classes, each once, in the order of the patterns.

    Args:
        patterns: files, folders (with all that is in them), or patterns such as "photos/**/*.jpg".

    Raises:
        DataError: a pattern that finds no image.
    """
    found: dict[str, None] = {}
    for pattern in patterns:
        # A file's name may look like a pattern.
        paths = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
        images = [image for path in paths for image in (_list_images(path) if os.path.isdir(path) else [path])]
        if not images:
            what = "no images in it" if paths else "no such file or folder"
            raise DataError(f"images={pattern}: {what} ({', '.join(IMAGE_SUFFIXES)})")
        found.update(dict.fromkeys(images))
    files = np.array([os.fsencode(os.path.abspath(path)) for path in found])
    return ImageFolder(Path(os.sep), ("",), files, np.zeros(len(files), dtype=np.int64))


def _list_images(folder: str) -> list[str]:
    return sorted(
        os.path.join(place, name)
        for place, _, names in os.walk(folder)
        for name in names
        if name.lower().endswith(IMAGE_SUFFIXES)
    )
