"""Copies of training images among those of validation."""

import shutil

import pytest
from test_split import write_classes

from resnest_imagenet.data import shared_images
from resnest_imagenet.data.parts import ClassifiedData
from resnest_imagenet.data.shared_images import describe_shared


def open_parts(root):
    return ClassifiedData("folder", str(root)).open_parts()


def test_copies_are_counted_under_any_name(tmp_path):
    """Texts of equal length, so all files are read."""
    write_classes(tmp_path / "train", cat=90, dog=90)
    write_classes(tmp_path / "val", cat=5, dog=5)
    for file in (tmp_path / "val").rglob("*.jpg"):
        file.write_text(file.read_text().replace(" ", "!"))
    assert describe_shared(*open_parts(tmp_path)) is None
    shutil.copy(tmp_path / "train/dog/7.jpg", tmp_path / "val/cat/new.jpg")
    shutil.copy(tmp_path / "train/cat/8.jpg", tmp_path / "val/cat/4.jpg")
    assert describe_shared(*open_parts(tmp_path)) == (
        f"2 of 11 val images are training images too ({tmp_path}/val/cat/4.jpg is {tmp_path}/train/cat/8.jpg): "
        "accuracy will be too high; resnest-data check lists them"
    )


def test_of_a_large_set_some_are_compared_or_none(tmp_path, monkeypatch):
    write_classes(tmp_path / "train", cat=40, dog=40)
    shutil.copytree(tmp_path / "train", tmp_path / "val")
    parts = open_parts(tmp_path)
    reads = []
    for part in parts:
        monkeypatch.setattr(type(part), "fetch", lambda images, index: reads.append(index) or images.files[index])
    assert (describe_shared(*parts) or "").startswith("80 of 80 val images are training images too")
    monkeypatch.setattr(shared_images, "_MOST_COMPARED", 10)
    assert (describe_shared(*parts) or "").startswith("at least 10 of 80 val images")
    monkeypatch.setattr(shared_images, "_FEW", 1.5)
    assert describe_shared(*parts) is None
    reads.clear()
    for limit in ("_MOST_READ", "_MOST_IMAGES"):
        with monkeypatch.context() as patch:
            patch.setattr(shared_images, limit, 50)
            assert describe_shared(*parts) is None
    assert not reads


@pytest.mark.parametrize("name", ["gone", "empty"])
def test_what_cannot_be_read_is_no_copy(tmp_path, name):
    write_classes(tmp_path / "train", cat=3, dog=3)
    write_classes(tmp_path / "val", cat=2, dog=2)
    parts = open_parts(tmp_path)
    for part in ("train", "val"):
        for file in (tmp_path / part).rglob("*.jpg"):
            file.unlink() if name == "gone" else file.write_text("")
    assert describe_shared(*parts) is None
