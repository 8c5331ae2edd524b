"""WebDataset shards: tar files of images, each beside its label, read in any order.

A shard holds `key.jpg` (or another of IMAGE_SUFFIXES) and `key.cls`, the label in decimal digits; other files of a key
are skipped. An image is read from its place in the shard, so any image can be read at any time, as from a folder, and
the plan decides the order.
"""

import gc
import multiprocessing
import os
import re
import tarfile
import zipfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from errno import ENODATA
from functools import lru_cache
from pathlib import Path

import numpy as np

from resnest_imagenet.data.folder import IMAGE_SUFFIXES
from resnest_imagenet.data.processes import START_METHOD, end_with_parent
from resnest_imagenet.data.reading import open_regular, require_size
from resnest_imagenet.data.source import (
    ImageSource,
    find_part,
    read_class_names,
)
from resnest_imagenet.errors import DataError

IMAGE_EXTENSIONS = tuple(suffix[1:] for suffix in IMAGE_SUFFIXES)
# A key's image is its member with one of these. Another of the above is the image only without one: it may be a mask.
USUAL_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
CLASSES = "classes.txt"  # one name per line, in the order of the labels
INDEX = "index.npz"  # the result of `scan_shards`
OPEN_SHARDS = 256  # per process and part: both parts stay below the usual limit of 1024 open files
SCANNING_PROCESSES = 8

# Arrays by name: "files" (bytes), "offset" and "length" (of the image in its shard, int64) and "labels" (int64), all
# (N,). A listing of several shards also has "shard" (the number of each image's shard, (N,) int32), "shards" (their
# names) and "sizes" (int64).
Listing = dict[str, np.ndarray]
Image = tuple[str, int, int]  # its name, its offset in the shard, its length
Member = tuple[str, Image]  # its extension, the image


class _Descriptor:
    """An open file that is closed when its last reference is dropped."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __del__(self) -> None:
        os.close(self.number)


class _OpenFiles:
    """The files read last, kept open, for any number of threads.

    A forked process shares them: every read gives its own position. A pickled copy opens its own files.
    """

    def __init__(self) -> None:
        self._open = lru_cache(OPEN_SHARDS)(lambda path: _Descriptor(open_regular(path)))

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return _OpenFiles, ()

    def read(self, path: str, offset: int, length: int) -> bytes:
        descriptor = self._open(path)  # a reference until the end: another thread may push it out of the cache
        parts = []
        try:
            while length and (part := os.pread(descriptor.number, length, offset)):
                parts.append(part)
                length, offset = length - len(part), offset + len(part)
        except OSError:
            self._open.cache_clear()  # a stale descriptor stays stale
            raise
        return b"".join(parts)


@dataclass(frozen=True)
class ShardedImages(ImageSource):
    """Images in tar files; `files` holds "<shard>/<member>".

    Attributes:
        shards: names of the shards, below root.
        shard: (N,) int32, the number of each image's shard, in ascending order.
        offset, length: (N,) int64, in bytes, the place of each image in its shard.
    """

    shards: tuple[str, ...]
    shard: np.ndarray
    offset: np.ndarray
    length: np.ndarray
    _open_files: _OpenFiles = field(default_factory=_OpenFiles, init=False, repr=False, compare=False)

    @property
    def shard_sizes(self) -> tuple[int, ...]:
        """How many images each shard holds."""
        return tuple(np.bincount(self.shard, minlength=len(self.shards)).tolist())

    def list_sizes(self, indices: np.ndarray) -> np.ndarray:
        """Return sizes in bytes of n images, int64 (n,), from the listing."""
        return self.length[indices]

    def name(self, index: int) -> str:
        """Return the path of the image's shard and its name there."""
        shard, _, member = os.fsdecode(self.files[index]).partition("/")
        return f"{self.root / shard}: {member}"

    def fetch(self, index: int) -> bytes:
        """Return one image, encoded."""
        path = os.path.join(self.root, self.shards[self.shard[index]])
        require_size(int(self.length[index]))
        encoded = self._open_files.read(path, int(self.offset[index]), int(self.length[index]))
        if len(encoded) < self.length[index]:
            raise OSError(ENODATA, "the shard has become shorter")
        return encoded


def read_shards(root: str, name: str, option: str) -> ShardedImages:
    """List the images of `<root>/<name>/*.tar`, from the index beside them or, without one, from their headers.

    The class names are the lines of classes.txt, beside the shards or in root; without it, the labels in digits.

    Args:
        root: the data set's folder.
        name: the part's folder within it, e.g. "train".
        option: the option that names this part, for the error message.

    Raises:
        DataError: there are no shards, a shard is damaged, the index is of other shards, an image has no label, or a
            label has no name.
    """
    part = find_part(root, name, option)
    paths = sorted(path for path in part.glob("*.tar") if not path.name.startswith("."))
    if not paths:
        raise DataError(f"{part}: no shards (*.tar)")
    for path in paths:
        if not path.is_file():  # opening a pipe would wait forever
            raise DataError(f"{path}: not a file, or a broken link")
    index = part / INDEX
    listing = _read_index(index, paths) if index.is_file() else scan_shards(paths)
    columns = (listing[column] for column in ("shard", "offset", "length"))
    images = ShardedImages(part, (), listing["files"], listing["labels"], tuple(p.name for p in paths), *columns)
    if not len(images):
        raise DataError(f"{part}: shards without images ({', '.join(IMAGE_EXTENSIONS)})")
    return replace(images, classes=_name_classes(images, Path(root)))


def _name_classes(images: ShardedImages, root: Path) -> tuple[str, ...]:
    """Read classes.txt or number the classes; a DataError unless each label has a name."""
    files = [folder / CLASSES for folder in (images.root, root) if (folder / CLASSES).is_file()]
    if not files:
        present = np.unique(images.labels)
        missing = np.setdiff1d(np.arange(len(present)), present)
        if len(missing):
            raise DataError(
                f"{images.root}: there are labels up to {present[-1]}, but no label {missing[0]}: "
                f"name all classes in {images.root / CLASSES}, one per line"
            )
        return tuple(map(str, range(len(present))))
    classes = read_class_names(files[0])
    worst = int(images.labels.argmax())
    if images.labels[worst] >= len(classes):
        raise DataError(
            f"{images.name(worst)}: label {images.labels[worst]}, but {files[0]} names {len(classes)} classes"
        )
    return classes


def _read_index(index: Path, paths: Sequence[Path]) -> Listing:
    """Load a listing; a DataError unless it is of these shards."""
    remedy = "remove it (the shards are then listed from their headers) or write the shards again"
    try:
        with np.load(index, allow_pickle=False) as file:
            listing = dict(file)
        indexed = dict(zip(listing["shards"].tolist(), listing["sizes"].tolist(), strict=True))
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise DataError(f"{index}: not an index of shards; {remedy}") from error
    sizes = {path.name: path.stat().st_size for path in paths}
    differing = sorted(name for name in indexed.keys() | sizes.keys() if indexed.get(name) != sizes.get(name))
    for number in range(len(listing["shards"])) if not differing else ():
        rows = np.flatnonzero(listing["shard"] == number)[[0, -1]]
        if not all(_holds(index.parent, listing, row) for row in rows.tolist()):
            differing.append(listing["shards"][number])
    if differing:
        raise DataError(f"{index}: does not match {differing[0]} (missing, new or with other content); {remedy}")
    return listing


def _holds(part: Path, listing: Listing, row: int) -> bool:
    """Return whether an image has its header where the listing expects it."""
    shard, _, member = listing["files"][row].partition(b"/")
    with open(os.path.join(os.fsencode(part), shard), "rb") as file:
        header = os.pread(file.fileno(), tarfile.BLOCKSIZE, int(listing["offset"][row]) - tarfile.BLOCKSIZE)
    return header[:100].rstrip(b"\0") == member[:100]


