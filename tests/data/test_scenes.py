"""The three layouts as they are unpacked, and what is wrong with one: named in one line."""

import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from resnest_imagenet.data.scenes import CITYSCAPES, LAYOUTS, UNKNOWN, VOID, make_palette, open_scene, open_scenes
from resnest_imagenet.errors import ConfigError, DataError
from scene_files import CLASSES, draw, encode, write, write_ade20k, write_cityscapes, write_masks


def test_masks_as_they_are(tmp_path):
    scenes = open_scenes("masks", str(write_masks(tmp_path)), "train")
    assert (len(scenes), scenes.classes, scenes.images.classes) == (3, CLASSES, CLASSES)
    for index in range(3):
        picture, mask = scenes.read(index)
        _, values = draw([5, index], 20 + index)
        assert (picture.mode, picture.size) == ("RGB", (30, 20 + index))
        assert mask[0, 0] == VOID and np.array_equal(mask.ravel()[1:], values.ravel()[1:])
        assert scenes.name_fault(index) is None
    assert scenes.images.notes == ()


def test_ade20k_has_void_0_and_classes_from_1(tmp_path):
    scenes = open_scenes("ade20k", str(write_ade20k(tmp_path)), "val")
    assert len(scenes.classes) == 150 and scenes.classes[149] == "class 150"
    assert scenes.images.name(0).endswith("images/validation/ADE_validation_00000001.jpg")
    _, mask = scenes.read(0)
    values = np.array(Image.open(scenes.masks.name(0)))
    for value in range(151):
        assert (mask[values == value] == (VOID if value == 0 else value - 1)).all()
    assert mask[0].tolist() == list(range(120, 150))
    assert (scenes.table[151:] == UNKNOWN).all()


def test_cityscapes_keeps_19_of_its_labels(tmp_path):
    scenes = open_scenes("cityscapes", str(write_cityscapes(tmp_path)), "train")
    assert (len(scenes), len(scenes.classes), scenes.palette.shape) == (1, 19, (19, 3))
    picture, mask = scenes.read(0)
    assert picture.size == (5, 8)
    trained = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]
    assert list(CITYSCAPES) == trained
    expected = {value: trained.index(value) if value in trained else VOID for value in range(34)}
    values = np.array(Image.open(scenes.masks.name(0))).ravel().tolist()
    assert mask.ravel().tolist()[:-1] == [expected[value] for value in values[:-1]]
    assert mask[7, 4] == VOID
    assert (scenes.classes[0], scenes.classes[13], scenes.classes[18]) == ("road", "car", "bicycle")
    assert scenes.palette[0].tolist() == [128, 64, 128]


@pytest.mark.parametrize(
    ("kind", "make"), [("ade20k", write_ade20k), ("cityscapes", write_cityscapes), ("masks", write_masks)]
)
def test_one_scene_by_its_image_is_as_in_the_listing(kind, make, tmp_path):
    root = tmp_path / "images/val/x"  # names of the layouts, above its own
    scenes = open_scenes(kind, str(make(root)), "val")
    scene = open_scene(kind, "val", scenes.images.name(0), scenes.classes, scenes.palette)
    assert (scene.images.name(0), scene.masks.name(0)) == (scenes.images.name(0), scenes.masks.name(0))
    for read, listed in zip(scene.read(0), scenes.read(0), strict=True):
        assert np.array_equal(np.asarray(read), np.asarray(listed))
    with pytest.raises(DataError, match=f"^/elsewhere/1.jpg: not in a folder {LAYOUTS[kind].images}/"):
        open_scene(kind, "val", "/elsewhere/1.jpg", scenes.classes, scenes.palette)


