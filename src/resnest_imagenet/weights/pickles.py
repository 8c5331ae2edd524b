"""Reads pickles of numpy arrays, the form of detectron2's published weights, without executing anything.

A pickle names functions and calls them. Here each name that an array needs is replaced by a function of this file that
only keeps its arguments; any other name is refused.
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
    """A numpy type in a pickle."""

    def __init__(self, code: Any, *_: Any) -> None:
        self.code, self.order = code, "="

    def __setstate__(self, state: Any) -> None:
        self.order = state[1]

    def read(self) -> np.dtype[Any]:
        """Return the numpy type."""
        if self.code not in _TYPES or self.order not in ("<", ">", "=", "|"):
            raise ValueError(f"arrays of type {self.code!r}")
        return np.dtype(self.order + self.code)


class _Array:
    """A numpy array in a pickle: the values from which numpy would build it."""

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
    """An ordered dictionary that takes attributes, as torch's have some."""


_STAND_INS: dict[str, Callable[..., Any]] = {
    "dtype": _Type,
    "_reconstruct": lambda *_: _Array(),
    "_frombuffer": _read_buffer,
    "scalar": lambda *_: None,  # not a weight: it is not read
    "ndarray": lambda *_: None,  # an argument of _reconstruct
    "encode": _encode,
    "bytes": lambda: b"",  # protocol 2 writes empty bytes as this call
    "OrderedDict": _Table,
}
_MODULES = ("numpy", "numpy.core.multiarray", "numpy._core.multiarray", "numpy.core.numeric", "numpy._core.numeric")
_NAMES = {f"{module}.{name}": name for module in _MODULES for name in _STAND_INS}
_NAMES |= {"_codecs.encode": "encode", "__builtin__.bytes": "bytes", "collections.OrderedDict": "OrderedDict"}


class _RefusedNameError(Exception):
    """A name in a pickle that no array needs."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """Return the replacement for a name: a new function each time, so that no pickle can change another's."""
        if f"{module}.{name}" not in _NAMES:
            raise _RefusedNameError(f"{module}.{name}")
        stand_in = _STAND_INS[_NAMES[f"{module}.{name}"]]
        return lambda *arguments: stand_in(*arguments)  # noqa: PLW0108


def load_pickle(path: Path) -> dict[str, Any]:
    """Read a pickle of numpy arrays, as tensors. A file of torch with this suffix is left to `load_checkpoint`.

    Raises:
        CheckpointError: it is missing, or cannot be read.
        DamagedCheckpointError: it is damaged, or holds more than plain containers and arrays.
        StorageError: the storage fails, or memory is short.
    """
    data = read_file(path)
    if data.startswith(b"PK\x03\x04"):
        return load_checkpoint(path)
    try:
        content = _Unpickler(io.BytesIO(data), encoding="latin1").load()
        if isinstance(content, int):  # torch's older files begin with a number
            return load_checkpoint(path)
        content = _read_arrays(content)
    except UserError:
        raise
    except _RefusedNameError as error:
        raise DamagedCheckpointError(
            f"{path}: it holds {error}, which is not read because it may execute code; if you trust the file, read "
            "it with Python's pickle and torch.save only its arrays, as tensors"
        ) from None
    except Exception as error:  # the errors of foreign bytes have no common type
        if is_out_of_memory(error):
            raise StorageError(f"{path}: cannot be read: not enough memory") from error
        raise DamagedCheckpointError(f"{path}: not a readable pickle of arrays") from error
    if not isinstance(content, dict):
        raise DamagedCheckpointError(f"{path}: holds a {type(content).__name__}, not weights by name")
    return content


def _read_arrays(content: Any, depth: int = 2) -> Any:
    """Replace the arrays in a dictionary, and in the dictionaries in it, by tensors."""
    if isinstance(content, _Array):
        return content.read()
    if isinstance(content, dict) and depth:
        return {key: _read_arrays(value, depth - 1) for key, value in content.items()}
    return content
