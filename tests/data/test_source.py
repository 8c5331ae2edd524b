import io

import pytest
from PIL import Image
from test_folder import make_tree

from resnest_imagenet.data.source import (
    find_fault,
    label_by_classes,
    name_unreadable,
    open_source,
    require_same_classes,
)
from resnest_imagenet.errors import DataError


def test_class_lists_that_differ_are_named_on_either_side(tmp_path):
    make_tree(
        tmp_path, "train/a/1.JPEG", "train/b/1.JPEG", "val/a/1.JPEG", "test/a/1.JPEG", "test/b/1.JPEG", "test/c/1.JPEG"
    )
    train, val, test = (open_source("folder", str(tmp_path), name, "x") for name in ("train", "val", "test"))
    require_same_classes(train, train)
    with pytest.raises(DataError, match="val lacks 1 of the classes of .*train: b"):
        require_same_classes(train, val)
    with pytest.raises(DataError, match="train lacks 1 of the classes of .*test: c"):
        require_same_classes(train, test)


def test_a_part_of_the_classes_keeps_the_whole_list_labels(tmp_path):
    make_tree(tmp_path, "val/b/1.JPEG", "val/d/1.JPEG")
    val = open_source("folder", str(tmp_path), "val", "data.val_dir")
    assert label_by_classes(val, ["a", "b", "c", "d"], "the classes").labels.tolist() == [1, 3]
    with pytest.raises(DataError, match="1 of its classes are not among the classes: d"):
        label_by_classes(val, ["a", "b"], "the classes")


def test_names_the_first_unreadable_file(tmp_path):
    make_tree(tmp_path, "val/x/a.JPEG", "val/x/b.JPEG", "val/x/c.JPEG")
    val = open_source("folder", str(tmp_path), "val", "x")
    assert name_unreadable(val, range(3)) is None
    path = tmp_path / "val/x/b.JPEG"
    whole = path.read_bytes()
    for damaged in (b"", b"<html>", whole[:200]):
        path.write_bytes(damaged)
        assert name_unreadable(val, range(3)).startswith(f"{path}: not a readable image (")
    path.unlink()
    assert name_unreadable(val, range(3)) == f"{path}: cannot be read (No such file or directory)"


@pytest.mark.parametrize(
    ("mode", "kind", "fault"),
    [
        ("RGB", "GIF", "a GIF image (not one of JPEG, MPO, PNG, WEBP, BMP, TIFF)"),
        ("F", "TIFF", "a TIFF image of mode F (not one of 1, L, LA, P, RGB, RGBA, CMYK)"),
        ("I;16", "TIFF", "a TIFF image of mode I;16 (not one of 1, L, LA, P, RGB, RGBA, CMYK)"),
        ("I;16", "PNG", None),
        ("RGB", "BMP", None),
        ("CMYK", "JPEG", None),
    ],
)
def test_what_only_one_loader_decodes_is_a_fault(mode, kind, fault):
    file = io.BytesIO()
    Image.new(mode, (8, 8)).save(file, format=kind)
    assert find_fault(file.getvalue()) == fault
