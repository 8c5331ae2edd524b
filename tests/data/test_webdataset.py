"""Shards against the folder they were made from, others' shards, and damaged ones."""

import io
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_folder import make_tree

from conftest import CPU
from resnest_imagenet.data import shards as writer
from resnest_imagenet.data import webdataset
from resnest_imagenet.data.folder import read_image_folder
from resnest_imagenet.data.loader import build_loader, open_source
from resnest_imagenet.data.plan import BatchPlan, plan_evaluation
from resnest_imagenet.data.shards import name_members, write_shards
from resnest_imagenet.data.source import read_named, require_same_classes
from resnest_imagenet.data.transforms import EvalTransform, TrainTransform
from resnest_imagenet.data.webdataset import read_shards
from resnest_imagenet.errors import DataError, LoadingError

pytestmark = pytest.mark.process  # files are read and examined in processes

LOADERS = ["dali", "torchvision"]
PARTS = {"data.train_dir": "train", "data.val_dir": "val"}


@pytest.fixture(scope="module")
def shards(demo_images, tmp_path_factory):
    """The demo's 103 training and 40 val images, 20 in a shard."""
    out = tmp_path_factory.mktemp("shards")
    write_shards(str(demo_images), PARTS, out, 20, shuffle=False)
    return out


@pytest.fixture(params=["index", "headers"])
def listed(request, shards, tmp_path):
    """The training part: listed from the index that is written with it, and from the headers."""
    if request.param == "index":
        return read_shards(str(shards), "train", "x")
    copy_shards(shards / "train", tmp_path / "train")
    (tmp_path / "train/index.npz").unlink()
    return read_shards(str(tmp_path), "train", "x")


def copy_shards(source, target):
    """Copy a part, by hard links: what is changed must be replaced, not written to."""
    target.mkdir()
    for path in source.iterdir():
        os.link(path, target / path.name)


def test_shards_hold_what_the_folder_does(listed, demo_images):
    folder = read_image_folder(str(demo_images), "train", "x")
    assert len(listed.shards) == 6
    assert listed.classes == folder.classes
    assert listed.labels.tolist() == folder.labels.tolist()
    assert [listed.read(i) for i in range(103)] == [folder.read(i) for i in range(103)]
    assert listed.name(21) == f"{listed.root}/train-000001.tar: {folder.files[21].decode().lower()}"
    for source in (listed, folder):
        assert read_named(source.name(21)) == folder.read(21)
    with pytest.raises(FileNotFoundError):
        read_named(listed.name(21) + "x")


def test_any_reader_of_tar_files_finds_key_image_and_label(shards, demo_images):
    with tarfile.open(shards / "val/val-000001.tar") as tar:
        members = [(m.name, m.mtime, m.uid, m.gid, tar.extractfile(m).read()) for m in tar]
    folder = read_image_folder(str(demo_images), "val", "x")
    expected = []
    for index in range(20, 40):
        key = folder.files[index].decode().removesuffix(".JPEG")
        label = str(folder.labels[index]).encode()
        expected += [(f"{key}.jpeg", 0, 0, 0, folder.read(index)), (f"{key}.cls", 0, 0, 0, label)]
    assert members == expected


def test_the_same_folder_makes_the_same_files(shards, demo_images, tmp_path, capsys):
    write_shards(str(demo_images), PARTS, tmp_path / "again", 20, shuffle=False)
    assert capsys.readouterr() == ("", "")  # no bar where there is no terminal
    files = sorted(path.relative_to(shards) for path in shards.rglob("*"))
    assert files == sorted(path.relative_to(tmp_path / "again") for path in (tmp_path / "again").rglob("*"))
    for file in files:
        if (shards / file).is_file():
            assert (shards / file).read_bytes() == (tmp_path / "again" / file).read_bytes()


def test_keys_are_unique_and_end_at_the_first_dot():
    assert name_members(["a.b/x.y.JPEG", "a.b/x%2Ey.PNG", "b/1.jpg", "b/2.jpg", "c/1.jpg", "c/1.png"]) == [
        ("a.b/x%2Ey", "jpeg"),
        ("a.b/x%252Ey", "png"),
        ("b/1", "jpg"),
        ("b/2", "jpg"),
        ("c/1%2Ejpg", "jpg"),
        ("c/1%2Epng", "png"),
    ]


