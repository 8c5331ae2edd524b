"""Pickles of numpy arrays, the form in which detectron2's weights are published, read without executing anything.

A pickle names functions and calls them. Here each name that an array needs stands for a function of this file, which
keeps its arguments; any other name is refused.
"""

import io
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from resnest_imagenet.checkpoint import load_checkpoint, read_file
from resnest_imagenet.errors import DamagedCheckpointError, StorageError, UserError, is_out_of_memory

_TYPES = ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "b1")


class _Type:
    """A numpy type."""

    def __init__(self, code: Any, *_: Any) -> None:
        self.code, self.order = code, "="

    def __setstate__(self, state: Any) -> None:
        self.order = state[1]

    def read(self) -> np.dtype[Any]:
        """Return numpy's own."""
        if self.code not in _TYPES or self.order not in ("<", ">", "=", "|"):
            raise ValueError(f"arrays of type {self.code!r}")
        return np.dtype(self.order + self.code)


class _Array:
    """A numpy array: what numpy would make it of."""

    def __init__(self) -> None:
        self.type, self.shape, self.data = _Type("f4"), (0,), b""
        self.order: Literal["C", "F"] = "C"

    def __setstate__(self, state: Any) -> None:
        _, self.shape, self.type, is_fortran, self.data = state
        self.order = "F" if is_fortran else "C"

    def read(self) -> Tensor:
        """Return the tensor."""
        kind = self.type.read()
        # Python 2 wrote bytes as text.
        data = self.data.encode("latin1") if isinstance(self.data, str) else self.data
        is_shape = all(isinstance(side, int) and side >= 0 for side in self.shape)
        if not is_shape or len(data) != math.prod(self.shape) * kind.itemsize:
            raise ValueError(f"an array {self.shape} of {len(data)} bytes")
        values = np.frombuffer(data, kind).reshape(self.shape, order=self.order)
        return torch.from_numpy(values.astype(kind.newbyteorder("="), order="C"))


def _read_buffer(data: Any, kind: Any, shape: Any, order: Any = "C") -> _Array:
    array = _Array()
    array.__setstate__((1, shape, kind, order == "F", data))
    return array


def _encode(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise ValueError(f"bytes in {encoding!r}")
    return text.encode("latin1")


class _Table(dict[Any, Any]):
    """An ordered dictionary: torch's have attributes."""


_STAND_INS: dict[str, Callable[..., Any]] = {
    "dtype": _Type,
    "_reconstruct": lambda *_: _Array(),
    "_frombuffer": _read_buffer,
    "scalar": lambda *_: None,  # beside the weights: nobody reads it
    "ndarray": lambda *_: None,  # an argument of _reconstruct
    "encode": _encode,
    "bytes": lambda: b"",  # as protocol 2 has no bytes
    "OrderedDict": _Table,
}
_MODULES = ("numpy", "numpy.core.multiarray", "numpy._core.multiarray", "numpy.core.numeric", "numpy._core.numeric")
_NAMES = {f"{module}.{name}": name for module in _MODULES for name in _STAND_INS}
_NAMES |= {"_codecs.encode": "encode", "__builtin__.bytes": "bytes", "collections.OrderedDict": "OrderedDict"}


class _RefusedNameError(Exception):
    """A name in a pickle that no array needs."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """Return what stands for a name; a function of its own each time, so that no pickle can change another's."""
        if f"{module}.{name}" not in _NAMES:
            raise _RefusedNameError(f"{module}.{name}")
        stand_in = _STAND_INS[_NAMES[f"{module}.{name}"]]
        return lambda *arguments: stand_in(*arguments)  # noqa: PLW0108


def load_pickle(path: Path) -> dict[str, Any]:
    """Read a pickle of numpy arrays, its arrays as tensors; a file of torch's under this suffix as `load_checkpoint`.

    Raises:
        CheckpointError: missing, or not to be read.
        DamagedCheckpointError: damaged, or holding more than plain containers and arrays.
        StorageError: the storage fails, or memory is short.
    """
    data = read_file(path)
    if data.startswith(b"PK\x03\x04"):
        return load_checkpoint(path)
    try:
        content = _Unpickler(io.BytesIO(data), encoding="latin1").load()
        if isinstance(content, int):  # how torch's older files begin
            return load_checkpoint(path)
        content = _read_arrays(content)
    except UserError:
        raise
    except _RefusedNameError as error:
        raise DamagedCheckpointError(
            f"{path}: it holds {error}, which is not read, since it may execute code; where you trust the file, read "
            "it with Python's pickle, and torch.save its arrays alone, as tensors"
        ) from None
    except Exception as error:  # what a pickle of foreign bytes raises has no common type
        if is_out_of_memory(error):
            raise StorageError(f"{path}: cannot be read: not enough memory") from error
        raise DamagedCheckpointError(f"{path}: not a readable pickle of arrays") from error
    if not isinstance(content, dict):
        raise DamagedCheckpointError(f"{path}: holds a {type(content).__name__}, not weights by name")
    return content


def _read_arrays(content: Any, depth: int = 2) -> Any:
    """Return a dictionary, and those in it, with tensors in place of arrays."""
    if isinstance(content, _Array):
        return content.read()
    if isinstance(content, dict) and depth:
        return {key: _read_arrays(value, depth - 1) for key, value in content.items()}
    return content
