"""resnest-data check of lists, and of class folders that are split."""

import numpy as np
import pytest
from test_check import encode, write

from resnest_imagenet.data.check import format_report
from resnest_imagenet.data.check_listed import check_csv, check_split
from resnest_imagenet.data.parts import ClassifiedData

pytestmark = pytest.mark.process  # files are read and examined in processes


def test_copies_on_both_sides_of_a_split_are_faults(tmp_path):
    root = tmp_path / "own"
    for number in range(20):
        write(root, f"cat/{number}.jpg", encode(number // 2))  # each twice
        write(root, f"dog/{number}.jpg", encode(100 + number))
    write(root, "emu/1.jpg", encode(200))
    write(root, "emu/notes.txt", b"x")
    report = check_split(ClassifiedData("folder", str(root), val_split=0.5), workers=1)
    train, val = report.parts
    assert (train.name, val.name) == ("train", "val") and len(train.images) == 21 and len(val.images) == 20
    in_val = {path.removeprefix("own/") for path in val.images}
    kinds = {finding.path: finding.kind for finding in report.findings}
    for pair in np.arange(20).reshape(-1, 2).tolist():
        names = [f"cat/{number}.jpg" for number in pair]
        is_split = len(in_val & set(names)) == 1
        found = {kinds.get(f"own/{name}") for name in names} - {None}
        assert found == {"in train and val" if is_split else "twice in a class"}
    assert kinds["val/emu" if "val/emu" in kinds else "own/emu"] == "missing class"
    assert kinds["own/emu/notes.txt"] == "other file"
    # As a run splits them.
    (root / "emu/1.jpg").rename(root / "emu.jpg")
    (root / "emu/notes.txt").unlink()
    (root / "emu").rmdir()
    val = ClassifiedData("folder", str(root), val_split=0.5).open_part("val")
    assert {path.decode() for path in val.files} == in_val


def test_every_row_of_a_list_is_looked_at(tmp_path):
    for number in range(4):
        write(tmp_path, f"{number}.jpg", encode(number))
    write(tmp_path, "copy.jpg", encode(0))
    write(tmp_path, "broken.jpg", encode(9)[:300])
    rows = ("0.jpg,cat,train", "1.jpg,dog,train", "copy.jpg,cat,val", "3.jpg,dog,val", "broken.jpg,emu,train")
    (tmp_path / "labels.csv").write_text("\n".join(("path,label,part", *rows, "gone.jpg,cat,val")))
    data = ClassifiedData("csv", str(tmp_path))
    report = check_csv(data, "train", "val", workers=1)
    assert sorted((finding.kind, finding.path) for finding in report.findings) == [
        ("damaged", "broken.jpg"),
        ("in train and val", "copy.jpg"),
        ("missing class", "val/emu"),
        ("missing image", "gone.jpg"),
    ]
    assert format_report(report).endswith("train: 3 images in 3 classes\nval: 2 images in 2 classes\n4 faults, 0 notes")
    assert [len(part.images) for part in check_csv(data, None, "val", workers=1).parts] == [2]