def test_names_of_all_kinds_survive(tmp_path):
    names = ["a.b/x.y.JPEG", "a.b/x.png", "a.b/x.jpg", f"été/{'long' * 40}.jpg", os.fsdecode(b"\xff/\xfe.jpg")]
    make_tree(tmp_path / "in", *(f"train/{name}" for name in names))
    write_shards(str(tmp_path / "in"), {"data.train_dir": "train"}, tmp_path / "out", 2, shuffle=False)
    folder = open_source("folder", str(tmp_path / "in"), "train", "x")
    images = open_source("webdataset", str(tmp_path / "out"), "train", "x")
    assert images.classes == folder.classes
    assert images.labels.tolist() == folder.labels.tolist() == [0, 0, 0, 1, 2]
    assert len({images.name(index) for index in range(5)}) == 5


@pytest.mark.parametrize("name", LOADERS)
@pytest.mark.parametrize("transform", [TrainTransform(40, seed=3), EvalTransform(40)])
@pytest.mark.slow
def test_loaders_deliver_the_same_from_shards_and_folder(name, transform, shards, demo_images):
    """The same pixels and labels, whatever the number of ranks and workers."""
    folder = read_image_folder(str(demo_images), "train", "x")
    images = read_shards(str(shards), "train", "x")
    shuffle = isinstance(transform, TrainTransform)

    def load(source, rank=0, world_size=1, workers=1):
        plan = BatchPlan(103, 8, 13, rank, world_size, shuffle, seed=2)
        return list(build_loader(name, source, plan, transform, CPU, workers).batches(epoch=1))

    expected = load(folder)
    for world_size, workers in ((1, 0), (1, 2), (2, 1), (3, 2)):
        shares = [load(images, rank, world_size, workers) for rank in range(world_size)]
        batches = [shares[n % world_size][n // world_size] for n in range(13)]
        for (pixels, labels), (expected_pixels, expected_labels) in zip(batches, expected, strict=True):
            assert torch.equal(pixels, expected_pixels) and torch.equal(labels, expected_labels)


@pytest.mark.parametrize("name", LOADERS)
@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.slow
def test_an_evaluation_sees_each_image_once(name, world_size, shards):
    images = read_shards(str(shards), "train", "x")
    labels = []
    for rank in range(world_size):
        plan = plan_evaluation(len(images), 16, rank, world_size)
        labels += [batch for _, batch in build_loader(name, images, plan, EvalTransform(32), CPU, 1).batches(0)]
    assert sorted(torch.cat(labels).tolist()) == sorted(images.labels.tolist())


@pytest.mark.parametrize("name", LOADERS)
@pytest.mark.slow
def test_a_shard_that_is_cut_or_gone_meanwhile_is_named(name, shards, tmp_path):
    copy_shards(shards / "train", tmp_path / "train")
    images = read_shards(str(tmp_path), "train", "x")
    loader = build_loader(name, images, plan_evaluation(103, 8, 0, 1), EvalTransform(32), CPU, 1)
    path = tmp_path / "train/train-000002.tar"
    content = path.read_bytes()
    path.unlink()
    with pytest.raises(LoadingError, match=r"train-000002.tar: .*/.*.jpeg: cannot be read \(No such file"):
        list(loader.batches(0))
    path.write_bytes(content[:-30_000])
    with pytest.raises(LoadingError, match=r"train-000002.tar: .*/.*.jpeg: cannot be read \(the shard has"):
        list(loader.batches(0))


@pytest.mark.slow
def test_a_damaged_image_is_named(tmp_path):
    write_tar(tmp_path / "val/0.tar", {"a.jpg": jpeg(), "a.cls": b"0", "b.jpg": b"<html>", "b.cls": b"1"})
    images = read_shards(str(tmp_path), "val", "x")
    loader = build_loader("dali", images, plan_evaluation(2, 2, 0, 1), EvalTransform(32), CPU, 1)
    with pytest.raises(DataError, match="0.tar: b.jpg: not a readable image"):
        list(loader.batches(0))


def test_few_files_are_open_and_none_when_the_source_is_gone(shards, tmp_path, monkeypatch):
    copy_shards(shards / "train", tmp_path / "train")

    def open_shards():
        links = (Path("/proc/self/fd") / fd for fd in os.listdir("/proc/self/fd"))
        return sum(os.path.realpath(link).startswith(f"{tmp_path}/") for link in links)

    monkeypatch.setattr(webdataset, "OPEN_SHARDS", 2)
    images = read_shards(str(tmp_path), "train", "x")
    whole = [images.read(index) for index in range(103)]
    assert open_shards() == 2
    copy = pickle.loads(pickle.dumps(images))
    assert open_shards() == 2
    assert [copy.read(index) for index in range(103)] == whole
    assert open_shards() == 4
    del copy, images
    assert open_shards() == 0


def jpeg():
    file = io.BytesIO()
    Image.new("RGB", (40, 40)).save(file, "JPEG")
    return file.getvalue()


def write_tar(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items() if isinstance(members, dict) else members:
            header = tarfile.TarInfo(name)
            header.size = len(content)
            tar.addfile(header, io.BytesIO(content))


def test_others_shards_with_and_without_names(tmp_path):
    """Order within a key, further members, upper case and line ends as they come."""
    write_tar(tmp_path / "val/b.tar", {"./x/3.cls": b"1\n", "./x/3.JPG": jpeg(), "./x/3.json": b"{}", "notes": b""})
    write_tar(
        tmp_path / "val/a.tar", {"1.webp": b"image", "1.cls": b"2", "._1.cls": b"?", "2.cls": b" 0 ", "2.png": b""}
    )
    images = read_shards(str(tmp_path), "val", "x")
    assert [file.decode() for file in images.files] == ["a.tar/1.webp", "a.tar/2.png", "b.tar/./x/3.JPG"]
    assert images.labels.tolist() == [2, 0, 1]
    assert images.classes == ("0", "1", "2")
    assert [images.read(index) for index in range(3)] == [b"image", b"", jpeg()]
    (tmp_path / "classes.txt").write_text("zebra\nant\nowl\nfox\n")
    assert read_shards(str(tmp_path), "val", "x").classes == ("zebra", "ant", "owl", "fox")
    (tmp_path / "val/classes.txt").write_text("owl\nzebra\nant\nfox")
    reordered = read_shards(str(tmp_path), "val", "x")
    assert reordered.classes == ("owl", "zebra", "ant", "fox")
    (tmp_path / "val").rename(tmp_path / "train")
    write_tar(tmp_path / "val/a.tar", {"1.jpg": b"", "1.cls": b"0"})
    with pytest.raises(DataError, match="val and .*train have the same classes, but in another order"):
        require_same_classes(read_shards(str(tmp_path), "train", "x"), read_shards(str(tmp_path), "val", "x"))


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"a.jpg": b""}, r"0.tar: a has no label \(.cls\)"),
        ({"a.cls": b"0"}, r"0.tar: a has no image \(jpeg, jpg, png, "),
        ({"k/a.jpg": b"", "k/a.png": b"", "k/a.cls": b"0"}, "0.tar: k/a has two images"),
        ([("a.jpg", b""), ("a.cls", b"0"), ("a.cls", b"0")], "0.tar: a has two labels"),
        ({"a.jpg": b"", "a.cls": b"n01440764"}, r"0.tar: a.cls: b'n01440764' is not a label \(digits"),
        ({"a.jpg": b"", "a.cls": b"-1"}, "is not a label"),
        ({"a.jpg": b"", "a.cls": b""}, "b'' is not a label"),
        ({"a.jpg": b"", "a.cls": b"1"}, "labels up to 1, but no label 0: name all classes in .*/val/classes.txt"),
        ({"a.txt": b""}, r"val: shards without images \(jpeg, jpg"),
        ({}, "shards without images"),
    ],
)
def test_faults_of_shards_are_one_line(members, message, tmp_path):
    write_tar(tmp_path / "val/0.tar", members)
    assert_fails(tmp_path, message)


