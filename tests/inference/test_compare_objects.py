"""Detectors on the same images: what differs, counted a second time by loops."""

import csv
import re
import shutil
import sys

import numpy as np
import pytest
import torch

import resnest_imagenet
from conftest import compose_config
from resnest_imagenet.checkpoint import load_checkpoint, save_checkpoint
from resnest_imagenet.commands import compare as command
from resnest_imagenet.config_reading import CompareConfig
from resnest_imagenet.errors import ConfigError

SCORE = 0.3


def found(boxes, labels, scores=None):
    """Return what a detector would find, without a picture."""
    from resnest_imagenet.inference.detect import DetectedImage

    boxes, labels = np.array(boxes, np.float64).reshape(-1, 4), np.array(labels, np.int64)
    return DetectedImage("a.png", np.zeros((9, 9, 3), np.uint8), boxes, np.linspace(1, 0.6, len(boxes)), labels)


def test_boxes_match_once_by_class_and_overlap():
    from resnest_imagenet.inference.compare_objects import match_detections, measure_ious

    first = found([[0, 0, 10, 10], [0, 0, 10, 8], [50, 50, 60, 60], [80, 0, 90, 10]], [1, 1, 0, 2])
    # The second box of the first network is nearer to the only one here; another class; an IoU of 1/3.
    second = found([[0, 0, 10, 8.5], [50, 50, 60, 60], [85, 0, 95, 10]], [1, 1, 2])
    assert match_detections(first, second).tolist() == [[1, 0]]
    assert match_detections(second, first).tolist() == [[0, 1]]
    ious = measure_ious(first.boxes, second.boxes)
    assert ious[0].tolist() == [0.85, 0, 0] and ious[3, 2] == pytest.approx(1 / 3)
    assert match_detections(first, found([], [])).shape == (0, 2)
    # Half of the union is enough.
    assert len(match_detections(found([[0, 0, 10, 10]], [0]), found([[0, 0, 10, 5]], [0]))) == 1


def test_counts_of_three_networks():
    from resnest_imagenet.inference.compare_objects import _Count

    box, other = [0, 0, 10, 10], [50, 50, 60, 60]
    count = _Count(3, 2)
    count.add([found([box, other], [0, 1]), found([box], [0]), found([box, other], [0, 0])])
    # Pairs of networks: 1 match of 3 detections, 1 of 4, 1 of 3.
    assert count.differing == [1 - 6 / 10]
    assert [is_shared.tolist() for is_shared in count.shared[0]] == [[True, False], [True], [True, False]]
    assert count.num_detections.tolist() == [[1, 1], [1, 0], [2, 0]]
    assert count.agreement.tolist() == [100 * 6 / 8, 0]
    count.add([found([], [])] * 3)
    assert count.differing[1] == 0


@pytest.fixture(scope="module")
def checkpoints(detection_run, tmp_path_factory):
    """Two detectors that find something: the second has other classifiers."""
    folder = tmp_path_factory.mktemp("detectors")
    content = load_checkpoint(detection_run / "checkpoints/best.pt")
    generator = torch.Generator().manual_seed(0)
    for name in ("a", "b"):
        for key, value in content["model"].items():
            if key.endswith("classify.weight"):
                change = torch.randn(value.shape, generator=generator)
                content["model"][key] = value + 4 * change if name == "a" else value + change
        (folder / name).mkdir()
        save_checkpoint(content, folder / name / "best.pt")
    return folder / "a/best.pt", folder / "b/best.pt"


@pytest.fixture(scope="module")
def photos(demo_objects):
    return demo_objects / "val2017"


@pytest.fixture(scope="module")
def comparison(checkpoints, photos):
    return resnest_imagenet.compare_objects([str(path) for path in checkpoints], photos, score=SCORE)


def overlap(a, b):
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0
    return width * height / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - width * height)


@pytest.mark.slow
@pytest.mark.process
def test_counts_as_loops_over_the_detections_do(comparison, checkpoints, photos):
    images = [list(resnest_imagenet.detect(path, photos, score=SCORE)) for path in checkpoints]
    matched = 0
    for index, (first, second) in enumerate(zip(*images, strict=True)):
        candidates = sorted(
            (
                (-overlap(a, b), i, j)
                for i, a in enumerate(first.boxes.tolist())
                for j, b in enumerate(second.boxes.tolist())
                if first.labels[i] == second.labels[j] and overlap(a, b) >= 0.5
            )
        )
        rows: set[int] = set()
        columns: set[int] = set()
        for _, i, j in candidates:
            if i not in rows and j not in columns:
                rows.add(i)
                columns.add(j)
        total = len(first) + len(second)
        assert comparison.differing[index] == pytest.approx(1 - 2 * len(rows) / total if total else 0)
        shared = comparison.shared[index]
        assert [set(np.flatnonzero(part)) for part in shared] == [rows, columns]
        assert comparison.num_alone[index].tolist() == [len(first) - len(rows), len(second) - len(columns)]
        matched += len(rows)
    assert comparison.num_detections.sum(1).tolist() == [sum(map(len, of_network)) for of_network in images]
    assert matched and comparison.differing.max() > 0 and comparison.num_alone.sum()
    ordered = comparison.differing[comparison.order].tolist()
    assert ordered == sorted(ordered, reverse=True)


