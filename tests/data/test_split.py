"""resnest-data split: class folders become train and val."""

import hashlib
import os

import numpy as np
import pytest

from resnest_imagenet.data.folder import read_image_folder
from resnest_imagenet.data.split import split_classes
from resnest_imagenet.errors import DataError


def write_classes(root, **counts):
    for name, count in counts.items():
        (root / name / "deep").mkdir(parents=True)
        for number in range(count):
            place = root / name / "deep" if number == 0 else root / name
            (place / f"{number}.jpg").write_text(f"{name} {number}")
    return root


def list_contents(folder):
    return sorted(path.read_text() for path in folder.rglob("*.jpg"))


def test_every_image_is_in_one_part_and_every_class_in_both(tmp_path):
    root, out = write_classes(tmp_path / "own", cat=10, dog=2, emu=5), tmp_path / "split"
    before = list_contents(root)
    assert split_classes(root, out, 0.2, seed=0)
    train, val = (read_image_folder(str(out), part, "") for part in ("train", "val"))
    assert sorted(list_contents(out / "train") + list_contents(out / "val")) == before == list_contents(root)
    assert train.classes == val.classes == ("cat", "dog", "emu")
    assert np.bincount(train.labels).tolist() == [8, 1, 4] and np.bincount(val.labels).tolist() == [2, 1, 1]
    file = next((out / "val").rglob("*.jpg"))
    assert os.stat(file).st_nlink == 2  # a second name: no space is taken
    # By the images' names alone, as the docstring says.
    order = sorted(
        range(10), key=lambda n: hashlib.sha256(b"0/cat/deep/0.jpg" if n == 0 else b"0/cat/%d.jpg" % n).digest()
    )
    assert sorted(path.stem for path in (out / "val/cat").rglob("*.jpg")) == sorted(map(str, order[:2]))


def test_the_same_split_is_there_already_and_another_seed_differs(tmp_path):
    root = write_classes(tmp_path / "own", cat=20, dog=20)
    assert split_classes(root, tmp_path / "a", 0.5, seed=0) and not split_classes(root, tmp_path / "a", 0.5, seed=0)
    assert split_classes(root, tmp_path / "b", 0.5, seed=1)
    assert list_contents(tmp_path / "a/val") != list_contents(tmp_path / "b/val")
    with pytest.raises(DataError, match="is not empty; remove it or choose another folder"):
        split_classes(root, tmp_path / "a", 0.5, seed=1)


def test_images_are_copied_to_another_disk(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    root = write_classes(tmp_path / "own", cat=2, dog=2)
    split_classes(root, tmp_path / "split", 0.2, seed=0)
    assert list_contents(tmp_path / "split") == list_contents(root)
    assert os.stat(next((tmp_path / "split").rglob("*.jpg"))).st_nlink == 1


def test_what_cannot_be_split_is_one_line(tmp_path):
    root = write_classes(tmp_path / "own", cat=2, dog=1)
    for out, line in (
        (tmp_path / "split", "dog: a class with 1 image"),
        (root / "split", "own: choose another folder"),
    ):
        with pytest.raises(DataError, match=line):
            split_classes(root, out, 0.2, seed=0)
        assert not out.exists()
    with pytest.raises(DataError, match=r"^data\.root=.*/gone: no such folder$"):
        split_classes(tmp_path / "gone", tmp_path / "split", 0.2, seed=0)