def assert_fails(root, message):
    with pytest.raises(DataError, match=message) as caught:
        read_shards(str(root), "val", "data.val_dir")
    assert "\n" not in str(caught.value)


def test_masks_and_the_like_are_no_images(tmp_path):
    members = {"a.tif": b"", "b.bmp": b"", "b.jpg": b"b", "b.tiff": b"", "b.cls": b"0", "c.tif": b"c", "c.cls": b"0"}
    write_tar(tmp_path / "val/0.tar", members)
    images = read_shards(str(tmp_path), "val", "data.val_dir")
    assert [images.read(index) for index in range(len(images))] == [b"b", b"c"]


def test_class_names_as_windows_writes_them(tmp_path):
    write_tar(tmp_path / "val/0.tar", {"a.jpg": b"", "a.cls": b"1"})
    names = tmp_path / "val/classes.txt"
    for content in (b"\xef\xbb\xbfant\r\nz\xc3\xa9bu\r\n", b"ant\r\nz\xc3\xa9bu", b"\xef\xbb\xbfant\nz\xc3\xa9bu\n"):
        names.write_bytes(content)
        assert read_shards(str(tmp_path), "val", "x").classes == ("ant", "zébu")
    names.write_text("ant\nzébu\n", encoding="utf-16")
    assert_fails(tmp_path, r"val/classes.txt: not text in UTF-8 \(in UTF-16\?\); write one class per line")


