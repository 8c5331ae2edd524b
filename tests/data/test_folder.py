import numpy as np
import pytest
from PIL import Image

from resnest_imagenet.data.folder import (
    label_by_classes,
    name_unreadable,
    read_image_folder,
    require_same_classes,
)
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


def test_missing_root():
    with pytest.raises(DataError, match="data.root=/nowhere: no such folder"):
        read_image_folder("/nowhere", "train", "data.train_dir")


def test_class_lists_that_differ_are_named_on_either_side(tmp_path):
    make_tree(
        tmp_path, "train/a/1.JPEG", "train/b/1.JPEG", "val/a/1.JPEG", "test/a/1.JPEG", "test/b/1.JPEG", "test/c/1.JPEG"
    )
    train, val, test = (read_image_folder(str(tmp_path), name, "x") for name in ("train", "val", "test"))
    require_same_classes(train, train)
    with pytest.raises(DataError, match="val lacks 1 of the classes of .*train: b"):
        require_same_classes(train, val)
    with pytest.raises(DataError, match="train lacks 1 of the classes of .*test: c"):
        require_same_classes(train, test)


def test_a_part_of_the_classes_keeps_the_whole_list_labels(tmp_path):
    make_tree(tmp_path, "val/b/1.JPEG", "val/d/1.JPEG")
    val = read_image_folder(str(tmp_path), "val", "data.val_dir")
    assert label_by_classes(val, ["a", "b", "c", "d"], "the classes").labels.tolist() == [1, 3]
    with pytest.raises(DataError, match="1 of its classes are not among the classes: d"):
        label_by_classes(val, ["a", "b"], "the classes")


def test_names_the_first_unreadable_file(tmp_path):
    make_tree(tmp_path, "a.JPEG", "b.JPEG")
    (tmp_path / "c.JPEG").write_bytes((tmp_path / "a.JPEG").read_bytes()[:200])
    paths = [bytes(tmp_path / name) for name in ("a.JPEG", "b.JPEG", "c.JPEG")]
    assert name_unreadable(paths[:2]) is None
    assert str(tmp_path / "c.JPEG") in name_unreadable(paths)
    Image.new("RGB", (8, 8)).save(tmp_path / "d.JPEG", format="GIF")
    Image.new("I;16", (8, 8)).save(tmp_path / "e.png")
    assert "d.JPEG: neither a JPEG nor an 8-bit PNG image (GIF" in name_unreadable([bytes(tmp_path / "d.JPEG")])
    assert "e.png: neither a JPEG nor an 8-bit PNG image (PNG" in name_unreadable([bytes(tmp_path / "e.png")])
