"""Pickles of numpy arrays: read by a reader of our own, which runs nothing, whoever wrote them."""

import collections
import os
import pickle
import struct

import numpy as np
import pytest
import torch

from resnest_imagenet.checkpoint import save_checkpoint
from resnest_imagenet.errors import CheckpointError, DamagedCheckpointError
from resnest_imagenet.weights import pickles
from resnest_imagenet.weights.load import read_weights
from resnest_imagenet.weights.pickles import load_pickle

ARRAYS = {
    "weight": np.arange(24, dtype=np.float32).reshape(2, 3, 4),
    "fortran": np.asfortranarray(np.arange(6, dtype=np.float64).reshape(2, 3)),
    "big endian": np.arange(5, dtype=">f4"),
    "half": np.ones((1, 2), np.float16),
    "count": np.array(3, dtype=np.int64),
    "empty": np.zeros((0, 4), np.float32),
    "flags": np.array([True, False]),
}


def write(path, content, protocol=4):
    path.write_bytes(content if isinstance(content, bytes) else pickle.dumps(content, protocol))
    return path


@pytest.mark.parametrize("protocol", range(2, 6))
def test_arrays_of_every_protocol(protocol, tmp_path):
    """Numpy wrote the file; the numbers are numpy's."""
    content = {"model": collections.OrderedDict(ARRAYS), "__author__": "detectron2", "scale": np.float32(2)}
    content = load_pickle(write(tmp_path / "a.pkl", content, protocol))
    assert content["__author__"] == "detectron2" and content["scale"] is None
    assert list(content["model"]) == list(ARRAYS)
    for key, value in ARRAYS.items():
        tensor = content["model"][key]
        assert tensor.shape == value.shape and tensor.numpy().tolist() == value.tolist()
        assert tensor.numpy().dtype == value.dtype.newbyteorder("=") and tensor.is_contiguous()


def test_what_python_2_wrote(tmp_path):
    """Its bytes are text here: written by hand, opcode by opcode."""
    data = struct.pack("<2f", 1.5, -2.25)
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntU\x01btR"
        b"(I1\n(I2\ntcnumpy\ndtype\n(U\x02f4I0\nI1\ntR(I3\nU\x01<NNNI-1\nI-1\nI0\ntb"
        b"I00\nU\x08" + data + b"tb"
    )
    content = load_pickle(write(tmp_path / "a.pkl", b"\x80\x02}U\x06conv_w" + array + b"s."))
    assert content["conv_w"].tolist() == [1.5, -2.25]


class Runs:
    """Does something when it is read."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (Runs(os.mkdir, "made"), "posix.mkdir"),
        (Runs(eval, "1"), "builtins.eval"),
        (Runs(np.load, "a.npy"), "numpy.load"),
        (Runs(np.frombuffer, b"1234"), "numpy.frombuffer"),
        (Runs(getattr, {}, "clear"), "builtins.getattr"),
        (collections.Counter("a"), "collections.Counter"),
        (torch.zeros(1), "torch._utils._rebuild_tensor_v2"),
    ],
)
def test_nothing_else_is_called(value, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path / "a.pkl", {"model": {**ARRAYS, "x": value}})
    with pytest.raises(
        DamagedCheckpointError, match="^.*a.pkl: it holds [^\n]*, which is not read because it may ex"
    ) as e:
        read_weights(path)
    assert name in str(e.value) or "numpy" in name
    assert list(tmp_path.iterdir()) == [path]


def test_no_pickle_changes_the_next_ones_reader(tmp_path):
    """BUILD sets attributes of what a name stands for: it must be nothing that is kept."""
    data = b"\x80\x04cnumpy\ndtype\n(N}X\x04\x00\x00\x00codeX\x01\x00\x00\x00xstb."
    before = {name: dict(vars(value)) for name, value in vars(pickles).items() if isinstance(value, type)}
    with pytest.raises(DamagedCheckpointError):
        load_pickle(write(tmp_path / "a.pkl", data))
    after = {name: dict(vars(value)) for name, value in vars(pickles).items() if isinstance(value, type)}
    assert before == after
    assert load_pickle(write(tmp_path / "b.pkl", ARRAYS))["half"].tolist() == [[1, 1]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a readable pickle of arrays"),
        (b"not a pickle", "not a readable pickle of arrays"),
        (pickle.dumps(ARRAYS)[:-40], "not a readable pickle of arrays"),
        (pickle.dumps([1]), "holds a list, not weights by name"),
        ({"a": np.array([{}])}, "not a readable pickle of arrays"),
        ({"a": np.array(["text"])}, "not a readable pickle of arrays"),
    ],
)
def test_what_cannot_be_read_is_one_line(content, message, tmp_path):
    path = write(tmp_path / "a.pkl", content)
    with pytest.raises(DamagedCheckpointError, match=f"a.pkl: {message}$"):
        read_weights(path)


def test_an_array_that_lies_about_its_size(tmp_path):
    content = pickle.dumps({"a": np.array([1.0, 2.0], np.float32)}, 4)
    assert content.count(b"K\x02\x85") == 1  # its shape, (2,)
    path = write(tmp_path / "a.pkl", content.replace(b"K\x02\x85", b"K\x09\x85"))
    with pytest.raises(DamagedCheckpointError, match="not a readable pickle"):
        load_pickle(path)


def test_numbers_are_finite(tmp_path):
    path = write(tmp_path / "a.pkl", {"a": np.array([np.nan], np.float32)})
    with pytest.raises(CheckpointError, match="a has values that are not finite"):
        read_weights(path)


@pytest.mark.parametrize("old", [False, True])
def test_torchs_own_files_under_this_suffix(old, tmp_path):
    path = tmp_path / "a.pkl"
    state = {"a": torch.arange(3.0)}
    if old:
        torch.save(state, path, _use_new_zipfile_serialization=False)
    else:
        save_checkpoint(state, path)
    assert torch.equal(load_pickle(path)["a"], state["a"])
    with pytest.raises(CheckpointError, match="b.pkl: no such checkpoint"):
        load_pickle(tmp_path / "b.pkl")
