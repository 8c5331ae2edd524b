import os
import socket

import numpy as np
import pytest
from PIL import Image

from resnest_imagenet.data.decoding import BadImage
from resnest_imagenet.data.folder import find_images, read_image_folder
from resnest_imagenet.data.reading import MAX_BYTES
from resnest_imagenet.data.source import require_separate
from resnest_imagenet.errors import DataError


def make_tree(root, *files):
    for name in files:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(path, format="JPEG")


def test_labels_are_the_positions_of_the_sorted_class_folders(tmp_path):
    make_tree(tmp_path, "train/zebra/2.JPEG", "train/zebra/1.jpg", "train/ant/b.JPEG", "train/été/x.png")
    (tmp_path / "train/ant/notes.txt").write_text("no image")
    (tmp_path / "train/list.txt").write_text("no class")
    folder = read_image_folder(str(tmp_path), "train", "data.train_dir")
    assert folder.classes == ("ant", "zebra", "été")
    assert [f.decode() for f in folder.files] == ["ant/b.JPEG", "zebra/1.jpg", "zebra/2.JPEG", "été/x.png"]
    assert folder.labels.tolist() == [0, 1, 1, 2]
    assert folder.labels.dtype == np.int64
    assert folder.path(3).decode() == str(tmp_path / "train/été/x.png")


def test_files_have_the_order_of_text(tmp_path):
    """Whether a folder holds only images, has other files, or names that are not ASCII or not text at all."""
    names = {
        "plain": (b"b.JPEG", b"B.jpg", b"a10.png", b"a9.Tif", b"a_.webp"),
        "hidden": (b"b.JPEG", b".a.jpg", b"a.jpg"),
        "other": (b"b.JPEG", b"notes.txt", b"a.jpg", b"more/x.txt"),
        "odd": (b"z.jpg", b"\xff.jpg", "\U0001f600.jpg".encode(), "\ue000.jpg".encode(), b"\x80.jpg", b"a.jpg"),
    }
    for name, files in names.items():
        (tmp_path / "train" / name).mkdir(parents=True)
        for file in files:
            path = tmp_path / "train" / name / os.fsdecode(file)
            path.parent.mkdir(exist_ok=True)
            path.touch()
    folder = read_image_folder(str(tmp_path), "train", "x")
    suffixes = (".jpeg", ".jpg", ".png", ".tif", ".webp")
    for label, name in enumerate(sorted(names)):
        listed = [os.fsdecode(file).removeprefix(f"{name}/") for file in folder.files[folder.labels == label]]
        texts = sorted(map(os.fsdecode, names[name]))
        assert listed == [text for text in texts if text.lower().endswith(suffixes) and text[0] != "."]
    assert len(folder.notes) == 2


@pytest.mark.parametrize(
    ("files", "folders", "message"),
    [
        (["train/a/1.JPEG"], [], r"val: no such folder \(in .*: train\); set data.val_dir"),
        (["train/a/1.JPEG", "val/1.JPEG"], [], "no class folders; the layout is"),
        (["train/a/1.JPEG", "val/a/1.JPEG"], ["val/b"], "val/b: a class without images"),
        (["train/a/1.JPEG"], ["val/a"], "val/a: a class without images"),
    ],
)
def test_faults_are_one_line(tmp_path, files, folders, message):
    make_tree(tmp_path, *files)
    for name in folders:
        (tmp_path / name).mkdir(parents=True)
    with pytest.raises(DataError, match=message) as caught:
        read_image_folder(str(tmp_path), "val", "data.val_dir")
    assert "\n" not in str(caught.value)


def test_what_is_skipped_or_taken_from_below_is_said(tmp_path):
    names = ("a/1.webp", "a/2.TIF", "a/3.jfif", "a/deep/0.jpg", "a/deep/er/1.bmp", "b/1.JPEG", "b/anim.gif", "b/x.heic")
    hidden = (".ipynb_checkpoints/1.jpg", "a/.1.jpg", "a/.git/1.jpg")
    make_tree(tmp_path, *(f"train/{name}" for name in (*names, *hidden, "b/notes.txt", "stray.png")))
    (tmp_path / "train/b/loop").symlink_to("..")
    (tmp_path / "train/a/pipe.jpg.part").touch()
    images = read_image_folder(str(tmp_path), "train", "x")
    assert images.classes == ("a", "b")
    assert [file.decode() for file in images.files] == [*names[:6]]
    assert [note.removeprefix(f"{tmp_path}/train: ") for note in images.notes] == [
        "3 hidden files or folders are skipped (the first: .ipynb_checkpoints)",
        "1 images beside the class folders are skipped: move them into one (the first: stray.png)",
        "2 images of other formats are skipped "
        "(.jpeg, .jpg, .png, .jpe, .jfif, .webp, .bmp, .tif, .tiff are taken) (the first: b/anim.gif)",
        "2 files without the name of an image are skipped (the first: a/pipe.jpg.part)",
        "2 images in folders below the class folders are taken (the first: a/deep/0.jpg)",
    ]
    photos = find_images([str(tmp_path / "train")])
    assert [photos.name(index).removeprefix(f"{tmp_path}/train/") for index in range(7)] == [
        *("a/1.webp", "a/2.TIF", "a/3.jfif", "a/deep/0.jpg", "a/deep/er/1.bmp", "b/1.JPEG", "stray.png")
    ]
    assert len(photos.notes) == 3


def test_parts_that_are_or_hold_each_other_are_refused(tmp_path):
    make_tree(tmp_path, "train/a/1.jpg")
    (tmp_path / "val").symlink_to("train")
    (tmp_path / "test").mkdir()
    for val, how in (
        ("train", "are the same folder"),
        ("val", "are the same folder"),
        ("train/a", "one contains the other"),
    ):
        with pytest.raises(DataError, match=f"train and .*{val} .*{how}.*: set data.train_dir and data.val_dir"):
            require_separate(tmp_path / "train", tmp_path / val)
    require_separate(tmp_path / "train", tmp_path / "test")


def test_the_listing_opens_nothing_and_reading_only_files(tmp_path):
    """A pipe would keep who opens it waiting for ever, and /dev/zero never ends."""
    make_tree(tmp_path, "train/a/1.jpg")
    os.mkfifo(tmp_path / "train/a/2.jpg")
    (tmp_path / "train/a/3.jpg").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "train/a/4.jpg"))
    (tmp_path / "train/a/5.jpg").mkdir()
    with open(tmp_path / "train/a/6.jpg", "wb") as file:
        file.truncate(MAX_BYTES + 1)
    images = read_image_folder(str(tmp_path), "train", "x")
    details = []
    for index in range(1, 6):
        with pytest.raises(BadImage) as caught:
            images.read(index)
        details.append(caught.value.fault.detail)
    kinds = ("a named pipe", "a device", "a socket", "a folder")
    too_large = "a file of 1,073,741,825 bytes (over 1,073,741,824): not read"
    assert details == [*(f"not a file but {kind}" for kind in kinds), too_large]
    assert images.read(0) == (tmp_path / "train/a/1.jpg").read_bytes()


def test_missing_root():
    with pytest.raises(DataError, match="data.root=/nowhere: no such folder"):
        read_image_folder("/nowhere", "train", "data.train_dir")
