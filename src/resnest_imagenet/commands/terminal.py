"""Survives the loss of standard output and error: a pipe without a reader, a closed terminal, a full disk."""

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
    """Writes to a descriptor, and survives the loss of its target."""

    def __init__(self, descriptor: int, may_lose: bool) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self._may_lose = may_lose
        self._is_lost = False

    def write(self, data: bytes | memoryview, /) -> int:  # type: ignore[override] # typeshed has a wider type
        """Write as much as possible, and return the full length: otherwise a buffer would retry the rest."""
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
    """End the command: like SIGPIPE if there is no reader any more, otherwise with a line."""
    if error.errno in (errno.EPIPE, errno.EIO):
        sys.exit(128 + signal.SIGPIPE)
    with suppress(OSError):
        line = f"{Path(sys.argv[0]).stem}: the output cannot be written ({error.strerror})\n"
        os.write(2, line.encode())
    sys.exit(StorageError.exit_code)


@contextmanager
def surviving_output(may_lose: bool) -> Iterator[None]:
    """Avoid tracebacks if standard output or error is lost, from here to the end of the process.

    Args:
        may_lose: drop output that cannot be written, and continue. Otherwise end the process: with 141 if there is no
            reader any more, and with 6 and a line if a disk is full.
    """
    for descriptor in (0, 1, 2):  # a file that is opened later would get the number of a closed one
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    # Streams that were replaced, as in a test, stay.
    if sys.stdout is sys.__stdout__:
        sys.stdout = _wrap(sys.stdout, 1, may_lose)
    if sys.stderr is sys.__stderr__:
        sys.stderr = _wrap(sys.stderr, 2, may_lose)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a file's name may be more than a terminal can show
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        yield
    finally:  # flush here: at its end, Python would print an error and exit with 120
        sys.stdout.flush()
        sys.stderr.flush()


def _wrap(stream: TextIO | None, descriptor: int, may_lose: bool) -> TextIO:
    """Return a stream that writes like `stream`, which is None if its descriptor was closed."""
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