def scan_shards(paths: Sequence[Path]) -> Listing:
    """List shards from their headers, several at a time."""
    # The processes do not collect frozen objects: see `WorkerLoader.batches`.
    gc.freeze()
    try:
        number = min(SCANNING_PROCESSES, len(paths))
        context = multiprocessing.get_context(START_METHOD)
        with ProcessPoolExecutor(number, context, end_with_parent, (os.getpid(),)) as pool:
            parts = list(pool.map(_scan_shard, paths))
    finally:
        gc.unfreeze()
    return {
        **{column: np.concatenate([part[column] for part in parts]) for column in parts[0]},
        "shard": np.repeat(np.arange(len(paths), dtype=np.int32), [len(part["files"]) for part in parts]),
        "shards": np.array([path.name for path in paths]),
        "sizes": np.array([path.stat().st_size for path in paths]),
    }


def _scan_shard(path: Path) -> Listing:
    """List one shard, in its own order."""
    members: dict[str, list[Member]] = {}
    labels: dict[str, int] = {}
    dotted: dict[str, str] = {}  # members such as a.b.jpg, by their key, here a
    name = "its beginning"
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                name = member.name
                key, extension = _split(name)
                is_hidden = name.rpartition("/")[2].startswith(".")
                if is_hidden or not member.isfile() or extension.rpartition(".")[2] not in (*IMAGE_EXTENSIONS, "cls"):
                    continue
                if "." in extension:
                    dotted.setdefault(key, name)
                    continue
                if extension == "cls":
                    if key in labels:
                        raise DataError(f"{path}: {key} has two labels")
                    text = os.pread(file.fileno(), min(member.size, 32), member.offset_data)
                    if not re.fullmatch(rb"\s*\d{1,9}\s*", text):
                        raise DataError(f"{path}: {name}: {text!r} is not a label (digits, counted from 0)")
                    labels[key] = int(text)
                else:
                    image = f"{path.name}/{name}", member.offset_data, member.size
                    members.setdefault(key, []).append((extension, image))
            # The end of an archive is a block of zeros; tarfile also stops at a damaged header or the end of the file.
            if os.pread(file.fileno(), tarfile.BLOCKSIZE, tar.offset) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError("the archive has no end")
    except tarfile.TarError as error:
        raise DataError(f"{path}: a truncated or damaged tar file after {name} ({error})") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    images = _choose_images(path, members, labels)
    alone = sorted(images.keys() ^ labels.keys())
    if alone:
        missing = "label (.cls)" if alone[0] in images else f"image ({', '.join(IMAGE_EXTENSIONS)})"
        raise DataError(f"{path}: {alone[0]} has no {missing}")
    lost = next((key for key in dotted if key not in images), None)
    if lost is not None:
        raise DataError(f"{path}: {dotted[lost]}: a key ends at the first dot, and {lost} has no image: rename it")
    return {
        "files": np.array([os.fsencode(file) for file, _, _ in images.values()], dtype=np.bytes_),
        "offset": np.array([offset for _, offset, _ in images.values()], dtype=np.int64),
        "length": np.array([length for _, _, length in images.values()], dtype=np.int64),
        "labels": np.array([labels[key] for key in images], dtype=np.int64),
    }


def _choose_images(path: Path, members: dict[str, list[Member]], labels: dict[str, int]) -> dict[str, Image]:
    """Return the image of each key."""
    images = {}
    for key, candidates in members.items():
        usual = [image for extension, image in candidates if extension in USUAL_EXTENSIONS]
        if len(usual) > 1:
            raise DataError(f"{path}: {key} has two images")
        if usual or key in labels:
            images[key] = usual[0] if usual else candidates[0][1]
    return images


def _split(member: str) -> tuple[str, str]:
    """Return key and extension, split at the first dot after the last slash, as WebDataset does."""
    folder, slash, base = member.rpartition("/")
    stem, _, extension = base.partition(".")
    return f"{folder}{slash}{stem}", extension.lower()
