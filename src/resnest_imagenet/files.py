"""Files that are written whole or not at all."""

import errno
import fcntl
import glob
import os
import re
import secrets
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, TypeVar, cast

from filelock import FileLock

from resnest_imagenet.errors import ConfigError, StorageError, UserError

Content = TypeVar("Content")

TEMPORARY = ".tmp"  # the suffix of a file that is not whole yet
DAMAGED = ".damaged"  # the suffix of a damaged file
# Errors of file systems without such a call (Lustre, FUSE, NFS): nothing has failed.
UNSUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)
_RANDOM_BYTES = 8  # of a temporary name
RESULTS = "file or run folder"  # what holds results of resnest-eval
_warned: set[str] = set()


@contextmanager
def naming_storage_errors(path: Path) -> Iterator[None]:
    """Name the file in the error if the code within cannot write it.

    Raises:
        StorageError: in place of an OSError, or of torch.save's error for one.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        raise StorageError(f"{path}: cannot be written ({cause.strerror or cause})") from error


@contextmanager
def write_atomically(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file that replaces `path` at the end, synchronised to the disk; after an error it is removed.

    The new file gets the old file's mode, and its owner if this process may change owners. The target of a link is
    replaced, and the link stays. A pipe, a character device and /dev/stdout also stay: the content is written to them.

    Raises:
        StorageError: it cannot be written.
    """
    with naming_storage_errors(path):
        if _is_stream(path):
            with tempfile.TemporaryFile() as file:
                yield cast(BinaryIO, file)
                file.seek(0)
                with _open_stream(path) as stream:
                    shutil.copyfileobj(file, stream)
            return
        target = Path(os.path.realpath(path))
        old = target.stat() if target.exists() else None
        temporary = name_temporary(target)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(temporary, flags, 0o600 if old else 0o666)
        try:
            with open(descriptor, "wb") as file:
                yield file
                file.flush()
                if old:
                    _copy_access(old, descriptor)
                synchronise_file(descriptor, path)
            os.replace(temporary, target)
        except BaseException:
            with suppress(OSError):  # the first error is the one to report
                temporary.unlink(missing_ok=True)
            raise
        synchronise(target.parent)


def _is_stream(path: Path) -> bool:
    """Return whether to write into the path instead of replacing it; an OSError for a folder or a disk."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return False
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "it is a folder")
    if stat.S_ISBLK(mode):
        raise OSError(errno.ENOTSUP, "it is a disk")
    # A file that a process has open, such as /dev/stdout: its reader would not see a replacement.
    folder = os.path.realpath(path.parent)
    return not stat.S_ISREG(mode) or folder == "/dev" or folder.startswith("/proc/")


def _open_stream(path: Path) -> BinaryIO:
    """Open a pipe or device. This process's own outputs are duplicated, to keep their position if they are files."""
    sys.stdout.flush()
    for descriptor in (1, 2):
        with suppress(OSError):  # it may be closed
            if os.path.samestat(path.stat(), os.fstat(descriptor)):
                return open(os.dup(descriptor), "wb")
    return open(path, "wb")


def name_temporary(target: Path) -> Path:
    """Return a unique name beside `target`."""
    name = os.fsdecode(os.fsencode(target.name)[:200])  # the whole name has at most 255 bytes
    return target.with_name(f".{name}.{secrets.token_hex(_RANDOM_BYTES)}{TEMPORARY}")


def _copy_access(old: os.stat_result, descriptor: int) -> None:
    """Give a file the owner, group and mode of another, as far as this process may and the file system can."""
    for owner, group in ((-1, old.st_gid), (old.st_uid, -1)):
        with suppress(OSError):
            os.fchown(descriptor, owner, group)
    with suppress(OSError):
        os.fchmod(descriptor, stat.S_IMODE(old.st_mode))


def remove_temporary(folder: Path, names: Sequence[str]) -> None:
    """Remove the temporary files that a killed process has left in a folder for files of these names or patterns."""
    for name in names:
        for path in folder.glob(f".{name}.{'[0-9a-f]' * 2 * _RANDOM_BYTES}{TEMPORARY}"):
            path.unlink()


def move_damaged(path: Path) -> Path:
    """Rename a damaged file to the first free name with DAMAGED; return the new path.

    Raises:
        StorageError: it cannot be renamed.
    """
    names = [f"{path.name}{DAMAGED}", *(f"{path.name}{DAMAGED}-{number}" for number in range(2, 1000))]
    aside = next(free for name in names if not os.path.lexists(free := path.with_name(name)))
    with naming_storage_errors(path):
        path.rename(aside)
    return aside


def make_way(path: Path) -> None:
    """If a path exists and is not a file, rename it, with a line on stderr.

    Raises:
        StorageError: it cannot be renamed.
    """
    if path.exists() and not path.is_file():
        print(f"WARNING: {path}: not a file: moved to {move_damaged(path).name}", file=sys.stderr, flush=True)


