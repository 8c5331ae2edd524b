import pickle
import random
import zipfile

import pytest
import torch

from resnest_imagenet import checkpoint
from resnest_imagenet.checkpoint import load_checkpoint, save_checkpoint
from resnest_imagenet.errors import CheckpointError, DamagedCheckpointError, StorageError

CONTENT = {"model": {"weight": torch.arange(1000.0)}, "step": 3}
TENSORS = {"a": torch.arange(3000.0), "b": torch.arange(5.0)}


def test_round_trip(tmp_path):
    save_checkpoint(CONTENT, tmp_path / "a.pt")
    loaded = load_checkpoint(tmp_path / "a.pt")
    assert torch.equal(loaded["model"]["weight"], CONTENT["model"]["weight"])
    assert loaded["step"] == 3
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


def test_a_failed_write_leaves_the_good_file(tmp_path):
    save_checkpoint(CONTENT, tmp_path / "a.pt")
    with pytest.raises(Exception, match="pickle|local object"):  # the second in Python 3.13
        save_checkpoint({"unpicklable": lambda: None}, tmp_path / "a.pt")
    assert load_checkpoint(tmp_path / "a.pt")["step"] == 3


def damage(good: bytes, seed: int):
    """Yield contents that differ from a good one: in a bit, a byte, a page or the end; its last bytes one by one."""
    rng, size = random.Random(seed), len(good)
    for position in [*rng.choices(range(size), k=60), *range(size - 100, size)]:
        flipped = bytearray(good)
        flipped[position] ^= 1 << rng.randrange(8)
        yield bytes(flipped)
        yield good[:position]
        yield good[:position] + good[position + 1 :]
    for page in range(0, size, 4096):
        yield good[:page] + good[page + 4096 :]
        if any(good[page : page + 4096]):
            yield good[:page] + bytes(len(good[page : page + 4096])) + good[page + 4096 :]


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
def test_all_damage_is_noticed(name, tmp_path):
    path = tmp_path / name
    save_checkpoint(TENSORS, path)
    for content in damage(path.read_bytes(), seed=0):
        path.write_bytes(content)
        with pytest.raises(DamagedCheckpointError):
            load_checkpoint(path)


def test_other_programs_read_what_has_a_digest(tmp_path):
    save_checkpoint(CONTENT, tmp_path / "a.pt")
    for options in ({}, {"mmap": True}):
        assert torch.load(tmp_path / "a.pt", weights_only=True, **options)["step"] == 3
    with zipfile.ZipFile(tmp_path / "a.pt") as archive:
        assert archive.testzip() is None


def test_without_a_digest_the_checksums_are_checked(tmp_path, capsys):
    """As earlier versions wrote it."""
    path = tmp_path / "a.pt"
    torch.save({**CONTENT, "identity": {}}, path)
    assert load_checkpoint(path)["step"] == 3
    assert capsys.readouterr().err == f"{path}: has no digest, only its checksums were checked\n"
    good = path.read_bytes()
    flipped, folder = bytearray(good), bytearray(good)
    flipped[good.find(torch.tensor([500.0]).numpy().tobytes())] ^= 1
    # The entry of the tensor in the directory, whose external attributes stand 8 bytes before its name: a folder.
    folder[good.rfind(b"a/data/0") - 8] ^= 0x10
    for damaged in (flipped, folder):
        path.write_bytes(damaged)
        assert torch.load(path, weights_only=True)["step"] == 3  # torch alone does not notice
        with pytest.raises(DamagedCheckpointError, match="fails its checksum"):
            load_checkpoint(path)
    path.write_bytes(good[: len(good) // 2])
    with pytest.raises(DamagedCheckpointError, match="its end is missing"):
        load_checkpoint(path)


def test_a_storage_that_fails_is_no_damage(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "SECONDS_BETWEEN_READS", (0, 0))
    (tmp_path / "a.pt").symlink_to("/proc/self/mem")  # a file whose first byte is EIO
    with pytest.raises(StorageError, match=r"a.pt: cannot be read \(Input/output error\)"):
        load_checkpoint(tmp_path / "a.pt")


@pytest.mark.parametrize("allocate", [lambda: torch.empty(2**60, dtype=torch.uint8), lambda: bytes(2**62)])
def test_short_memory_is_no_damage(allocate, tmp_path, monkeypatch):
    """The fault test does it to a run."""
    save_checkpoint(CONTENT, tmp_path / "a.pt")
    monkeypatch.setattr(torch, "load", lambda *_, **__: allocate())
    with pytest.raises(StorageError, match=r"a.pt: cannot be read: not enough memory"):
        load_checkpoint(tmp_path / "a.pt")


def test_no_more_is_allocated_than_the_file_has(tmp_path):
    """A compressed archive of zeros would be a thousand times its size."""
    torch.save({"weight": torch.zeros(10**6)}, tmp_path / "a.pt")
    with (
        zipfile.ZipFile(tmp_path / "a.pt") as archive,
        zipfile.ZipFile(tmp_path / "b.pt", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for member in archive.infolist():
            bomb.writestr(member.filename, archive.read(member))
    assert len(torch.load(tmp_path / "b.pt", weights_only=True)["weight"]) == 10**6
    with pytest.raises(CheckpointError, match="claims to hold more than its bytes"):
        load_checkpoint(tmp_path / "b.pt")


class Canary:
    def __reduce__(self):
        return print, ("executed",)


@pytest.mark.parametrize(
    "content", [b"", b"<html>not found</html>", pickle.dumps(Canary()), b"PK\x03\x04 cut off", b"hello"]
)
def test_what_is_no_checkpoint_is_refused_unexecuted(content, tmp_path, capsys):
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"a.pt: (not a readable checkpoint|damaged)") as caught:
        load_checkpoint(tmp_path / "a.pt")
    assert "\n" not in str(caught.value)
    assert capsys.readouterr().out == ""


def test_code_inside_a_zip_checkpoint_is_not_executed(tmp_path, capsys):
    torch.save({"model": Canary()}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="not a readable checkpoint .*: it holds print, which is not read"):
        load_checkpoint(tmp_path / "a.pt")
    assert capsys.readouterr().out == ""


def test_a_missing_file(tmp_path):
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        load_checkpoint(tmp_path / "b.pt")


def test_the_same_tensors_are_the_same_safetensors_file(tmp_path):
    files = []
    for number in range(8):  # safetensors writes its metadata in any order
        save_checkpoint({"weight": torch.arange(3.0)}, tmp_path / f"{number}.safetensors")
        files.append((tmp_path / f"{number}.safetensors").read_bytes())
    assert len(set(files)) == 1
