"""Tables 5 and 6 with and without results."""

import csv
import json
from dataclasses import replace

import pytest
import yaml

from conftest import compose_config, newest_checkpoint
from resnest_imagenet.commands.evaluate import run as evaluate
from resnest_imagenet.commands.launch import find_conf
from resnest_imagenet.commands.tables import build_rows, format_tables
from resnest_imagenet.config_reading import EvalConfig
from resnest_imagenet.errors import ConfigError
from resnest_imagenet.evaluation.measured import read_all_measured, read_measured
from resnest_imagenet.evaluation.results import MASK_AP, MeasuredBoxes
from resnest_imagenet.reports import downstream
from resnest_imagenet.reports.downstream import TABLE5, TABLE6, build_downstream, format_downstream
from run_files import read_events

# By backbone: parameters in millions, and multiply-adds in billions at 800 x 1344 with 1000 proposals and 100 masks,
# as counted by others from the authors' configurations, without batch norms.
COUNTED = {
    "faster": {
        "ResNet-50": (43.067, 325.5),
        "ResNet-101": (62.059, 405.1),
        "ResNeSt-50": (44.993, 357.9),
        "ResNeSt-101": (65.785, 461.4),
    },
    "cascade": {
        "ResNet-50": (73.332, 582.3),
        "ResNet-101": (92.324, 661.8),
        "ResNeSt-50": (75.258, 614.7),
        "ResNeSt-101": (96.050, 718.1),
        "ResNeSt-200": (117.977, 872.5),
    },
    "mask": {
        "ResNet-50": (45.711, 378.5),
        "ResNet-101": (64.703, 458.1),
        "ResNeSt-50": (47.637, 410.9),
        "ResNeSt-101": (68.429, 514.4),
    },
    "cascade_mask": {
        "ResNet-50": (75.976, 635.3),
        "ResNet-101": (94.968, 714.8),
        "ResNeSt-50": (77.903, 667.7),
        "ResNeSt-101": (98.694, 771.1),
    },
}
ROWS = [*TABLE5.rows, *TABLE6.rows]
TITLES = {
    "faster": "Faster R-CNN",
    "cascade": "Cascade R-CNN",
    "mask": "Mask R-CNN",
    "cascade_mask": "Cascade Mask R-CNN",
}


@pytest.mark.slow
def test_counted_figures_are_those_of_others():
    """The smallest backbone stands for all: tests/models/test_rcnn.py has every network."""
    for table, kinds in ((TABLE5, ("faster", "cascade")), (TABLE6, ("mask", "cascade_mask"))):
        small = replace(table, rows=[row for row in table.rows if row.model == "resnet50_msra"])
        rows = build_downstream(small, [])
        assert [row["row"] for row in rows] == [f"{TITLES[kind]} ResNet-50" for kind in kinds]
        for row, kind in zip(rows, kinds, strict=True):
            parameters, billions = COUNTED[kind]["ResNet-50"]
            assert row["parameters"] == pytest.approx(parameters, abs=1e-3)
            assert billions < row["gflops"] < 1.0015 * billions + 0.05  # norms count
            assert row["crop"] == "800x1344"


def test_the_rows_are_those_of_the_paper():
    for table, kinds in ((TABLE5, ("faster", "cascade")), (TABLE6, ("mask", "cascade_mask"))):
        names = [f"{TITLES[kind]} {backbone}" for kind in kinds for backbone in COUNTED[kind]]
        assert [row.name for row in table.rows] == names


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.experiment)
def test_a_row_is_its_experiments(row):
    text = (find_conf() / f"experiment/{row.experiment}.yaml").read_text()
    content = yaml.safe_load(text)
    chosen = {group: choice for default in content["defaults"] for group, choice in default.items()}
    assert (chosen["override /task"], chosen["override /data"]) == ("detection", row.data)
    assert chosen["override /model"] == row.model
    has_masks = row in TABLE6.rows
    assert chosen["override /recipe"] == ("detectron2_masks" if has_masks else "detectron2_boxes")
    assert content.get("train", {}).get("cascade", False) == row.detector.startswith("cascade")
    masks = f", mask AP {row.paper['mask_ap']:.2f}" if has_masks else ""
    assert f"\n# Expected: box AP {row.paper['box_ap']:.2f}{masks} (the paper" in text


def count_nothing(table):
    return replace(table, count=lambda row, data: (10**6, 10**9))


RESULT = MeasuredBoxes(
    *("resnest50", "mask", "coco", 42.5, 38.0, 5000, 80),
    *("detectron2_masks", "short side 800", "runs/a/eval.json"),
)
NO_MASKS = replace(RESULT, detector="cascade", mask_ap=None, recipe="detectron2_boxes, cascade=True")


