"""Standard output and error that may go away: a pipe whose reader has left, a closed terminal, a full disk."""

import errno
import io
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from resnest_imagenet.errors import StorageError


class _Stream(io.FileIO):
    """A descriptor that outlives what it writes to."""

    def __init__(self, descriptor: int, may_lose: bool) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self._may_lose = may_lose
        self._is_lost = False

    def write(self, data: bytes | memoryview, /) -> int:  # type: ignore[override] # typeshed has a wider type
        """Write what can be written, and say that all was: else a buffer would try again."""
        if not self._is_lost:
            try:
                written = super().write(data)
                return len(data) if written is None else written  # None: a terminal that does not wait, and is full
            except OSError as error:
                if not self._may_lose:
                    self._is_lost = True
                    _leave(error)
        return len(data)


def _leave(error: OSError) -> None:
    """End the command: as SIGPIPE would where nobody reads any more, else with a line."""
    if error.errno in (errno.EPIPE, errno.EIO):
        sys.exit(128 + signal.SIGPIPE)
    with suppress(OSError):
        line = f"{Path(sys.argv[0]).stem}: the output cannot be written ({error.strerror})\n"
        os.write(2, line.encode())
    sys.exit(StorageError.exit_code)


@contextmanager
def surviving_output(may_lose: bool) -> Iterator[None]:
    """Let standard output and error go away without a traceback, from here to the end of the process.

    Args:
        may_lose: lose what cannot be written, and continue. Otherwise leave: with 141 where nobody reads any more, and
            with 6 and a line where a disk is full.
    """
    for descriptor in (0, 1, 2):  # one that is closed would become a file's that is opened later
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    # Where these are others, as in a test, they stay.
    if sys.stdout is sys.__stdout__:
        sys.stdout = _wrap(sys.stdout, 1, may_lose)
    if sys.stderr is sys.__stderr__:
        sys.stderr = _wrap(sys.stderr, 2, may_lose)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a file's name may be more than a terminal can show
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        yield
    finally:  # not when Python ends: that would complain, and leave with 120
        sys.stdout.flush()
        sys.stderr.flush()


def _wrap(stream: TextIO | None, descriptor: int, may_lose: bool) -> TextIO:
    """Return what writes as `stream` does; None: to a descriptor that was closed."""
    if not isinstance(stream, io.TextIOWrapper):
        return stream or open(descriptor, "w", closefd=False)
    raw = _Stream(descriptor, may_lose)
    return io.TextIOWrapper(
        raw if stream.write_through else io.BufferedWriter(raw),  # type: ignore[type-var] # as Python does for -u
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )
