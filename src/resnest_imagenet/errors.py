"""Errors that a user can cause: one line that says what is wrong, where, and what to do."""

import difflib
import errno
import importlib
import re
import shlex
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any


class UserError(Exception):
    """An error that is shown as one line, without a traceback.

    Attributes:
        exit_code: of the process.
        is_shared: whether all ranks raise the same error, so that one of them may report it.
        is_reported: whether another rank reports what ends the run.
    """

    exit_code = 1
    is_shared = False
    is_reported = False


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
    """A checkpoint's content differs from what was written."""


class NonFiniteError(UserError):
    """A loss or a gradient is NaN or infinite."""

    exit_code = 5
    is_shared = True


class StorageError(UserError):
    """A file cannot be read or written because disk or memory is full or the storage fails; it may pass."""

    exit_code = 6


class LoadingError(StorageError, OSError):
    """A loader cannot read an image that may be sound: the storage fails, or its workers have died."""

    def __str__(self) -> str:
        return str(self.strerror)


class DistributedError(UserError):
    """Another rank has failed, died or hangs; `exit_code` is that rank's if it reported one."""

    exit_code = 7


class Stopped(SystemExit):
    """A run has stopped as requested; the same command resumes it (EX_TEMPFAIL of sysexits.h).

    It is an exit, not an Exception: a signal handler may raise it in the middle of any code. Code that catches
    `Exception` would take it for a damaged file, a failed compilation or a tracker that does not answer.

    Attributes:
        exit_code, is_shared, is_reported: as in `UserError`.
    """

    exit_code = code = 75
    is_shared = True
    is_reported = False


def suggest(name: str, valid: Iterable[str]) -> str:
    """Return "; did you mean 'x'?" for the nearest of the valid names, or "" if none is near."""
    near = difflib.get_close_matches(name, list(valid), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def list_names(names: Sequence[str], limit: int = 8, like: str | None = None) -> str:
    """Return names for a line; of more than `limit` the first, or those most `like` a name, and how many more."""
    if like is not None and len(names) > limit:
        names = difflib.get_close_matches(like, names, n=len(names), cutoff=0.0)
    more = f" and {len(names) - limit:,} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def name_extra(extra: str) -> str:
    """Return the words for an extra of this project that is not installed, and the command that installs it."""
    from importlib.metadata import PackageNotFoundError, requires

    try:
        needed = requires("resnest-imagenet") or []
    except PackageNotFoundError:  # run from its sources, without an installation
        needed = []
    own = [line.partition(";")[0].strip() for line in needed if re.search(rf"extra == ['\"]{extra}['\"]", line)]
    packages = own or [f"resnest-imagenet[{extra}]"]
    return f"the extra [{extra}] of resnest-imagenet: pip install {' '.join(map(shlex.quote, packages))}"


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether memory was short: the errors of torch's allocators have no common type."""
    is_allocator = isinstance(error, RuntimeError) and any(
        phrase in str(error) for phrase in ("can't allocate memory", "not enough memory", "out of memory")
    )
    return is_allocator or isinstance(error, MemoryError)


def explain_runtime(error: BaseException) -> UserError | None:
    """Explain an error of torch or the system that a user can fix; return None for any other error."""
    text, number = str(error), error.errno if isinstance(error, OSError) else None
    if explained := _explain_kernel(text):
        return explained
    if is_out_of_memory(error) or "ALLOC_FAILED" in text:  # cuBLAS and cuDNN
        return ConfigError(f"{first_line(error)} Lower the batch size; train.global_batch keeps the step as it is")
    if number in (errno.EMFILE, errno.ENFILE) or "Too many open files" in text or "items of ancdata" in text:
        return StorageError("too many open files: raise the limit (ulimit -n), or lower loader.workers")
    # Workers pass batches in files with these names.
    if re.search(r"</torch_|torch_shm_manager|DataLoader worker .* (exited unexpectedly|is killed)", text):
        way_out = "--ipc=host or a larger --shm-size of the container, fewer loader.workers, or loader.workers=0"
        return StorageError(f"{first_line(error).rstrip('. ')}: is /dev/shm full, or memory short? {way_out}")
    if isinstance(error, OSError) and number in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.EROFS):
        return StorageError(f"{error.filename or 'a file'}: {error.strerror}")
    return None


@contextmanager
def explaining_runtime() -> Iterator[None]:
    """Replace a RuntimeError that a user can fix by its UserError, as of a torchvision that does not fit torch."""
    try:
        yield
    except RuntimeError as error:
        explained = explain_runtime(error)
        if explained is None:
            raise
        raise explained from error


def _explain_torchvision() -> str:
    """Name two builds that do not belong together, as torch for CPUs only and the index's torchvision, and the remedy.

    uv takes both from the same index; pip may find the same torch once more.
    """
    from importlib.metadata import version

    builds = f"torchvision {version('torchvision')} was not built for torch {version('torch')}"
    torch_release = version("torch").partition("+")[0]
    command = f"python -m pip install uv && python -m uv pip install --reinstall torch=={torch_release} torchvision"
    return f"{builds}; install both from one index: {command}"


def _explain_kernel(text: str) -> ConfigError | None:
    """Explain torch's words about a kernel that it does not have."""
    if "torchvision::nms" in text:
        return ConfigError(_explain_torchvision())
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
        raise ConfigError(f"detection needs {package}: add {name_extra('detection')}") from error


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, or its type if it has no text."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def printable(text: str) -> str:
    r"""Return a text that fits a line and any terminal: line breaks become \n, bytes that are not UTF-8 \udcff."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