def test_members_whose_keys_hold_a_dot_are_refused_unless_they_are_extras(tmp_path):
    write_tar(
        tmp_path / "val/0.tar", {"a.jpg": b"", "a.cls": b"0", "a.seg.png": b"", "a.fine.cls": b"7", ".b.c.jpg": b""}
    )
    assert len(read_shards(str(tmp_path), "val", "x")) == 1
    for name in ("b.c.cls", "k/b.c.jpg"):
        write_tar(tmp_path / "val/0.tar", {"a.jpg": b"", "a.cls": b"0", name: b"0"})
        assert_fails(tmp_path, rf"0.tar: {name}: a key ends at the first dot, and (k/)?b has no image: rename it")


def test_hidden_shards_are_skipped_and_pipes_refused(tmp_path):
    write_tar(tmp_path / "val/0.tar", {"a.jpg": b"", "a.cls": b"0"})
    (tmp_path / "val/._0.tar").write_bytes(b"of a Mac")
    assert len(read_shards(str(tmp_path), "val", "x")) == 1
    os.mkfifo(tmp_path / "val/1.tar")
    assert_fails(tmp_path, "val/1.tar: not a file, or a broken link$")


def test_faults_of_a_part_are_one_line(tmp_path):
    assert_fails(tmp_path, r"val: no such folder \(in .*: no folders\); set data.val_dir")
    (tmp_path / "val").mkdir()
    assert_fails(tmp_path, r"val: no shards \(\*.tar\)")
    write_tar(tmp_path / "val/0.tar", {"a.jpg": b"", "a.cls": b"3"})
    for names, message in (
        ("x\n", "0.tar: a.jpg: label 3, but .*names 1 classes"),
        ("x\n\ny", "empty line"),
    ):
        (tmp_path / "val/classes.txt").write_text(names)
        assert_fails(tmp_path, message)
    (tmp_path / "val/1.tar").mkdir()
    assert_fails(tmp_path, r"1.tar: not a file, or a broken link$")


@pytest.mark.parametrize("length", [0, 100, 512, 700, 1024, 1500, 2048, 2560, 3000])
def test_a_truncated_shard_is_never_taken_for_a_short_one(length, tmp_path):
    """Members take 1024 bytes each here: the cuts are in headers, images and labels, and between them."""
    write_tar(tmp_path / "val/0.tar", {"a.jpg": bytes(500), "a.cls": b"0", "b.jpg": bytes(500), "b.cls": b"0"})
    assert len(read_shards(str(tmp_path), "val", "x")) == 2
    os.truncate(tmp_path / "val/0.tar", length)
    assert_fails(tmp_path, "0.tar: a truncated or damaged tar file after (its beginning|[ab].(jpg|cls)) ")


def test_a_damaged_header_is_not_the_end(tmp_path):
    write_tar(tmp_path / "val/0.tar", {"a.jpg": bytes(500), "a.cls": b"0", "b.jpg": bytes(500), "b.cls": b"0"})
    content = bytearray((tmp_path / "val/0.tar").read_bytes())
    content[2048] ^= 1
    (tmp_path / "val/0.tar").write_bytes(content)
    assert_fails(tmp_path, "0.tar: a truncated or damaged tar file after a.cls")