@pytest.mark.slow
@pytest.mark.process
def test_the_command_prints_and_writes_the_same(comparison, checkpoints, demo_objects, tmp_path, monkeypatch, capsys):
    # The annotations may have any name, as in training.
    shutil.copytree(demo_objects / "val2017", tmp_path / "set/val2017")
    shutil.copy(demo_objects / "annotations/instances_val2017.json", tmp_path / "own.json")
    arguments = [f"ckpt=[{checkpoints[0]},{checkpoints[1]}]", f"data.root={tmp_path}/set", f"score={SCORE}"]
    arguments += [
        f"data.val_json={tmp_path}/own.json",
        "device=cpu",
        f"csv={tmp_path}/out.csv",
        f"page={tmp_path}/out.html",
    ]
    monkeypatch.setattr(sys, "argv", ["resnest-compare", *arguments])
    command.main()
    printed = capsys.readouterr().out
    share = f"{100 * comparison.differing.mean():.2f} % of the detections above {SCORE} do not match (same class, IoU"
    assert f"\n{share} 0.5) in the mean over 3 images; " in printed
    rows = list(csv.DictReader((tmp_path / "out.csv").open()))
    assert [float(row["differing"]) for row in rows] == pytest.approx(comparison.differing.tolist(), abs=1e-6)
    for index, row in enumerate(rows):
        for number, name in enumerate(comparison.names):
            assert int(row[f"{name} detections"]) == len(comparison.objects[index][number])
            assert int(row[f"{name} without a match"]) == comparison.num_alone[index, number]
    page = (tmp_path / "out.html").read_text()
    assert page.count("<img ") == 3 * len(comparison.order) > 0
    assert not re.search(r"(src|href)=\"(?!data:|#)", page) and "<script" not in page


@pytest.mark.slow
@pytest.mark.process
def test_equal_detectors_differ_nowhere(checkpoints, photos):
    from resnest_imagenet.reports.compare_objects_page import render_object_comparison

    network = resnest_imagenet.open_detector(checkpoints[0], device="cpu", protocol={"min_score": SCORE})
    comparison = resnest_imagenet.compare_objects([network] * 2, min(photos.iterdir()), score=SCORE)
    assert comparison.differing.tolist() == [0] and len(comparison.order) == 0 and comparison.num_detections.sum()
    assert "Nowhere: all detections match." in render_object_comparison(comparison)
    with pytest.raises(
        ConfigError, match=r"^score=0.1 is below min_score=0.3, with which .* was opened: open it with "
    ):
        resnest_imagenet.compare_objects([network] * 2, photos, score=0.1)
    with pytest.raises(ConfigError, match="^networks: give two networks or more$"):
        resnest_imagenet.compare_objects([network], photos)


@pytest.mark.slow
@pytest.mark.process
def test_refusals(checkpoints, photos, tmp_path):
    model = resnest_imagenet.build_model("resnest14_half", 3).state_dict()
    config = {"model": {"name": "resnest14_half"}, "train": {}}
    save_checkpoint({"model": model, "config": config, "classes": ["a", "b", "c"], "epoch": 1}, tmp_path / "cls.pt")
    content = load_checkpoint(checkpoints[0])
    content["classes"] = [*content["classes"][:-1], "other"]
    save_checkpoint(content, tmp_path / "other.pt")
    first, both = checkpoints[0], f"ckpt=[{checkpoints[0]},{checkpoints[1]}]"
    for options, message in (
        (
            [f"ckpt=[{first},{tmp_path}/cls.pt]"],
            "best.pt is of detection, .*cls.pt of classification: compare networks",
        ),
        ([f"ckpt=[{first},{tmp_path}/other.pt]"], "best.pt has cross as class 4, .*other.pt other: compare networks"),
        ([both, "crop=64"], "^crop is of classification: .*best.pt is of detection, and sees images one at a time"),
        ([both, "loader.workers=1"], "^loader is of classification: "),
        ([both, "protocol=whole"], "^protocol=whole is of segmentation: choose own or coco$"),
        ([f"ckpt=[{tmp_path}/cls.pt,{tmp_path}/cls.pt]", "score=0.5"], "^score is of detection: .* of classification$"),
        (
            [f"ckpt=[{tmp_path}/cls.pt,{tmp_path}/cls.pt]", "data.val_json=x"],
            "^data.val_json is of detection: .* of cla",
        ),
    ):
        with pytest.raises(ConfigError, match=message) as error:
            command.compare_networks(
                compose_config("compare", CompareConfig, "device=cpu", f"images={photos}", *options)
            )
        assert "\n" not in str(error.value)