def test_parts_may_have_other_names_and_folders_below(tmp_path):
    write_masks(tmp_path)
    write(tmp_path / "images/extra/a/b/1.JPEG", encode(draw(1)[0], "JPEG"))
    write(tmp_path / "masks/extra/a/b/1.png", encode(draw(1)[1]))
    scenes = open_scenes("masks", str(tmp_path), "extra", "data.train_dir")
    assert scenes.images.files.tolist() == [b"a/b/1.JPEG"]
    assert scenes.read(0)[1].shape == (20, 30)


def test_a_mask_with_a_palette_counts_by_its_indices_and_is_noted(tmp_path):
    """As PASCAL VOC's are; its colours are those of the classes."""
    write_masks(tmp_path)
    colours = [[0, 0, 0], [128, 0, 0], [0, 128, 0]]
    for number in range(3):
        image = Image.fromarray(draw([5, number], 20 + number)[1]).convert("P")
        image.putpalette(np.ravel(colours).tolist())
        image.save(tmp_path / f"masks/train/{number}.png", bits=2)
    scenes = open_scenes("masks", str(tmp_path), "train")
    assert np.array_equal(scenes.read(1)[1], draw([5, 1], 21)[1])
    assert scenes.palette.tolist() == colours
    (note,) = scenes.images.notes
    assert note == f"{tmp_path}/masks/train: its masks have a palette: the indices are the classes, not the colours"


def read_fault(root, content, name="masks/train/1.png", kind="masks"):
    write(root / name, content)
    scenes = open_scenes(kind, str(root), "train")
    index = next(index for index in range(len(scenes)) if scenes.name_fault(index))
    line = scenes.name_fault(index)
    assert line.startswith(f"{scenes.images.name(index)}: ") and "\n" not in line
    return line.removeprefix(f"{scenes.images.name(index)}: ").replace(f"{root}/", "")


COLOURS, VALUES = draw([5, 1], 21)


