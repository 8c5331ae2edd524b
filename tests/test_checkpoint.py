import pickle

import pytest
import torch

from resnest_imagenet.checkpoint import load_checkpoint, save_checkpoint
from resnest_imagenet.errors import CheckpointError

CONTENT = {"model": {"weight": torch.arange(1000.0)}, "step": 3}


def test_round_trip(tmp_path):
    save_checkpoint(CONTENT, tmp_path / "a.pt")
    loaded = load_checkpoint(tmp_path / "a.pt")
    assert torch.equal(loaded["model"]["weight"], CONTENT["model"]["weight"])
    assert loaded["step"] == 3
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


def test_a_failed_write_leaves_the_good_file(tmp_path):
    save_checkpoint(CONTENT, tmp_path / "a.pt")
    with pytest.raises(Exception, match="pickle"):
        save_checkpoint({"unpicklable": lambda: None}, tmp_path / "a.pt")
    assert load_checkpoint(tmp_path / "a.pt")["step"] == 3


def test_a_flipped_bit_is_noticed(tmp_path):
    path = tmp_path / "a.pt"
    save_checkpoint(CONTENT, path)
    data = bytearray(path.read_bytes())
    position = data.find(torch.tensor([500.0]).numpy().tobytes())
    data[position] ^= 1
    path.write_bytes(data)
    assert torch.load(path, weights_only=True)["step"] == 3  # torch alone does not notice
    with pytest.raises(CheckpointError, match="damaged"):
        load_checkpoint(path)


class Canary:
    def __reduce__(self):
        return print, ("executed",)


@pytest.mark.parametrize(
    "content", [b"", b"<html>not found</html>", pickle.dumps(Canary()), b"PK\x03\x04 cut off", b"hello"]
)
def test_what_is_no_checkpoint_is_refused_unexecuted(content, tmp_path, capsys):
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"a.pt: not a readable checkpoint") as caught:
        load_checkpoint(tmp_path / "a.pt")
    assert "\n" not in str(caught.value)
    assert capsys.readouterr().out == ""


def test_code_inside_a_zip_checkpoint_is_not_executed(tmp_path, capsys):
    torch.save({"model": Canary()}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="not a readable checkpoint"):
        load_checkpoint(tmp_path / "a.pt")
    assert capsys.readouterr().out == ""


def test_a_truncated_file_and_a_missing_one(tmp_path):
    save_checkpoint(CONTENT, tmp_path / "a.pt")
    data = (tmp_path / "a.pt").read_bytes()
    (tmp_path / "a.pt").write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match="not a readable checkpoint"):
        load_checkpoint(tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        load_checkpoint(tmp_path / "b.pt")
