"""Writes folders of images as WebDataset shards."""

import itertools
import os
import shutil
import tarfile
from collections.abc import Iterable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from filelock import Timeout
from tqdm import tqdm

from resnest_imagenet.data.decoding import BadImage
from resnest_imagenet.data.folder import ImageFolder, read_image_folder
from resnest_imagenet.data.source import (
    print_notes,
    require_same_classes,
    require_separate,
)
from resnest_imagenet.data.webdataset import CLASSES, INDEX, scan_shards
from resnest_imagenet.errors import DataError, LoadingError
from resnest_imagenet.files import file_lock
from resnest_imagenet.randomness import Purpose, stream


def write_shards(root: str, parts: dict[str, str], out: Path, images_per_shard: int, shuffle: bool) -> None:
    """Write folders of images as shards: <out>/<part>/<part>-000000.tar ..., classes.txt and an index.

    The same folders give the same shards, bit for bit: the images are not changed, their times and owners not stored.

    Args:
        root: the data set's folder.
        parts: the folder of each part within root, by the option that names it.
        out: a new or empty folder; it gets the parts when all are complete.
        images_per_shard: of every shard except a part's last.
        shuffle: write the images in a fixed random order, so that each shard mixes classes; otherwise in the folder's
            order.

    Raises:
        DataError: an image cannot be read, the parts' classes differ, `out` is in use or cannot be written.
    """
    sources = [read_image_folder(root, name, option) for option, name in parts.items()]
    print_notes(*sources)
    for source in sources[1:]:
        require_separate(sources[0].root, source.root)
        require_same_classes(sources[0], source)
    broken = [name for name in sources[0].classes if "\n" in name or name.endswith("\r")]
    if broken:  # classes.txt has one name per line
        raise DataError(f"{sources[0].root}: the name of a class has two lines: {broken[0]!r}")
    unfinished, moving, lock = (out / name for name in (".unfinished", ".moving", ".shard.lock"))
    try:
        out.mkdir(parents=True, exist_ok=True)
        with file_lock(lock):
            targets = [out / source.root.name for source in sources]
            shutil.rmtree(unfinished, ignore_errors=True)
            _remove_half_moved(moving, targets)
            if any(entry != lock for entry in out.iterdir()):
                raise DataError(f"out={out}: is not empty; remove it or choose another folder")
            for source in sources:
                _write_part(source, unfinished / source.root.name, images_per_shard, shuffle)
            unfinished.rename(moving)
            for target in targets:
                (moving / target.name).rename(target)
            moving.rmdir()
    except Timeout:
        raise DataError(f"out={out}: another resnest-data shard is writing it") from None
    except LoadingError:  # it is an OSError too, but of reading
        raise
    except OSError as error:
        raise DataError(f"out={out}: cannot be written ({error.strerror})") from error


def _remove_half_moved(moving: Path, targets: Sequence[Path]) -> None:
    """Remove the remains of a writer that was killed while it moved the parts to their places."""
    if not moving.exists():
        return
    if any(moving.iterdir()):  # otherwise all parts were moved
        for target in targets:
            shutil.rmtree(target, ignore_errors=True)
    shutil.rmtree(moving)


def _write_part(images: ImageFolder, folder: Path, images_per_shard: int, shuffle: bool) -> None:
    folder.mkdir(parents=True)
    members = name_members(map(os.fsdecode, images.files.tolist()))
    order = stream(0, Purpose.ORDER, epoch=0).permutation(len(images)) if shuffle else np.arange(len(images))
    paths: list[Path] = []
    with tqdm(total=len(images), desc=folder.name, unit=" images", disable=None, dynamic_ncols=True) as progress:
        for first in range(0, len(images), images_per_shard):
            paths.append(folder / f"{folder.name}-{len(paths):06d}.tar")
            # Not the default format: DALI's reader does not support its long names.
            with tarfile.open(paths[-1], "w", format=tarfile.GNU_FORMAT) as tar:
                for index in order[first : first + images_per_shard].tolist():
                    try:
                        encoded = images.read(index)
                    except BadImage as error:
                        raise DataError(f"{images.name(index)}: {error.fault.detail}") from error
                    key, extension = members[index]
                    _add_member(tar, f"{key}.{extension}", encoded)
                    _add_member(tar, f"{key}.cls", b"%d" % images.labels[index])
                    progress.update()
    (folder / CLASSES).write_bytes(os.fsencode("".join(f"{name}\n" for name in images.classes)))
    # Read the shards back to make the index: it then describes what is really in them.
    listing: dict[str, Any] = scan_shards(paths)
    np.savez(folder / INDEX, **listing)


def name_members(files: Iterable[str]) -> list[tuple[str, str]]:
    """Return unique pairs of key and extension for the files "<class>/<file>" of a folder, sorted by class.

    A key ends at the first dot, so dots before the suffix are written %2E, as in a URL. If files of a class differ only
    in the suffix, all keys of that class include it.
    """
    members = []
    for name_of_class, group in itertools.groupby(files, lambda file: file.partition("/")[0]):
        names = [file.partition("/")[2] for file in group]
        stems = [name.rpartition(".")[0] for name in names]
        if len(set(stems)) < len(stems):
            stems = names
        for stem, name in zip(stems, names, strict=True):
            key = stem.replace("%", "%25").replace(".", "%2E")
            members.append((f"{name_of_class}/{key}", name.rpartition(".")[2].lower()))
    return members


def _add_member(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    header = tarfile.TarInfo(name)  # without time and owner
    header.size = len(content)
    tar.addfile(header, BytesIO(content))
