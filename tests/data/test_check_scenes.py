"""resnest-data check on the three layouts: what was planted is found, and nothing else."""

import numpy as np
import pytest

from resnest_imagenet.commands.data import check
from resnest_imagenet.config_data import CheckDataConfig
from resnest_imagenet.data.check import FAULTS, format_report
from resnest_imagenet.data.check_scenes import check_scenes
from resnest_imagenet.errors import DataError
from scene_files import draw, encode, write, write_ade20k, write_cityscapes, write_masks

pytestmark = pytest.mark.process  # files are read and examined in processes

WRITERS = {"ade20k": write_ade20k, "cityscapes": write_cityscapes, "masks": write_masks}
TOTALS = {
    "ade20k": ("training: 1 images in 150 classes", "validation: 1 images in 150 classes"),
    "cityscapes": ("train: 1 images in 19 classes", "val: 1 images in 19 classes"),
    "masks": ("train: 3 images in 3 classes", "val: 2 images in 3 classes"),
}


def find(root, kind="masks", train="train", val="val"):
    findings = check_scenes(kind, str(root), train, val, 1).findings
    return sorted((finding.kind, finding.path, finding.detail) for finding in findings)


@pytest.mark.parametrize("kind", WRITERS)
def test_a_sound_set_has_no_faults(kind, tmp_path):
    report = check_scenes(kind, str(WRITERS[kind](tmp_path)), "train", "val", 2)
    assert report.num_faults == 0
    assert tuple(format_report(report).splitlines()[-3:-1]) == TOTALS[kind]


def test_classes_are_counted_and_absent_ones_noted(tmp_path):
    write_masks(tmp_path)
    for number in range(2):
        write(tmp_path / f"masks/val/{number}.png", encode(np.full((20 + number, 30), 2 * number, np.uint8)))
    report = check_scenes("masks", str(tmp_path), "train", "val", 1)
    assert [part.classes for part in report.parts] == [
        {"background": 3, "disk": 3, "cross": 3},
        {"background": 1, "disk": 0, "cross": 1},
    ]
    assert find(tmp_path) == [("absent class", "masks/val", "disk")]


def plant(root):
    """Write 16 scenes, of which the first ten have something."""
    write_masks(root, train=16)
    masks, images = root / "masks/train", root / "images/train"
    colours, values = draw(99, 22)
    (masks / "0.png").unlink()
    (images / "1.jpg").unlink()
    write(masks / "2.png", encode(colours))
    write(masks / "3.png", encode(values + 9))
    write(masks / "4.png", encode(values.T))
    write(masks / "5.png", encode(draw(99, 25)[1], mode="P"))
    write(images / "6.jpg", b"")
    write(masks / "7.png", b"<html>")
    (masks / "9.png").write_bytes((masks / "8.png").read_bytes())
    (images / "9.jpg").write_bytes((images / "8.jpg").read_bytes())
    (root / "masks/val/1.png").write_bytes((masks / "10.png").read_bytes())
    (root / "images/val/1.jpg").write_bytes((images / "10.jpg").read_bytes())


PLANTED = [
    ("empty", "images/train/6.jpg"),
    ("in train and val", "images/val/1.jpg"),
    ("missing image", "masks/train/1.png"),
    ("missing mask", "images/train/0.jpg"),
    ("not an image", "masks/train/7.png"),
    ("other size", "masks/train/4.png"),
    ("palette mask", "masks/train/5.png"),
    ("twice in a part", "images/train/9.jpg"),
    ("unknown label", "masks/train/3.png"),
    ("wrong mask", "masks/train/2.png"),
]


def test_finds_what_was_planted_and_nothing_else(tmp_path, capfd):
    plant(tmp_path)
    findings = find(tmp_path)
    assert [(kind, path) for kind, path, _ in findings] == PLANTED
    details = {path: detail for _, path, detail in findings}
    assert details["images/train/0.jpg"] == "no masks/train/0.png"
    assert details["masks/train/4.png"] == "22 x 30 pixels, the image 30 x 24"
    assert details["images/train/9.jpg"] == "the same as images/train/8.jpg"
    data = {
        "kind": "masks",
        "root": str(tmp_path),
        "train_dir": "train",
        "val_dir": "val",
        "train_json": None,
        "val_json": None,
        "csv": None,
        "val_split": None,
        "split_seed": 0,
    }
    with pytest.raises(DataError, match="faults: 8 "):
        check(CheckDataConfig(data=data, out=None, workers=2))
    lines = capfd.readouterr().out.splitlines()
    assert "fault  missing mask              1  images/train/0.jpg (no masks/train/0.png)" in lines
    assert lines[-1] == "8 faults, 2 notes" and sum(kind in FAULTS for kind, _ in PLANTED) == 8


def test_missing_folders_are_findings(tmp_path):
    write_ade20k(tmp_path)
    (tmp_path / "annotations/validation").rename(tmp_path / "annotations/val")
    (tmp_path / "annotations/training/ADE_training_00000001.png").unlink()
    name = "training/ADE_training_00000001"
    assert find(tmp_path, "ade20k") == [
        ("missing folder", "annotations/validation", "set data.val_dir=val"),
        ("missing mask", f"images/{name}.jpg", f"no annotations/{name}.png"),
        ("no images", "images/training", "none with a mask"),
    ]
    lines = [f"no {tmp_path}/{folder}: is data.root the data set's own folder?" for folder in ("gtFine", "leftImg8bit")]
    assert find(tmp_path, "cityscapes", val=None) == [
        ("missing folder", "gtFine/train", lines[0]),
        ("missing folder", "leftImg8bit/train", lines[1]),
    ]
    with pytest.raises(DataError, match="^data.root=/nowhere: no such folder$"):
        check_scenes("masks", "/nowhere", "train", "val")
