"""Checkpoint files: plain containers and tensors, written atomically, verified when read."""

import hashlib
import io
import os
import re
import sys
import time
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from safetensors.torch import load as parse_safetensors
from safetensors.torch import save as format_safetensors

from resnest_imagenet.distributed import launched_as
from resnest_imagenet.errors import CheckpointError, DamagedCheckpointError, StorageError, UserError, is_out_of_memory
from resnest_imagenet.files import write_atomically

# torch's zip archives end with a record of 22 bytes; its last two are the length of a comment, 0. Here the comment is
# the SHA-256 of the archive as torch wrote it. Other readers of zip archives skip it.
_MARK = b"sha256:"
_COMMENT_BYTES = len(_MARK) + 64
_COMMENT_LENGTH = _COMMENT_BYTES.to_bytes(2, "little")
_END_BYTES = 22
# In .safetensors the digest stands in the metadata; it is computed with zeros in its place.
_ZEROS = b"0" * 64
_METADATA_DIGEST = re.compile(rb'"sha256":"([0-9a-f]{64})"')

SECONDS_BETWEEN_READS = (0.5, 2.0)  # of a file whose storage fails: that may pass


class _Unread:
    """Replaces a value beside the weights that is not read: no code of its own class is called."""

    def __init__(self, *_: Any) -> None: ...

    def __setstate__(self, _: Any) -> None: ...


# Classes of values beside the weights in training checkpoints of timm and torchvision's references, by pickle's names.
_UNREAD: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    (_Unread, f"{module}.{name}")
    for modules, names in (
        (("argparse",), ("Namespace",)),
        (("pathlib", "pathlib._local"), ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")),
        (("datetime",), ("date", "datetime", "time", "timedelta", "timezone")),
        (("numpy.core.multiarray", "numpy._core.multiarray"), ("scalar", "_reconstruct")),
        (("numpy",), ("dtype", "ndarray")),
    )
    for module in modules
    for name in names
]


class _Digesting:
    """Writes to a file and computes the SHA-256 of all that is written."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._sha256 = hashlib.sha256()
        self.flush = file.flush

    def write(self, data: Any) -> int:
        self._sha256.update(data)
        return self._file.write(data)

    def make_comment(self) -> bytes:
        return _MARK + self._sha256.hexdigest().encode()


def save_checkpoint(content: dict[str, Any], path: Path) -> None:
    """Write a file whole or not at all, with a digest of all its bytes.

    A .safetensors file holds contiguous tensors only; any other suffix means torch's format.

    Raises:
        StorageError: it cannot be written; an earlier file is still there.
    """
    with write_atomically(path) as file:
        if path.suffix == ".safetensors":
            data = format_safetensors(content, metadata={"format": "pt", "sha256": _ZEROS.decode()})
            # safetensors writes the two in any order: fix it, so that the same tensors give the same bytes.
            data = data.replace(b'{"sha256":"%b","format":"pt"}' % _ZEROS, b'{"format":"pt","sha256":"%b"}' % _ZEROS, 1)
            file.write(data.replace(_ZEROS, hashlib.sha256(data).hexdigest().encode(), 1))
            return
        archive = _Digesting(file)
        torch.save(content, cast("BinaryIO", archive))
        file.seek(-len(_COMMENT_LENGTH), os.SEEK_END)
        file.write(_COMMENT_LENGTH + archive.make_comment())


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a file onto the CPU, without executing anything in it.

    The digest is checked before anything is parsed. Files of other programs and of earlier versions have no digest:
    then the checksums of torch's zip format are checked. Older formats and .safetensors do not have those either.

    Raises:
        CheckpointError: it is missing, or cannot be read.
        DamagedCheckpointError: it is damaged, or holds more than plain containers and tensors.
        StorageError: the storage fails, or memory is short; the file may be sound.
    """
    path = Path(path)
    has_digest = False
    try:
        data = read_file(path)
        has_digest = _check_digest(data, path)
        if path.suffix == ".safetensors":
            return parse_safetensors(data)
        if _is_zip(data):
            _check_archive(data, path, has_digest)
        with warnings.catch_warnings(), torch.serialization.safe_globals(_UNREAD):
            warnings.simplefilter("ignore")  # about old formats, and about what is refused below
            content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except UserError:
        raise
    except Exception as error:  # the errors of torch's unpickler on foreign bytes have no common type
        if is_out_of_memory(error):
            raise StorageError(f"{path}: cannot be read: not enough memory") from error
        if has_digest:  # the file is as it was written
            raise CheckpointError(f"{path}: cannot be read ({type(error).__name__}: {error})") from error
        raise DamagedCheckpointError(
            f"{path}: not a readable checkpoint of plain containers and tensors{_explain(error)}"
        ) from error
    if not isinstance(content, dict):
        raise DamagedCheckpointError(f"{path}: holds a {type(content).__name__}, not a state dict")
    is_of_run = _is_zip(data) and "identity" in content
    if is_of_run and not has_digest and launched_as().rank == 0:
        print(f"{path}: has no digest, only its checksums were checked", file=sys.stderr, flush=True)
    return content


