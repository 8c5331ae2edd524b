"""Errors that a user can cause: one line that says what is wrong, where, and what to do."""

import difflib
import errno
import importlib
import re
from collections.abc import Iterable
from typing import Any


class UserError(Exception):
    """An error to be shown as one line, without a traceback.

    Attributes:
        exit_code: of the process.
        is_shared: whether all ranks raise it alike, so that one of them may speak for all.
        is_said: whether another rank says what ends the run.
    """

    exit_code = 1
    is_shared = False
    is_said = False


class ConfigError(UserError, ValueError):
    """An option is unknown, missing, of the wrong type, out of range, or at odds with another."""

    exit_code = 2


class DataError(UserError):
    """The data set is missing, malformed or unreadable."""

    exit_code = 3


class CheckpointError(UserError):
    """A checkpoint is missing, damaged, or not of this model."""

    exit_code = 4


class DamagedCheckpointError(CheckpointError):
    """A checkpoint's content is not what was written."""


class NonFiniteError(UserError):
    """A loss or a gradient is NaN or infinite."""

    exit_code = 5
    is_shared = True


class StorageError(UserError):
    """A file cannot be read or written for want of disk, memory or a working storage: it may pass."""

    exit_code = 6


class LoadingError(StorageError, OSError):
    """A loader does not get an image that may be sound: the storage fails, or its workers are gone."""

    def __str__(self) -> str:
        return str(self.strerror)


class DistributedError(UserError):
    """Another rank has failed, died or hangs; `exit_code` is the cause's, where that rank has told it."""

    exit_code = 7


class Stopped(SystemExit):
    """A run has stopped as asked; the same command resumes it (EX_TEMPFAIL of sysexits.h).

    An exit and no Exception: a signal's handler raises it in the middle of anything, and whoever catches `Exception`
    there would take it for a damaged file, a failed compilation or a tracker that does not answer.

    Attributes:
        exit_code, is_shared, is_said: as of a `UserError`.
    """

    exit_code = code = 75
    is_shared = True
    is_said = False


def suggest(name: str, valid: Iterable[str]) -> str:
    """Return "; did you mean 'x'?" for the nearest of the valid names, or "" where none is near."""
    near = difflib.get_close_matches(name, list(valid), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def is_out_of_memory(error: BaseException) -> bool:
    """Say whether memory was short: torch's allocators have no common type for that."""
    is_allocator = isinstance(error, RuntimeError) and any(
        phrase in str(error) for phrase in ("can't allocate memory", "not enough memory", "out of memory")
    )
    return is_allocator or isinstance(error, MemoryError)


def explain_runtime(error: BaseException) -> UserError | None:
    """Explain what torch or the system raises where a user can fix it; None for any other error."""
    text, number = str(error), error.errno if isinstance(error, OSError) else None
    if explained := _explain_kernel(text):
        return explained
    if is_out_of_memory(error) or "ALLOC_FAILED" in text:  # cuBLAS and cuDNN
        return ConfigError(f"{first_line(error)} Lower the batch size; train.global_batch keeps the step as it is")
    if number in (errno.EMFILE, errno.ENFILE) or "Too many open files" in text or "items of ancdata" in text:
        return StorageError("too many open files: raise the limit (ulimit -n), or lower loader.workers")
    # Workers hand over batches in files of these names.
    if re.search(r"</torch_|torch_shm_manager|DataLoader worker .* (exited unexpectedly|is killed)", text):
        way_out = "--ipc=host or a larger --shm-size of the container, fewer loader.workers, or loader.workers=0"
        return StorageError(f"{first_line(error).rstrip('. ')}: is /dev/shm full, or memory short? {way_out}")
    if isinstance(error, OSError) and number in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.EROFS):
        return StorageError(f"{error.filename or 'a file'}: {error.strerror}")
    return None


def _explain_kernel(text: str) -> ConfigError | None:
    """Explain torch's words about a kernel that it does not have."""
    if "torchvision::nms" in text:
        from importlib.metadata import version

        return ConfigError(
            f"torchvision {version('torchvision')} was not built for torch {version('torch')}: "
            "install both from the same index (make setup does, with uv)"
        )
    if "does not have a deterministic implementation" in text:
        kernel = text.partition(" does not have a deterministic")[0].rpartition(" ")[2]
        return ConfigError(f"train.deterministic=true: torch has no such kernel of {kernel}: set it to false")
    return None


def import_extra(module: str) -> Any:
    """Return a module of the extra [detection], such as pycocotools.mask.

    Raises:
        ConfigError: its package is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ConfigError(f"detection needs {package}: add the extra [detection] of resnest-imagenet") from error


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, or its type where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def printable(text: str) -> str:
    r"""Return a text that fits a line and any terminal: with \n for a line break and \udcff for what is no UTF-8."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