def test_an_index_of_other_shards_is_refused(shards, tmp_path):
    copy_shards(shards / "val", tmp_path / "val")
    (tmp_path / "val/val-000001.tar").rename(tmp_path / "val/val-000002.tar")
    assert_fails(tmp_path, r"index.npz: does not match val-000001.tar \(missing, new .*\); remove it \(the shards")
    (tmp_path / "val/val-000002.tar").rename(tmp_path / "val/val-000001.tar")
    content = (tmp_path / "val/val-000000.tar").read_bytes()
    (tmp_path / "val/val-000000.tar").unlink()
    (tmp_path / "val/val-000000.tar").write_bytes(content[:-1])
    assert_fails(tmp_path, "index.npz: does not match val-000000.tar")
    whole = (tmp_path / "val/index.npz").read_bytes()
    arrays = io.BytesIO()
    np.savez(arrays, shards=np.array([object()], dtype=object))
    for damaged in (b"", b"text", whole[:1000], arrays.getvalue()):
        (tmp_path / "val/index.npz").unlink()
        (tmp_path / "val/index.npz").write_bytes(damaged)
        assert_fails(tmp_path, "index.npz: not an index of shards; remove it")


def test_writing_leaves_nothing_half_done(demo_images, tmp_path, monkeypatch):
    out = tmp_path / "out"
    real = writer._write_part

    def fail_at_second(images, folder, *rest):
        if folder.name == "val":
            raise OSError(28, "No space left on device")
        real(images, folder, *rest)

    monkeypatch.setattr(writer, "_write_part", fail_at_second)
    with pytest.raises(DataError, match=r"out=.*/out: cannot be written \(No space left on device\)"):
        write_shards(str(demo_images), PARTS, out, 50, shuffle=False)
    assert [path.name for path in out.iterdir()] == [".unfinished"]
    monkeypatch.undo()
    write_shards(str(demo_images), PARTS, out, 50, shuffle=False)
    assert sorted(path.name for path in out.iterdir()) == ["train", "val"]
    with pytest.raises(DataError, match="out=.*: is not empty; remove it or choose another folder"):
        write_shards(str(demo_images), PARTS, out, 50, shuffle=False)


@pytest.mark.parametrize("moves", [0, 1, 2])
def test_a_writer_that_is_killed_while_it_moves_the_parts_is_no_obstacle(moves, demo_images, tmp_path, monkeypatch):
    real = Path.rename
    moved = []

    def rename(path, target):
        if path.parent.name == ".moving":
            if len(moved) == moves:
                raise KeyboardInterrupt
            moved.append(path)
        return real(path, target)

    def rmdir(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "rename", rename)
    monkeypatch.setattr(Path, "rmdir", rmdir)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        write_shards(str(demo_images), PARTS, out, 50, shuffle=False)
    monkeypatch.undo()
    if moves == 2:  # all were moved
        with pytest.raises(DataError, match="is not empty"):
            write_shards(str(demo_images), PARTS, out, 50, shuffle=False)
    else:
        write_shards(str(demo_images), PARTS, out, 50, shuffle=False)
    assert sorted(path.name for path in out.iterdir()) == ["train", "val"]
    assert len(read_shards(str(out), "train", "x")) == 103


def test_what_cannot_become_shards_is_refused(tmp_path):
    make_tree(tmp_path, "train/a/1.jpg", "train/b/1.jpg", "val/a/1.jpg")
    with pytest.raises(DataError, match="val lacks 1 of the classes of .*train: b"):
        write_shards(str(tmp_path), PARTS, tmp_path / "out", 50, shuffle=False)
    (tmp_path / "train/a/1.jpg").unlink()
    (tmp_path / "train/a/1.jpg").mkdir()
    with pytest.raises(DataError, match=r"train/a/1.jpg: not a file but a folder$"):
        write_shards(str(tmp_path), {"data.train_dir": "train"}, tmp_path / "out", 50, shuffle=False)


def test_shuffled_shards_hold_the_same_images_mixed(demo_images, tmp_path):
    write_shards(str(demo_images), PARTS, tmp_path / "out", 20, shuffle=True)
    folder = open_source("folder", str(demo_images), "train", "x")
    images = open_source("webdataset", str(tmp_path / "out"), "train", "x")
    pairs = [(images.read(i), label) for i, label in enumerate(images.labels.tolist())]
    assert pairs != [(folder.read(i), label) for i, label in enumerate(folder.labels.tolist())]
    assert sorted(pairs) == sorted((folder.read(i), label) for i, label in enumerate(folder.labels.tolist()))
    for shard in range(5):
        assert len(set(images.labels[images.shard == shard])) >= 6
