"""Reads files of others: no file can make it hang or fill the memory, and passing storage errors are retried."""

import errno
import os
import stat
import time
from collections.abc import Callable
from typing import TypeVar

from resnest_imagenet.data.decoding import BadImage, Fault
from resnest_imagenet.errors import LoadingError

Result = TypeVar("Result")

# No image of at most decoding.MAX_PIXELS has more bytes; a larger file is not read.
MAX_BYTES = 2**30
# Errors that may pass: of network file systems, of disks that retry, of other processes.
PASSING = frozenset(
    {
        errno.EIO,
        errno.ESTALE,
        errno.EAGAIN,
        errno.EINTR,
        errno.EBUSY,
        errno.ENOMEM,
        errno.EMFILE,
        errno.ENFILE,
        errno.ETIMEDOUT,
        errno.ENOTCONN,
        errno.ECONNRESET,
        errno.ECONNABORTED,
        errno.EHOSTDOWN,
        errno.EHOSTUNREACH,
        errno.ENETDOWN,
        errno.ENETUNREACH,
    }
)
PAUSES = (0.1, 0.3, 1.0)  # seconds before each retry
REMEDIES = {
    errno.EMFILE: "; raise the limit of open files (ulimit -n) or lower loader.workers",
    errno.ENFILE: "; the whole machine has too many open files (sysctl fs.file-max)",
}
KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def open_regular(path: str | bytes | os.PathLike[str]) -> int:
    """Return a descriptor, open for reading, of a regular file; links are followed.

    Raises:
        BadImage: it is a folder, pipe, socket or device: opening or reading it may never end.
        OSError: it cannot be opened.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in (errno.ENXIO, errno.ENODEV):
            raise _not_a_file(os.stat(path).st_mode) from error
        raise
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        raise _not_a_file(mode)
    return descriptor


def _not_a_file(mode: int) -> BadImage:
    kind = next((name for holds, name in KINDS if holds(mode)), "something else")
    return BadImage(Fault("not a file", f"not a file but {kind}"))


def read_file(path: str | bytes | os.PathLike[str]) -> bytes:
    """Return the content of a regular file of at most MAX_BYTES.

    Raises:
        BadImage: it is not such a file.
        OSError: it cannot be read.
    """
    descriptor = open_regular(path)
    try:
        size = os.fstat(descriptor).st_size
        require_size(size)
        parts: list[bytes] = []
        while part := os.read(descriptor, size + 1 if not parts else 1 << 16):
            parts.append(part)
        return b"".join(parts)
    finally:
        os.close(descriptor)


def require_size(size: int) -> None:
    """Raise BadImage if a file has more bytes than any usable image."""
    if size > MAX_BYTES:
        raise BadImage(Fault("too large", f"a file of {size:,} bytes (over {MAX_BYTES:,}): not read"))


def try_again(read: Callable[[], Result], name: Callable[[], str]) -> Result:
    """Call a function that reads; retry it after errors that may pass.

    Args:
        read: reads and returns the result.
        name: returns the name of the file, for the error.

    Raises:
        LoadingError: instead of the last OSError.
    """
    for pause in (*PAUSES, None):
        try:
            return read()
        except OSError as error:
            if pause is None or error.errno not in PASSING:
                remedy = REMEDIES.get(error.errno or 0, "")
                text = f"{name()}: cannot be read ({error.strerror or error}){remedy}"
                raise LoadingError(error.errno or errno.EIO, text) from error
            time.sleep(pause)
    raise AssertionError("the last try returns or raises")
