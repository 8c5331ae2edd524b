import io
import struct
import warnings
import zlib

import pytest
from PIL import Image
from test_folder import make_tree

from resnest_imagenet.data.decoding import Fault, find_fault
from resnest_imagenet.data.loader import open_source
from resnest_imagenet.data.source import (
    label_by_classes,
    name_unreadable,
    require_same_classes,
)
from resnest_imagenet.errors import DataError, LoadingError


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
    for damaged in (b"", b"<html>", whole[:200], whole[:-20]):
        path.write_bytes(damaged)
        assert name_unreadable(val, range(3)).startswith(f"{path}: not a readable image (")
    path.unlink()
    with pytest.raises(LoadingError, match=rf"^{path}: cannot be read \(No such file or directory\)$"):
        name_unreadable(val, range(3))


def encode(mode, kind, size=(8, 8)):
    file = io.BytesIO()
    Image.new(mode, size).save(file, format=kind)
    return file.getvalue()


@pytest.mark.parametrize(
    ("mode", "kind", "fault"),
    [
        ("RGB", "GIF", Fault("wrong format", "a GIF image (not one of JPEG, MPO, PNG, WEBP, BMP, TIFF)")),
        ("F", "TIFF", Fault("wrong mode", "a TIFF image of mode F (not one of 1, L, LA, P, RGB, RGBA, CMYK)")),
        ("I;16", "TIFF", Fault("wrong mode", "a TIFF image of mode I;16 (not one of 1, L, LA, P, RGB, RGBA, CMYK)")),
        ("I;16", "PNG", None),
        ("RGB", "BMP", None),
        ("CMYK", "JPEG", None),
    ],
)
def test_what_only_one_loader_decodes_is_a_fault(mode, kind, fault):
    assert find_fault(encode(mode, kind)) == fault


def test_kinds_of_damage_are_told_apart():
    whole = encode("RGB", "JPEG", (64, 64))
    assert find_fault(whole) is None
    kinds = [find_fault(part).kind for part in (b"", b"<html>", whole[:-20])]
    assert kinds == ["empty", "not an image", "damaged"]


@pytest.mark.parametrize(
    ("limit", "size", "detail"),
    [
        (Image.MAX_IMAGE_PIXELS, (9460, 9459), "a PNG image of 9460 x 9459 pixels (over 89,478,485)"),
        (None, (20000, 20000), "a PNG image of 20000 x 20000 pixels (over 89,478,485)"),
        (Image.MAX_IMAGE_PIXELS, (20000, 20000), "not a readable image (Image size (400000000 pixels) exceeds limit"),
    ],
)
def test_too_large_images_are_told_by_the_header_whatever_pillow_thinks(limit, size, detail, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    monkeypatch.setattr(Image.Image, "convert", None)  # calling it would fail
    header = encode("1", "PNG").replace(struct.pack(">2I", 8, 8), struct.pack(">2I", *size), 1)
    header = header[:29] + struct.pack(">I", zlib.crc32(header[12:29])) + header[33:]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fault = find_fault(header)
    assert fault.kind == "too large"
    assert fault.detail.startswith(detail)
