"""Files that are written whole or not at all."""

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock

from resnest_imagenet.errors import ConfigError, StorageError

TEMPORARY = ".tmp"  # the suffix of a file that is not whole yet


@contextmanager
def storing(path: Path) -> Iterator[None]:
    """Name the file where it cannot be written.

    Raises:
        StorageError: instead of an OSError, or of what torch.save makes of one.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        raise StorageError(f"{path}: cannot be written ({cause.strerror or cause})") from error


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file that takes the place of `path` at the end, synchronised to the disk, or is removed.

    Raises:
        StorageError: it cannot be written.
    """
    temporary = path.with_name(path.name + TEMPORARY)
    with storing(path):
        try:
            with open(temporary, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):  # what failed first is what is reported
                temporary.unlink(missing_ok=True)
            raise
        synchronise(path.parent)


def synchronise(folder: Path) -> None:
    """Write the names in a folder to the disk: what was renamed or removed."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock file, which is gone afterwards; filelock.Timeout where another process holds it."""
    with FileLock(path, timeout=0):
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


@contextmanager
def owned(path: Path, owner: str) -> Iterator[None]:
    """Hold a lock file that says who holds it.

    A record lock: the system gives it up however its process ends, so none is ever stale. One of flock's kind, as
    `locked` has, would live on in forked workers, which outlast a killed process by seconds.

    Args:
        path: the file; it stays, empty, afterwards.
        owner: what others are told.

    Raises:
        ConfigError: another process holds it.
        OSError: it cannot be made, or the file system has no locks.
    """
    with open(path, "a+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            file.seek(0)
            raise ConfigError(f"{path.parent} is in use by {file.read() or 'another process'}") from error
        file.truncate(0)
        file.write(owner)
        file.flush()
        yield
        file.truncate(0)


def require_writable(path: Path, option: str) -> None:
    """Make the folder of a file to be written, and raise a ConfigError now rather than after the work.

    Args:
        path: the file.
        option: the option that named it, for the message.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(None, "it is a folder")
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise ConfigError(f"{option}={path}: cannot be written ({error.strerror})") from error
