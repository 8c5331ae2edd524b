import numpy as np
import pytest
from PIL import Image

from resnest_imagenet.data.folder import read_image_folder
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
