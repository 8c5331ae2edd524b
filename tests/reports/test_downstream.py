"""Table 7 with and without results, and the command that prints all tables; Tables 5 and 6: test_detection_tables."""

import csv
import json
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from conftest import compose_config, newest_checkpoint
from resnest_imagenet.commands import table3 as command_table3
from resnest_imagenet.commands import tables as command
from resnest_imagenet.commands.evaluate import run as evaluate
from resnest_imagenet.commands.launch import find_conf
from resnest_imagenet.config import TrainConfig
from resnest_imagenet.config_reading import EvalConfig, TablesConfig
from resnest_imagenet.errors import ConfigError
from resnest_imagenet.evaluation.measured import read_all_measured, read_measured
from resnest_imagenet.evaluation.results import MeasuredRegions
from resnest_imagenet.reports import downstream, table3
from resnest_imagenet.reports.downstream import TABLE7, build_downstream, format_downstream
from run_files import read_events

GOLDEN = json.loads((Path(__file__).parents[1] / "models/golden.json").read_text())
# Parameters in millions with 150 classes, and multiply-adds in billions of backbone and head at 480 and 768 pixels, as
# counted by others without batch norms; those of the ResNets with their deep stems' difference, see test_deeplab.
COUNTED = {
    "resnet50s": (42.070 + 0.123776, 87.6 + 6.223 + 56.3, 224.3 + 15.930 + 143.8),
    "resnet101s": (61.063 + 0.123776, 155.8 + 6.223 + 56.3, 398.8 + 15.930 + 143.8),
    "resnest50": (43.997, 90.3 + 56.3, 231.2 + 143.8),
    "resnest101": (64.788, 163.6 + 56.3, 418.8 + 143.8),
}
CLASSIFIERS = 2 * (256 + 1) * (150 - 19)  # parameters of the two last convolutions that 19 classes do without


@pytest.fixture(scope="module")
def rows():
    """Table 7 without results; counted once, which takes seconds."""
    return build_downstream(TABLE7, [])


@pytest.mark.slow
def test_counted_figures_are_those_of_others(rows):
    assert [row["row"] for row in rows] == 2 * [
        f"DeepLabV3 {name}" for name in ("ResNet-50", "ResNet-101", "ResNeSt-50", "ResNeSt-101")
    ]
    for row in rows:
        parameters, at_480, at_768 = COUNTED[row["model"]]
        is_ade = row["data"] == "ade20k"
        assert row["parameters"] == pytest.approx(parameters - (0 if is_ade else CLASSIFIERS / 1e6), abs=2e-3)
        assert row["gflops"] == pytest.approx(at_480 if is_ade else at_768, rel=3e-3)


@pytest.mark.parametrize("row", TABLE7.rows, ids=lambda row: row.experiment)
def test_a_row_is_its_experiments(row):
    text = (find_conf() / f"experiment/{row.experiment}.yaml").read_text()
    config = compose_config("train", TrainConfig, f"+experiment={row.experiment}", "data.root=x")
    assert (config.model.name, config.data.kind) == (row.model, row.data)
    assert config.train.crop == TABLE7.data[row.data].crop
    accuracy = f", pixel accuracy {row.paper['pixel_accuracy']:.2f} %" if "pixel_accuracy" in row.paper else ""
    assert f"\n# Expected: mIoU {row.paper['miou']:.2f} %{accuracy} (the paper" in text


def call(monkeypatch, capsys, *words):
    monkeypatch.setattr(sys, "argv", ["resnest-tables", *words])
    command.main()
    return capsys.readouterr()


