"""The official ILSVRC2012 archives, unpacked to the ImageNet folder layout.

Everything is written below `out`/prepare.tmp and renamed when it is finished, so only finished parts have their final
names. A command that was killed resumes from these names, without a record of its own. (After a power cut, a disk may
lack data that was written: `resnest-data check` finds such images.)
"""

import hashlib
import io
import os
import re
import shutil
import tarfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NoReturn

from filelock import Timeout
from tqdm import tqdm

from resnest_imagenet.errors import ConfigError, DataError, first_line, name_extra
from resnest_imagenet.files import file_lock

TRAIN = "ILSVRC2012_img_train.tar"  # holds a tar of images for each class
VAL = "ILSVRC2012_img_val.tar"
DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"
META = "ILSVRC2012_devkit_t12/data/meta.mat"
GROUND_TRUTH = "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt"

# Names are written to the disk only if they match: no folders, nothing absolute.
SYNSET = re.compile(r"n[0-9]{8}")
CLASS_TAR = re.compile(r"(n[0-9]{8})\.tar")
VAL_IMAGE = re.compile(r"ILSVRC2012_val_([0-9]{8})\.JPEG")


@dataclass(frozen=True)
class Release:
    """The archives of a data set: their MD5, and how many classes and images they hold."""

    md5: Mapping[str, str]
    num_classes: int
    num_images: Mapping[str, int]


ILSVRC2012 = Release(
    md5={
        DEVKIT: "fa75699e90414af021442c21a62c3abf",
        VAL: "29b22e2961454d5413ddabcf34fc5622",
        TRAIN: "1d675b47d978889d74fa0da5fadfb00e",
    },
    num_classes=1000,
    num_images={"train": 1_281_167, "val": 50_000},
)


def prepare_images(archives: Path, out: Path, verify: bool, release: Release = ILSVRC2012) -> bool:
    """Write out/{train,val}/<synset>/<image>.JPEG; resume where an earlier call was killed.

    Args:
        archives: the folder of the three archives, as they were downloaded.
        out: the folder to write.
        verify: compare the archives' MD5 first.
        release: the expected archives.

    Returns:
        False if everything is there already.

    Raises:
        ConfigError: scipy is not installed.
        DataError: an archive is missing, unreadable, not the official one, or has an unexpected member; `out` holds
            something else or cannot be written; another process is writing it.
    """
    work, lock = out / "prepare.tmp", out / ".prepare.lock"
    try:
        if not _list_missing(out, release) and not work.exists() and not lock.exists():
            return False
        out.mkdir(parents=True, exist_ok=True)
        with file_lock(lock):
            parts = _list_missing(out, release)  # another process may have written some meanwhile
            if parts:
                _require_folders(work, work / "val", work / "train", work / "class")
                work.mkdir(exist_ok=True)
                _write_parts(parts, archives, out, work, release, verify)
            if work.exists():
                shutil.rmtree(work)
    except Timeout:
        raise DataError(f"out={out}: another resnest-data prepare is writing it") from None
    except OSError as error:
        raise DataError(f"{error.filename or f'{archives} to {out}'}: {error.strerror or error}") from error
    return bool(parts)


def _list_missing(out: Path, release: Release) -> list[str]:
    """Return the parts that are not there yet; a DataError if an existing one does not have the expected numbers."""
    missing = []
    for part in ("val", "train"):
        if (out / part).exists():
            _require_counts(out / part, release.num_images[part], release.num_classes)
        else:
            missing.append(part)
    return missing


def _write_parts(parts: Sequence[str], archives: Path, out: Path, work: Path, release: Release, verify: bool) -> None:
    needs = {"val": (DEVKIT, VAL), "train": (TRAIN,)}
    for name in (name for part in parts for name in needs[part]):
        if not (archives / name).is_file():
            raise DataError(f"{archives / name}: no such archive")
    # Everything that can be refused comes first: unpacking takes the longest.
    if verify and "val" in parts:
        _require_md5(archives / DEVKIT, release.md5[DEVKIT])
    synsets = read_val_synsets(archives / DEVKIT) if "val" in parts else []
    for name in (name for part in parts for name in needs[part] if verify and name != DEVKIT):
        _require_md5(archives / name, release.md5[name])
    for part in parts:
        if part == "val":
            _extract_val(archives / VAL, synsets, work / part)
        else:
            _extract_train(archives, work / part, work / "class")
        _require_counts(work / part, release.num_images[part], release.num_classes)
        other_part = out / ("train" if part == "val" else "val")
        if other_part.exists() and set(os.listdir(other_part)) != set(os.listdir(work / part)):
            raise DataError(f"{work / part}: its classes are not those of {other_part}; remove it and start again")
        os.rename(work / part, out / part)


def _require_folders(*folders: Path) -> None:
    """Refuse links: writing through them would change other folders."""
    for folder in folders:
        if folder.is_symlink():
            raise DataError(f"{folder}: is a link; remove it")


def _require_counts(folder: Path, num_images: int, num_classes: int) -> None:
    classes = [entry for entry in os.scandir(folder) if entry.is_dir()]
    count = sum(name.endswith(".JPEG") for entry in classes for name in os.listdir(entry))
    if (count, len(classes)) != (num_images, num_classes):
        raise DataError(
            f"{folder}: {count:,} images in {len(classes):,} classes, not {num_images:,} in {num_classes:,}; "
            "remove it and start again with the official archives, or choose another out"
        )


