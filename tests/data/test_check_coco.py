"""resnest-data check data.kind=coco: what was planted is found, and nothing else."""

import json

import numpy as np
import pytest
from PIL import Image

from coco_files import CATEGORIES, describe_image, describe_object, write_json, write_part, write_set
from resnest_imagenet.commands.data import check
from resnest_imagenet.config_data import CheckDataConfig
from resnest_imagenet.data.check import FAULTS, format_report
from resnest_imagenet.data.check_coco import check_coco
from resnest_imagenet.errors import DataError

pytestmark = pytest.mark.process  # files are read and examined in processes
TRAIN_JSON, VAL_JSON = (f"annotations/instances_{part}2017.json" for part in ("train", "val"))


def find(root, train="train", val="val", **options):
    findings = check_coco(str(root), train, val, 1, **options).findings
    return sorted((finding.kind, finding.path, finding.detail) for finding in findings)


def test_a_sound_set_has_no_faults(tmp_path):
    report = check_coco(str(write_set(tmp_path)), "train", "val", 2)
    assert [(finding.kind, finding.detail) for finding in report.findings] == [
        ("absent class", "cat"),
        ("absent class", "owl"),
    ]
    lines = format_report(report).splitlines()
    assert lines[-3:-1] == ["train2017: 6 images in 3 classes", "val2017: 2 images in 3 classes"]
    assert report.parts[0].classes == {"dog": 2, "cat": 2, "owl": 3}


def test_all_that_is_wrong_with_the_annotations_is_listed(tmp_path):
    write_set(tmp_path)
    path = tmp_path / TRAIN_JSON
    content = json.loads(path.read_text())
    content["annotations"][0]["category_id"] = 5
    content["annotations"][1]["bbox"] = [1, 2]
    del content["annotations"][2]["segmentation"]  # masks may not be wanted
    content["images"].append(describe_image(99))
    content["annotations"].append(describe_object(50, 98))
    write_json(path, content)
    path = tmp_path / VAL_JSON
    content = json.loads(path.read_text())
    content["annotations"].append(describe_object(0, 2, category=20))
    content["annotations"].append(describe_object(9, 2, category=7))
    write_json(path, content)
    found = [row for row in find(tmp_path) if row[0] != "skipped objects"]
    assert found == [
        ("bad annotations", TRAIN_JSON, "annotation 1: no category has its category_id=5"),
        (
            "bad annotations",
            TRAIN_JSON,
            "annotations[1]: annotation 2: bbox=[1, 2] is not four numbers: x, y, width, height",
        ),
        ("id 0", VAL_JSON, "of an annotation: pycocotools takes a match with it for no match; number from 1 on"),
        ("missing image", "train2017/99.jpg", f"an image of {TRAIN_JSON}"),
    ]
    assert {"bad annotations", "missing image"} < set(FAULTS)


def test_all_that_is_wrong_with_the_images_is_listed(tmp_path):
    write_set(tmp_path)
    folder = tmp_path / "train2017"
    (folder / "20.jpg").write_bytes(b"no image")
    Image.new("RGB", (7, 9)).save(folder / "30.jpg")
    (folder / "40.jpg").write_bytes((folder / "10.jpg").read_bytes())
    Image.new("RGB", (9, 9)).save(folder / "other.png")
    exif = Image.Exif()
    exif[0x0112] = 8
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 30, 3), np.uint8)).save(folder / "50.jpg", exif=exif)
    found = find(tmp_path, val=None)
    assert [row[:2] for row in found] == [
        ("not an image", "train2017/20.jpg"),
        ("other size", "train2017/30.jpg"),
        ("other size", "train2017/40.jpg"),
        ("tiny", "train2017/30.jpg"),
        ("twice in a part", "train2017/40.jpg"),
        ("unlisted image", "train2017/other.png"),
    ]
    assert found[1][2] == "7 x 9 pixels, in the annotations 20 x 30"


def test_missing_parts_are_named_with_the_option(tmp_path):
    write_set(tmp_path)
    (tmp_path / VAL_JSON).write_text("{")
    (tmp_path / TRAIN_JSON).unlink()
    found = find(tmp_path)
    assert [row[:2] for row in found] == [("bad annotations", VAL_JSON), ("no annotations", "train")]
    assert "cut off" in found[0][2] and found[1][2].endswith("set data.train_json")
    assert find(tmp_path, "training", None) == [("missing folder", "training", "set data.train_dir=train2017")]


def test_parts_that_share_a_folder(tmp_path):
    images = [describe_image(number) for number in (1, 2, 3)]
    write_part(tmp_path, "train", images, [describe_object(1, 1)], CATEGORIES[1:2])
    for name, part in (("a", images[:2]), ("b", images[1:2])):
        content = {"images": part, "annotations": [describe_object(1, 2)], "categories": CATEGORIES[1:2]}
        write_json(tmp_path / f"{name}.json", content)
    places = {"train_json": "a.json", "val_json": "b.json"}
    found = [row for row in find(tmp_path, "train2017", "train2017", **places) if row[0] != "skipped objects"]
    assert found == [
        ("in train and val", "train2017/2.jpg", "both annotation files name it"),
        ("unlisted image", "train2017/3.jpg", "no annotation file names it"),
    ]


def test_the_command_ends_with_the_number_of_faults(tmp_path, capsys):
    write_set(tmp_path)
    (tmp_path / "train2017/20.jpg").write_bytes(b"no image")
    data = {
        "kind": "coco",
        "root": str(tmp_path),
        "train_dir": "train2017",
        "val_dir": "train2017",
        "train_json": TRAIN_JSON,
        "val_json": VAL_JSON,
        "csv": None,
        "val_split": None,
        "split_seed": 0,
    }
    with pytest.raises(DataError, match="faults: "):
        check(CheckDataConfig(data=data | {"val_dir": "val"}, out=None, workers=1))
    assert "fault  not an image" in capsys.readouterr().out
    CheckDataConfig(data=data, out=None, workers=1)
    with pytest.raises(ValueError, match="have the same name"):
        CheckDataConfig(data=data | {"val_json": TRAIN_JSON}, out=None, workers=1)
