"""Class folders without a folder to evaluate on: which images are kept for it."""

import hashlib

import numpy as np
import pytest
from test_split import list_contents, write_classes

from resnest_imagenet.data.parts import ClassifiedData
from resnest_imagenet.data.split import split_classes
from resnest_imagenet.errors import DataError

COUNTS = {"cat": 10, "dog": 2, "emu": 5}


def split(root, share=0.2, seed=0, **options):
    return ClassifiedData("folder", str(root), val_split=share, split_seed=seed, **options)


def read_all(images):
    return sorted(images.read(index).decode() for index in range(len(images)))


def test_each_image_is_in_one_part_and_each_class_in_both(tmp_path):
    root = write_classes(tmp_path / "own", **COUNTS)
    train, val = split(root).open_parts()
    assert sorted(read_all(train) + read_all(val)) == list_contents(root)
    assert train.classes == val.classes == ("cat", "dog", "emu")
    assert np.bincount(train.labels).tolist() == [8, 1, 4] and np.bincount(val.labels).tolist() == [2, 1, 1]
    # By the seed and the images' names alone.
    files = ["cat/deep/0.jpg", *(f"cat/{number}.jpg" for number in range(1, 10))]
    order = sorted(files, key=lambda file: hashlib.sha256(f"0/{file}".encode()).digest())
    assert {file.decode() for file in val.files[val.labels == 0]} == set(order[:2])
    assert read_all(split(root).open_part("train")) == read_all(train)
    assert read_all(split(root).open_part("val")) == read_all(val)
    assert split_classes(root, tmp_path / "out", 0.2, seed=0)  # resnest-data split
    assert list_contents(tmp_path / "out/val") == read_all(val)
    halves = [read_all(split(root, 0.5, seed).open_part("val")) for seed in (0, 1)]
    assert len(halves[0]) == len(halves[1]) == 5 + 1 + 2 and halves[0] != halves[1]


def test_new_images_move_few_of_the_others(tmp_path):
    before = set(read_all(split(write_classes(tmp_path / "a", cat=100), 0.5).open_part("val")))
    after = set(read_all(split(write_classes(tmp_path / "b", cat=102), 0.5).open_part("val")))
    assert len(before - after) <= 2


def test_the_class_folders_may_be_in_the_folder_of_training(tmp_path):
    root = write_classes(tmp_path / "own", **COUNTS)
    write_classes(tmp_path / "set/train", **COUNTS)
    assert [read_all(part) for part in split(root).open_parts()] == [
        read_all(part) for part in split(tmp_path / "set").open_parts()
    ]
    # A class may be called as a part is: it has images, where a part has class folders.
    for name in ("train", "val"):
        (root / name).mkdir()
        for number in range(2):
            (root / name / f"{number}.jpg").write_text(name)
    assert split(root).open_part("val").classes == ("cat", "dog", "emu", "train", "val")


def test_what_cannot_be_split_is_one_line(tmp_path):
    root = write_classes(tmp_path / "own", cat=2, dog=1)
    with pytest.raises(DataError, match=r"own: dog: a class with 1 image: it needs two"):
        split(root).open_parts()
    write_classes(tmp_path / "set/train", **COUNTS)
    write_classes(tmp_path / "set/val", **COUNTS)
    message = (
        r"data.val_split: .*/val is there to evaluate on: remove data.val_split, or set data.root=.*/train to split"
    )
    with pytest.raises(DataError, match=message):
        split(tmp_path / "set").open_parts()
    with pytest.raises(DataError, match=r"^data.root=.*gone: no such folder"):
        split(tmp_path / "gone").open_parts()


def test_an_evaluation_takes_the_layout_of_the_run_where_it_names_none(tmp_path):
    """The run's own split or list; never in place of a folder or a list that is named."""
    root = str(write_classes(tmp_path / "own", **COUNTS))
    run = {"kind": "folder", "root": "/old", "val_split": 0.2, "split_seed": 3, "digest": "sizes", "train_dir": "train"}
    listed = {"kind": "csv", "root": "/old", "csv": "mine.csv", "val_split": None, "split_seed": 0}
    plain = ClassifiedData("folder", root)
    assert plain.adopt(run) == split(root, seed=3)
    assert plain.adopt(listed) == ClassifiedData("csv", root, csv="mine.csv")
    assert ClassifiedData("csv", root).adopt(listed) == ClassifiedData("csv", root, csv="mine.csv")
    assert ClassifiedData("csv", root, val_dir="test").adopt(listed).val_dir == "test"
    # The run's own list, named once more: without the run's split, its training images would be evaluated too.
    for name in (None, "mine.csv"):
        splits = {**listed, "csv": name, "val_split": 0.2}
        assert ClassifiedData("csv", root, csv=name or "labels.csv").adopt(splits).val_split == 0.2
    for own in (None, {"kind": "folder", "root": "/old"}, {"kind": "webdataset", "root": "/old"}):
        assert plain.adopt(own) is plain  # of a run before there were splits, too
    (tmp_path / "own/val/cat").mkdir(parents=True)
    named = (plain, ClassifiedData("folder", root, val_dir="."), ClassifiedData("csv", root, csv="other.csv"))
    for data in (*named, split(root, 0.5), ClassifiedData("webdataset", root)):
        assert data.adopt(run) is data
    assert ClassifiedData("csv", root).adopt(run) == ClassifiedData("csv", root)