def _require_md5(archive: Path, expected: str) -> None:
    digest = hashlib.md5(usedforsecurity=False)
    with open(archive, "rb") as file, _bar(f"md5 of {archive.name}", archive.stat().st_size, "B") as bar:
        while block := file.read(1 << 20):
            digest.update(block)
            bar.update(len(block))
    if digest.hexdigest() != expected:
        raise DataError(f"{archive}: not the official archive (its md5 is {digest.hexdigest()}, not {expected})")


def read_val_synsets(devkit: Path) -> list[str]:
    """Return the synset of each val image, by its number.

    The devkit numbers the classes in its own way, and only a MATLAB file has the synset of each number. scipy reads
    that file: the format is complex, and a wrong label would be noticed late or never.

    Raises:
        ConfigError: scipy is not installed.
        DataError: it is not the official devkit.
    """
    try:
        from scipy.io import loadmat
        from scipy.io.matlab import MatReadError
    except ImportError:
        raise ConfigError(f"the val labels need scipy: add {name_extra('prepare')}") from None
    with _open_tar(devkit) as tar:
        meta, truth = (_read_member(tar, devkit, name) for name in (META, GROUND_TRUTH))
    try:
        table = loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"]
        synset_of = dict(zip(table["ILSVRC2012_ID"].tolist(), table["WNID"].tolist(), strict=True))
        synsets = [synset_of[int(line)] for line in truth.split()]
        if not all(SYNSET.fullmatch(synset) for synset in synsets):
            raise ValueError("a class that is not a synset")
    except (MatReadError, NotImplementedError, LookupError, OSError, TypeError, ValueError, zlib.error) as error:
        raise DataError(f"{devkit}: not the official devkit ({first_line(error)})") from error
    return synsets


def _extract_val(archive: Path, synsets: Sequence[str], folder: Path) -> None:
    """Unpack the val images into class folders of `folder`, all at once: the archive does not sort them by class."""
    if folder.exists():
        shutil.rmtree(folder)
    for synset in set(synsets):
        (folder / synset).mkdir(parents=True)
    with _open_tar(archive) as tar, _bar("val", len(synsets), "images") as bar:
        for member in tar:
            number = int(_require_plain(member, VAL_IMAGE, archive)[1])
            if not 1 <= number <= len(synsets):
                raise DataError(f"{archive}: {member.name!r} has no label in {DEVKIT}")
            _extract(tar, member, folder / synsets[number - 1])
            bar.update()


def _extract_train(archives: Path, folder: Path, unfinished: Path) -> None:
    """Unpack the train images to `folder`: each class to `unfinished`, which is renamed when it is complete."""
    archive = archives / TRAIN
    folder.mkdir(exist_ok=True)
    with _open_tar(archive) as tar:
        classes = {_require_plain(member, CLASS_TAR, archive)[1]: member for member in tar}
        done = sum(member.size for synset, member in classes.items() if (folder / synset).exists())
        with _bar("train", sum(member.size for member in classes.values()), "B", done) as bar:
            for synset, member in classes.items():
                if (folder / synset).exists():
                    continue
                if unfinished.exists():
                    shutil.rmtree(unfinished)
                unfinished.mkdir()
                inner, name = archive / member.name, re.compile(rf"{synset}_[0-9]+\.JPEG")
                with _open_tar(inner, tar.extractfile(member)) as images:
                    for image in images:
                        _require_plain(image, name, inner)
                        _extract(images, image, unfinished)
                os.rename(unfinished, folder / synset)
                bar.update(member.size)


@contextmanager
def _open_tar(path: Path, file: IO[bytes] | None = None) -> Iterator[tarfile.TarFile]:
    """Open the archive at `path`, or in a file that is open already; damage becomes a DataError of one line."""
    try:
        with tarfile.open(path, "r:gz" if path.suffix == ".gz" else "r:", fileobj=file) as tar:
            yield tar
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: damaged ({first_line(error)})") from error


def _require_plain(member: tarfile.TarInfo, form: re.Pattern[str], archive: Path) -> re.Match[str]:
    """Return the match of a member's name; a link, device, folder, sparse file or other name raises a DataError."""
    match = form.fullmatch(member.name)
    if match is None or member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or member.issparse():
        raise DataError(f"{archive}: {member.name!r} does not belong there: only files named {form.pattern} do")
    return match


def _extract(tar: tarfile.TarFile, member: tarfile.TarInfo, folder: Path) -> None:
    """Write a plain member: only its content, without mode, owner and time."""
    with open(folder / member.name, "xb") as file:
        shutil.copyfileobj(_content(tar, member), file)


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> IO[bytes]:
    content = tar.extractfile(member)
    assert content is not None, member.name  # plain members have content
    return content


def _read_member(tar: tarfile.TarFile, archive: Path, name: str) -> bytes:
    try:
        member = tar.getmember(name)
    except KeyError:
        raise DataError(f"{archive}: lacks {name}") from None
    _require_plain(member, re.compile(re.escape(name)), archive)
    return _content(tar, member).read()


def _bar(name: str, total: int, unit: str, done: int = 0) -> "tqdm[NoReturn]":
    """Return a progress bar with the time left, shown on a terminal only."""
    return tqdm(desc=name, total=total, initial=done, unit=unit, unit_scale=True, disable=None, dynamic_ncols=True)