def test_results_stand_beside_the_papers_figures():
    sample = replace(RESULT, model="resnet101_msra", detector="cascade_mask", count=7, num_classes=79)
    table = count_nothing(TABLE6)
    rows = build_downstream(table, [RESULT, sample])
    lines = format_downstream(table, rows, "markdown").splitlines()
    assert lines[0].endswith("| box AP: paper | here | mask AP: paper | here |")
    link = "[resnest50](conf/experiment/mask_rcnn_resnest50.yaml)"
    assert lines[4] == (
        f"| Mask R-CNN ResNeSt-50 | COCO | {link} | 1.00 | 1.0 @800x1344 | 42.81 | 42.50 [1] | 38.14 | 38.00 [1] |"
    )
    assert lines[7].endswith("| 44.79 | 42.50 [2] | 38.52 | 38.00 [2] |")
    assert lines[10:] == [
        "",
        "1. detectron2_masks; short side 800",
        "2. detectron2_masks; short side 800; NOT COCO's validation set: 7 images, 79 classes",
    ]
    assert len({line.count("|") for line in lines[:10]}) == 1
    cells = list(csv.DictReader(format_downstream(table, rows, "csv").splitlines()))
    (line,) = [line for line in cells if line["experiment"].endswith("/mask_rcnn_resnest50.yaml")]
    names = ("crop", "box_ap_paper", "box_ap", "mask_ap_paper", "mask_ap", "count", "source")
    assert [line[name] for name in names] == ["800x1344", "42.81", "42.5", "38.14", "38.0", "5000", "runs/a/eval.json"]


def test_the_kind_of_a_detector_chooses_its_row(monkeypatch):
    """The same backbone is in four rows."""
    for name in ("TABLE5", "TABLE6"):
        monkeypatch.setattr(downstream, name, count_nothing(getattr(downstream, name)))
    no_row = replace(NO_MASKS, model="resnet50")
    rows, strangers = build_rows([5, 6], [RESULT, NO_MASKS, no_row])
    assert strangers == ["runs/a/eval.json: cascade with resnet50 on data=coco has no row"]
    measured = {row["row"]: row["measured"] for number in rows for row in rows[number] if row["measured"]}
    assert list(measured) == ["Cascade R-CNN ResNeSt-50", "Mask R-CNN ResNeSt-50"]
    assert measured["Cascade R-CNN ResNeSt-50"][0]["mask_ap"] is None
    assert "## Table 5: object detection\n\n| row |" in format_tables(rows, "markdown")
    only, _ = build_rows([5], [NO_MASKS])
    assert "42.50 [1]" in format_tables(only, "markdown") and "mask AP" not in format_tables(only, "markdown")


@pytest.mark.slow
def test_results_of_a_run_and_of_its_evaluation(detection_run, demo_objects, tmp_path):
    """The last evaluation of the training, and the same network evaluated by resnest-eval."""
    last = [event for event in read_events(detection_run) if event["event"] == "eval"][-1]
    (of_run,), skipped = read_all_measured([str(detection_run)], {})
    names = ("box_ap", "mask_ap", "count", "protocol")
    assert skipped == [] and {name: getattr(of_run, name) for name in names} == {name: last[name] for name in names}
    assert (of_run.model, of_run.detector, of_run.data) == ("resnest14_half", "mask", "coco")
    assert (of_run.num_classes, of_run.count) == (5, 3)

    out = tmp_path / "eval.json"
    places = (f"ckpt={newest_checkpoint(detection_run)}", f"data.root={demo_objects}", f"out={out}")
    evaluate(compose_config("eval", EvalConfig, *places, "device=cpu", "loader.workers=0"))
    (of_file,), _ = read_all_measured([str(out)], {})
    figures = ("box_ap", "mask_ap")
    assert replace(of_file, **{name: getattr(of_run, name) for name in figures}) == replace(of_run, source=str(out))
    assert [getattr(of_file, name) for name in figures] == pytest.approx([last[name] for name in figures], abs=1e-6)
    (alone,), _ = read_all_measured([str(out)], {}, (MASK_AP,))
    assert alone == of_file

    refused = f"results={out}: its evaluations are of mask_ap, not of top1"
    assert read_measured([f"{tmp_path}/*"], {}) == ([], [refused])


@pytest.mark.parametrize("damage", [{"box_ap": None}, {"count": "2"}, {"protocol": 3}, {"train": {"cascade": 1}}])
def test_a_damaged_run_is_no_result(damage, tmp_path):
    event = {"event": "eval", "epoch": 1, "metric": "mask_ap", "mask_ap": 1.0, "box_ap": 2.0, "count": 2}
    event["protocol"] = "p"
    training = {"recipe": "detectron2_masks", "epochs": 1, "cascade": True, "masks": True}
    config = {"model": {"name": "resnest50", "num_classes": 80}, "data": {"kind": "coco"}, "train": training}

    def write(changes):
        of_training = {name: value for name, value in training.items() if "train" not in changes or name != "masks"}
        (tmp_path / "config.yaml").write_text(json.dumps(config | {"train": of_training}))
        (tmp_path / "metrics.jsonl").write_text(json.dumps(event | changes))

    write(damage)
    with pytest.raises(ConfigError, match="not a run folder with an evaluation"):
        read_all_measured([str(tmp_path)], {})
    write({})
    (result,), _ = read_all_measured([str(tmp_path)], {})
    assert (result.box_ap, result.mask_ap, result.detector) == (2.0, 1.0, "cascade_mask")
    (tmp_path / "eval.json").write_text('{"task": "detection", "results": [{"mask_ap": 1}]}')
    with pytest.raises(ConfigError, match=r"eval.json: not a file of resnest-eval out="):
        read_all_measured([str(tmp_path)], {})