def read_file(path: Path) -> bytes:
    """Return the content of a file; retry if its storage fails.

    Raises:
        CheckpointError: it is missing, or cannot be read.
        StorageError: the storage fails.
    """
    for seconds in (*SECONDS_BETWEEN_READS, None):
        try:
            if not path.is_file():
                raise CheckpointError(f"{path}: no such checkpoint")
            return path.read_bytes()
        except (PermissionError, FileNotFoundError) as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
        except OSError as error:
            if seconds is None:
                raise StorageError(f"{path}: cannot be read ({error.strerror or error})") from error
            time.sleep(seconds)
    raise AssertionError


def _is_zip(data: bytes) -> bool:
    return data.startswith(b"PK\x03\x04")  # torch's own rule


def _check_digest(data: bytes, path: Path) -> bool:
    """Compare a file with its digest; return whether it has one.

    A damaged file of this project does not pass as a file without a digest: the comment's length stands before it.

    Raises:
        DamagedCheckpointError: the digest differs, or an archive does not have a valid end.
    """
    parts: tuple[bytes | memoryview, ...] = ()
    written = b""
    if path.suffix == ".safetensors":
        header = data[: 8 + int.from_bytes(data[:8], "little")]
        if match := _METADATA_DIGEST.search(header):
            parts, written = (data[: match.start(1)], _ZEROS, memoryview(data)[match.end(1) :]), match[1]
    else:
        length, comment = data[-_COMMENT_BYTES - 2 : -_COMMENT_BYTES], data[-_COMMENT_BYTES:]
        if length == _COMMENT_LENGTH and comment.startswith(_MARK):
            parts, written = (memoryview(data)[: -_COMMENT_BYTES - 2], b"\0\0"), comment.removeprefix(_MARK)
        elif _is_zip(data) and not (data[-_END_BYTES:].startswith(b"PK\x05\x06") and data.endswith(b"\0\0")):
            raise DamagedCheckpointError(f"{path}: damaged (its end is missing or changed)")
    if not parts:
        return False
    sha256 = hashlib.sha256()
    for part in parts:
        sha256.update(part)
    if sha256.hexdigest().encode() != written:
        raise DamagedCheckpointError(f"{path}: damaged (it differs from its digest)")
    return True


def _check_archive(data: bytes, path: Path, has_digest: bool) -> None:
    """Refuse a bad zip archive before torch allocates the sizes that it claims.

    Raises:
        DamagedCheckpointError: it is TorchScript's, claims more than its bytes, or fails a checksum.
    """
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = archive.infolist()
        if any(member.filename.endswith("/constants.pkl") for member in members):
            raise DamagedCheckpointError(
                f"{path}: a TorchScript archive, which holds a program: if you trust it, save its weights with "
                "torch.save(torch.jit.load(FILE).state_dict(), NEW)"
            )
        if sum(member.file_size for member in members) > len(data):
            raise DamagedCheckpointError(f"{path}: damaged (it claims to hold more than its bytes)")
        if has_digest:
            return
        # torch.load does not check the checksums: a flipped bit would be loaded silently. If a member is marked as a
        # folder, torch reads nothing and returns uninitialised memory.
        folders = [member.filename for member in members if member.file_size and member.external_attr & 0x10]
        if damaged := next(iter(folders), None) or archive.testzip():
            raise DamagedCheckpointError(f"{path}: damaged ({damaged} fails its checksum)")


def _explain(error: Exception) -> str:
    """Name the type that torch's unpickler refuses, and what to do; "" for another error."""
    refused = re.search(r"GLOBAL (\S+) (?:was|whose)", str(error))
    if refused is None:
        return ""
    return (
        f": it holds {refused[1]}, which is not read because it may execute code; if you trust the file, read it with "
        "torch.load with weights_only off, and torch.save its state dict alone"
    )