def encode_grey_of_4_bits():
    """Encode values 1 and 2: Pillow reads 17 and 34, which may be classes too."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 2, 1, 4, 0, 0, 0, 0)
    data = zlib.compress(b"\0\x12")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


MASK = "its mask masks/train/1.png: "
INDICES = "not class indices: save them as a grey PNG of 8 bits"
FAULTS = {
    "RGB": (encode(COLOURS), f"{MASK}a PNG image of mode RGB, {INDICES}"),
    "RGBA": (encode(COLOURS, mode="RGBA"), f"{MASK}a PNG image of mode RGBA, {INDICES}"),
    "JPEG": (encode(VALUES, "JPEG"), f"{MASK}a JPEG image of mode L, {INDICES}"),
    "16 bits": (encode(VALUES.astype(np.uint16)), f"{MASK}a PNG image of mode I;16, {INDICES}"),
    "4 bits": (encode_grey_of_4_bits(), f"{MASK}a grey PNG of 4 bits: save one of 8 bits"),
    "label": (encode(VALUES + 7), f"{MASK}a pixel has the value {VALUES[0, 0] + 7}, neither a class nor void"),
    "UNKNOWN": (encode(np.full_like(VALUES, 254)), f"{MASK}a pixel has the value 254, neither a class nor void"),
    "size": (encode(VALUES.T), f"{MASK}21 x 30 pixels, the image 30 x 21"),
    "empty": (b"", f"{MASK}not a readable image (it is empty)"),
    "cut": (encode(VALUES)[:-20], f"{MASK}a PNG image without its end"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_what_is_wrong_with_a_mask_is_one_line(name, tmp_path):
    content, line = FAULTS[name]
    assert read_fault(write_masks(tmp_path), content) == line


def test_a_value_above_the_classes_is_named_in_ade20k(tmp_path):
    write_ade20k(tmp_path)
    line = read_fault(
        tmp_path, encode(np.full((20, 30), 151, np.uint8)), "annotations/training/ADE_training_00000001.png", "ade20k"
    )
    assert line.endswith(".png: a pixel has the value 151, neither a class nor void")


def test_a_damaged_image_is_named_without_its_mask(tmp_path):
    assert (
        read_fault(write_masks(tmp_path), b"<html>", "images/train/1.jpg")
        == "not a readable image (of no known format)"
    )


def fail(root, kind="masks", part="train"):
    with pytest.raises(DataError) as caught:
        open_scenes(kind, str(root), part)
    return str(caught.value).replace(f"{root}", "ROOT")


def test_missing_pairs_are_named(tmp_path):
    write_masks(tmp_path)
    (tmp_path / "masks/train/1.png").unlink()
    assert fail(tmp_path) == "ROOT/images/train/1.jpg: no mask ROOT/masks/train/1.png"
    (tmp_path / "masks/train/0.png").rename(tmp_path / "masks/train/0.jpg")
    assert fail(tmp_path) == "ROOT/images/train/0.jpg: no mask ROOT/masks/train/0.png (and 1 more)"
    (tmp_path / "images/val/1.jpg").unlink()
    assert fail(tmp_path, part="val") == "ROOT/masks/val/1.png: no image for it in ROOT/images/val"


def test_missing_folders_and_names_are_named(tmp_path):
    write_masks(tmp_path)
    assert fail(tmp_path / "no") == "data.root=ROOT: no such folder"
    line = "ROOT/leftImg8bit: no such folder: is data.root=ROOT the data set's own folder?"
    assert fail(tmp_path, "cityscapes") == line
    line = "ROOT/images/test: no such folder (in ROOT/images: train, val); set data.test_dir"
    assert fail(tmp_path, part="test") == line
    (tmp_path / "classes.txt").write_text("a\na\n")
    assert fail(tmp_path).startswith("ROOT/classes.txt: an empty line or a name twice")
    (tmp_path / "classes.txt").unlink()
    assert fail(tmp_path) == "ROOT/classes.txt: cannot be read (No such file or directory)"
    (tmp_path / "classes.txt").write_text("\n".join(map(str, range(254))))
    assert fail(tmp_path) == "ROOT/classes.txt: 254 classes; masks of 8 bits have at most 253"
    for path in (*(tmp_path / "images/train").iterdir(), *(tmp_path / "masks/train").iterdir()):
        path.unlink()
    assert fail(tmp_path) == "ROOT/images/train: no images (*.jpg, .png, ...)"
    write_ade20k(tmp_path / "ade")
    (tmp_path / "ade/objectInfo150.txt").write_text("Idx\tName\n1\twall\n3\tsky\n")
    assert "not ADE20K's list of classes" in fail(tmp_path / "ade", "ade20k")


def test_an_unknown_kind_is_one_line():
    with pytest.raises(
        ConfigError, match=r"^unknown data.kind=ade; did you mean 'ade20k'\? \(ade20k, cityscapes, masks\)$"
    ):
        open_scenes("ade", "/", "train")


@pytest.mark.parametrize("kind", LAYOUTS)
def test_a_hidden_copy_is_skipped(kind, tmp_path):
    root = {"ade20k": write_ade20k, "cityscapes": write_cityscapes, "masks": write_masks}[kind](tmp_path)
    layout = LAYOUTS[kind]
    image = next(path for path in (root / layout.images / layout.folder("train")).rglob("*") if path.is_file())
    write(image.with_name(f"._{image.name}"), b"x")
    scenes = open_scenes(kind, str(root), "train")
    assert "hidden" in scenes.images.notes[0] and not any(
        b"._" in os.path.basename(file) for file in scenes.images.files
    )


def test_the_palette_is_vocs():
    """The first rows of the table that VOC's devkit prints."""
    voc = [[0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0], [0, 0, 128], [128, 0, 128], [0, 128, 128]]
    voc += [[128, 128, 128], [64, 0, 0]]
    assert make_palette(("background", *map(str, range(8)))).tolist() == voc
    assert make_palette(tuple(map(str, range(8)))).tolist() == voc[1:]
    assert len(np.unique(make_palette(tuple(map(str, range(253)))), axis=0)) == 253