def synchronise(folder: Path) -> None:
    """Write the names in a folder to the disk, after files were renamed or removed."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except PermissionError:  # a folder that cannot be read may still allow new files
        return
    try:
        synchronise_file(descriptor, folder)
    finally:
        os.close(descriptor)


def synchronise_file(descriptor: int, path: Path) -> None:
    """Write an open file or folder to the disk; warn if its file system cannot."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        _warn_once(
            f"{path}: cannot be synchronised to the disk there ({error.strerror}): "
            "what was written last may be lost if the machine crashes"
        )


def _warn_once(line: str) -> None:
    """Print a line, unless the same line was printed before, possibly with another path."""
    kind = line.rpartition(": ")[2]
    if kind not in _warned:
        _warned.add(kind)
        print(f"WARNING: {line}", file=sys.stderr, flush=True)


def _warn_unlocked(path: Path, error: OSError) -> None:
    _warn_once(f"{path}: no file locks there ({error.strerror}): a second process in this folder will not be refused")


@contextmanager
def file_lock(path: Path, timeout: float = 0) -> Iterator[None]:
    """Hold a lock file; it is removed afterwards.

    Args:
        path: the file.
        timeout: seconds to wait for another process that holds it; -1: forever.

    Raises:
        filelock.Timeout: the other process still holds it then.
        OSError: the file cannot be made.
    """
    lock = FileLock(path, timeout=timeout)
    try:
        lock.acquire()
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        _warn_unlocked(path, error)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # before the release: afterwards it may be another process's
        lock.release()


@contextmanager
def record_lock(path: Path, owner: str) -> Iterator[None]:
    """Hold a lock file that names its owner.

    A record lock is released however the process ends, so it is never stale. The flock of `file_lock` would be
    inherited by forked workers, which outlive a killed parent by seconds.

    Args:
        path: the file; it stays, empty, afterwards.
        owner: shown to other processes: "process <number> on <host>".

    Raises:
        ConfigError: another process holds it, or the file is something else.
        OSError: it cannot be made.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    with open(descriptor, "r+", errors="replace") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            raise ConfigError(f"{path.parent} is in use by {file.read() or 'another process'}") from error
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise
            _warn_unlocked(path, error)
        if not re.fullmatch(r"(process \d+ on .*)?", file.read(1000)):
            raise ConfigError(f"{path}: not the lock of a run: remove it, or choose another folder")
        file.seek(0)
        file.truncate()
        file.write(owner)
        file.flush()
        try:
            yield
        finally:
            with suppress(OSError):
                os.ftruncate(descriptor, 0)


def require_writable(path: Path, option: str) -> None:
    """Make the folder of a file to be written; raise a ConfigError before the work if the file cannot be written.

    Args:
        path: the file.
        option: the option with the path, for the message.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not _is_stream(path):
            tempfile.TemporaryFile(dir=os.path.dirname(os.path.realpath(path))).close()
        elif not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise ConfigError(f"{option}={path}: cannot be written ({error.strerror})") from error


def require_file(path: Path) -> None:
    """Raise a ConfigError if a path exists and is not a file: reading a pipe or a device may never end."""
    if path.exists() and not path.is_file():
        raise ConfigError(f"{path}: not a file")


def require_folder(path: Path, option: str) -> None:
    """Raise a ConfigError if the path of an option is not a folder."""
    if not path.is_dir():
        raise ConfigError(f"{option}={path}: {'not a' if path.exists() else 'no such'} folder")


def require_exists(path: Path, option: str, what: str) -> None:
    """Raise a ConfigError if the path of an option does not exist; `what` describes what should be there."""
    if not path.exists():
        raise ConfigError(f"{option}={path}: no such {what}")


def read_matching(
    patterns: Iterable[str | os.PathLike[str]], read: Callable[[Path], Content]
) -> tuple[list[Content], list[str]]:
    """Read all paths, and all paths that match patterns, each once.

    Args:
        patterns: paths, or patterns such as "runs/*".
        read: returns the content of a path.

    Returns:
        The contents, in order, and a line for each path that matches a pattern but cannot be read.

    Raises:
        UserError: of `read`, for a path that is given without a pattern.
    """
    contents: list[Content] = []
    skipped: list[str] = []
    done: set[str] = set()
    for pattern in [os.fspath(pattern) for pattern in patterns]:
        is_path = os.path.exists(pattern) or not glob.has_magic(pattern)
        for name in [pattern] if is_path else sorted(glob.glob(pattern)):
            if os.path.abspath(name) in done:
                continue
            done.add(os.path.abspath(name))
            try:
                contents.append(read(Path(name)))
            except UserError as error:
                if is_path:
                    raise
                skipped.append(str(error))
    return contents, skipped