@pytest.mark.slow
def test_the_command_prints_one_table_or_all(rows, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(command, "load_recipes", cache(command.load_recipes))  # composing them takes seconds
    # To count takes seconds, and tests/models/test_zoo.py does it.
    monkeypatch.setattr(table3, "count_cost", lambda name, crop: GOLDEN[name][:2])
    by_row = {(row["model"], row["data"]): (1e6 * row["parameters"], 1e9 * row["gflops"]) for row in rows}
    counting = replace(TABLE7, count=lambda row, data: by_row[row.model, row.data])
    monkeypatch.setattr(downstream, "TABLE7", counting)
    for name in ("TABLE5", "TABLE6"):
        table = getattr(downstream, name)
        monkeypatch.setattr(downstream, name, replace(table, count=lambda row, data: (10**6, 10**9)))
    nothing = f"results={tmp_path}/*"
    alone = {number: call(monkeypatch, capsys, nothing, f"table={number}").out for number in (3, 5, 6, 7)}
    assert alone[7] == format_downstream(TABLE7, rows, "markdown") + "\n"
    of_scenes = f"\n## Table 7: semantic segmentation\n\n{alone[7]}"
    both = f"## Table 3: ImageNet\n\n{alone[3]}{of_scenes}"
    assert call(monkeypatch, capsys, nothing, "table=[7,3]").out == both
    of_objects = (
        f"\n## Table 5: object detection\n\n{alone[5]}\n## Table 6: instance segmentation\n\n{alone[6]}{of_scenes}"
    )
    assert call(monkeypatch, capsys, nothing).out == both.replace(of_scenes, of_objects)

    monkeypatch.setattr(sys, "argv", ["resnest-table3", nothing])
    command_table3.main()
    assert capsys.readouterr().out == alone[3]

    in_json = json.loads(call(monkeypatch, capsys, nothing, "format=json").out)
    assert {number: len(table) for number, table in in_json.items()} == {"3": 14, "5": 9, "6": 8, "7": 8}
    assert in_json["7"] == rows
    assert json.loads(call(monkeypatch, capsys, nothing, "format=json", "table=7").out) == rows
    page = (find_conf().parent / "docs/segmentation.md").read_text()
    assert f"\n{alone[7]}" in page.replace("](../conf/", "](conf/")


def test_csv_is_of_one_table():
    with pytest.raises(ConfigError, match="format=csv is for one table, since .*: give table=3, 5, 6 or 7"):
        compose_config("tables", TablesConfig, "format=csv")
    assert compose_config("tables", TablesConfig, "format=csv", "table=7").table == [7]
    with pytest.raises(ConfigError, match="table"):
        compose_config("tables", TablesConfig, "table=4")


def make_rows(*results):
    """Return Table 7 with results, and 1 million parameters everywhere."""
    return build_downstream(replace(TABLE7, count=lambda row, data: (10**6, 10**9)), results)


RESULT = MeasuredRegions(
    "resnest50", "ade20k", 45.0, 81.0, 2000, 150, "deeplab_gluon", "whole, own size", "runs/a/eval.json"
)


def test_results_stand_beside_the_papers_figures():
    published = replace(RESULT, miou=46.0, pixel_accuracy=82.0, protocol="published, long side 520")
    sample = replace(RESULT, model="resnet50s", data="cityscapes", count=2, num_classes=18)
    table = make_rows(RESULT, published, sample)
    lines = format_downstream(TABLE7, table, "markdown").splitlines()
    link = "[resnest50](conf/experiment/deeplabv3_resnest50_ade20k.yaml)"
    assert lines[4] == (
        f"| DeepLabV3 ResNeSt-50 | ADE20K | {link} | 1.00 | 1.0 @480 "
        "| 45.12 | 45.00 [1]; 46.00 [2] | 81.17 | 81.00 [1]; 82.00 [2] |"
    )
    assert lines[6].endswith("| 78.72 | 45.00 [3] |  | 81.00 [3] |")
    assert lines[10:] == [
        "",
        "1. deeplab_gluon; whole, own size",
        "2. deeplab_gluon; published, long side 520",
        "3. deeplab_gluon; whole, own size; NOT Cityscapes's validation set: 2 images, 18 classes",
    ]
    assert len({line.count("|") for line in lines[:10]}) == 1

    cells = list(csv.DictReader(format_downstream(TABLE7, table, "csv").splitlines()))
    assert len(cells) == 8 + 1
    of_row = [line for line in cells if line["experiment"].endswith("resnest50_ade20k.yaml")]
    assert [(line["miou_paper"], line["miou"], line["protocol"]) for line in of_row] == [
        ("45.12", "45.0", "whole, own size"),
        ("45.12", "46.0", "published, long side 520"),
    ]
    assert (cells[0]["miou_paper"], cells[0]["miou"], cells[0]["source"]) == ("42.1", "", "")


@pytest.mark.slow
def test_results_of_a_run_and_of_its_evaluation(segmentation_run, tmp_path, monkeypatch, capsys):
    """The last evaluation of the training, and the same network evaluated by resnest-eval."""
    last = [event for event in read_events(segmentation_run) if event["event"] == "eval"][-1]
    (of_run,), skipped = read_all_measured([str(segmentation_run)], {})
    names = ("miou", "pixel_accuracy", "count", "protocol")
    assert skipped == [] and {name: getattr(of_run, name) for name in names} == {name: last[name] for name in names}
    assert (of_run.model, of_run.data, of_run.num_classes) == ("resnest14_half", "masks", 6)

    out = tmp_path / "eval.json"
    places = (f"ckpt={newest_checkpoint(segmentation_run)}", f"data.root={segmentation_run.parent / 'scenes'}")
    evaluate(compose_config("eval", EvalConfig, *places, f"out={out}", "device=cpu", "loader.workers=0"))
    (of_file,), _ = read_all_measured([str(out)], {})
    assert of_file == replace(of_run, source=str(out))

    refused = f"results={out}: its evaluations are of miou, not of top1"
    assert read_measured([f"{tmp_path}/*"], {}) == ([], [refused])
    monkeypatch.setattr(downstream, "TABLE7", replace(TABLE7, count=lambda row, data: (10**6, 10**9)))
    capsys.readouterr()
    printed = call(monkeypatch, capsys, f"results={tmp_path}/*", "table=7")
    assert printed.err == f"resnest-tables: skipped: {out}: resnest14_half on data=masks has no row\n"


@pytest.mark.parametrize("damage", [{"pixel_accuracy": None}, {"count": "2"}, {"protocol": 3}, {"data": None}])
def test_a_damaged_run_is_no_result(damage, tmp_path):
    event = {"event": "eval", "epoch": 1, "metric": "miou", "miou": 1.0, "pixel_accuracy": 2.0, "count": 2}
    event |= {"protocol": "p"} | damage
    config = {"model": {"name": "resnest50", "num_classes": 150}, "data": damage.get("data", {"kind": "ade20k"})}
    config["train"] = {"recipe": "deeplab_gluon", "epochs": 1}
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    (tmp_path / "metrics.jsonl").write_text(json.dumps(event))
    with pytest.raises(ConfigError, match="not a run folder with an evaluation"):
        read_all_measured([str(tmp_path)], {})
    (tmp_path / "metrics.jsonl").write_text(json.dumps(event | {"pixel_accuracy": 2.0, "count": 2, "protocol": "p"}))
    (tmp_path / "config.yaml").write_text(json.dumps(config | {"data": {"kind": "ade20k"}}))
    (result,), _ = read_all_measured([str(tmp_path)], {})
    assert (result.miou, result.pixel_accuracy, result.data) == (1.0, 2.0, "ade20k")
