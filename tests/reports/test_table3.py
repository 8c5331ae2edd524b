"""The paper's figures against the counted ones, and the table with and without results."""

import csv
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from conftest import SMALL, compose_config, evaluate_checkpoint, newest_checkpoint, use_golden_costs
from resnest_imagenet.commands import table3 as command
from resnest_imagenet.commands.launch import find_conf
from resnest_imagenet.config import TrainConfig
from resnest_imagenet.errors import ConfigError
from resnest_imagenet.evaluation.measured import read_measured
from resnest_imagenet.reports.table3 import PAPER, format_table
from resnest_imagenet.training.train import train
from run_files import read_events

GOLDEN = json.loads((Path(__file__).parents[1] / "models/golden.json").read_text())


@pytest.mark.parametrize("row", PAPER, ids=lambda row: row.name)
def test_counted_figures_are_the_papers(row):
    parameters, multiply_adds, _ = GOLDEN[row.model]
    assert parameters / 1e6 == pytest.approx(row.parameters, rel=0.006)
    assert multiply_adds / 1e9 == pytest.approx(row.gflops, rel=0.01)


def make_results(**changes):
    """Return the text of a results file."""
    content = {"model": "resnest50", "ckpt": "official:resnest50", "is_average": False, "num_classes": 1000}
    content |= {"epoch": None, "training": None, "results": [make_results.result]}
    return json.dumps({**content, **changes})


make_results.result = {"crop": 224, "top1": 81.0, "top5": 95.0, "correct1": 40500, "correct5": 47500, "count": 50000}
make_results.result["protocol"] = "short side 256 bilinear, centre crop 224"


def test_the_documents_table_is_the_commands(tmp_path, monkeypatch, capsys):
    use_golden_costs(monkeypatch)
    (tmp_path / "a.json").write_text(make_results(model="resnest14_half"))
    monkeypatch.setattr("sys.argv", ["resnest-table3", f"results={tmp_path}/*", "format=json"])
    command.main()
    printed = capsys.readouterr()
    assert printed.err == f"resnest-table3: skipped: {tmp_path}/a.json: resnest14_half has no row\n"
    table = [
        {**row, "top1_paper": {int(crop): top1 for crop, top1 in row["top1_paper"].items()}}
        for row in json.loads(printed.out)
    ]
    assert table == make_table([])
    assert f"\n{format_table(table, 'markdown')}\n" in (find_conf().parent / "docs/table3.md").read_text()


def make_table(measured):
    """Return what `build_table` does; it takes seconds to count."""
    return [
        {
            "row": row.name,
            "model": row.model,
            "parameters_paper": row.parameters,
            "parameters": GOLDEN[row.model][0] / 1e6,
            "gflops_paper": row.gflops,
            "gflops": GOLDEN[row.model][1] / 1e9,
            "top1_paper": row.top1,
            "measured": [vars(result) for result in measured if result.model == row.model],
        }
        for row in PAPER
    ]


def test_accuracies_with_test_time_augmentation_do_not_stand_beside_the_papers(tmp_path, monkeypatch, capsys):
    use_golden_costs(monkeypatch)
    averaged = {**make_results.result, "top1": 81.5, "protocol": "p, mean with the mirror image", "tta": "flip"}
    (tmp_path / "a.json").write_text(make_results(results=[make_results.result, averaged]))
    monkeypatch.setattr("sys.argv", ["resnest-table3", f"results={tmp_path}/*", "format=csv"])
    command.main()
    printed = capsys.readouterr()
    assert [row["top1"] for row in csv.DictReader(printed.out.splitlines()) if row["top1"]] == ["81.0"]
    assert printed.err == (
        f"resnest-table3: skipped: {tmp_path}/a.json: tta=flip, the paper's accuracies have no such augmentation\n"
    )


@pytest.fixture(scope="module")
def finished_run(demo_images, tmp_path_factory):
    """Train the smallest network for six steps, and return the run folder."""
    folder = tmp_path_factory.mktemp("runs") / "r14"
    options = ("train.epochs=1", "train.warmup_epochs=0", "train.batch_size=16", "recipe=resnest", "protocol=full")
    places = (f"data.root={demo_images}", f"run_dir={folder}", "log.trackers=[]", "loader=torchvision")
    train(compose_config("train", TrainConfig, *SMALL, *options, *places, "train.global_batch=16", "train.crop=32"))
    return folder


@pytest.fixture
def run(finished_run, tmp_path):
    """A copy of it, to change."""
    return shutil.copytree(finished_run, tmp_path / "r14")


CHANGED = "resnest, epochs=1, batch_size=16, global_batch=16, crop=32, warmup_epochs=0.0"


@pytest.mark.slow
def test_results_of_a_run_and_of_its_evaluation(run, evaluation_of, recipes):
    (of_run,), _ = read_measured([str(run)], recipes)
    events = read_events(run)
    assert (of_run.model, of_run.crop, of_run.top1, of_run.count) == ("resnest14_half", 32, events[-1]["top1"], 40)
    assert of_run.protocol == "short side 32 bilinear, centre crop 32"
    assert set(of_run.recipe.split(", ")) == set(CHANGED.split(", "))

    # An evaluation in the folder stands for it.
    out = run / "eval.json"
    results = evaluate_checkpoint(evaluation_of(newest_checkpoint(run), "crop=[32,320]", f"out={out}"))
    measured, skipped = read_measured([str(run.parent / "*"), str(run)], recipes)
    assert skipped == []
    assert [(one.crop, one.top1, one.source) for one in measured] == [(r.crop, r.top1, str(out)) for r in results]
    assert measured == read_measured([str(out)], recipes)[0]

    table = make_table([replace(result, model="resnest50") for result in measured])  # the smallest has no row
    markdown = format_table(table, "markdown").splitlines()
    assert "| @32: here | top-1 @224: paper | here | top-1 @320: paper | here |" in markdown[0]
    cells = [cell.strip() for cell in markdown[8].strip("|").split("|")]
    assert cells[:2] == ["ResNeSt-50", "resnest50"]
    assert cells[6:] == [f"{results[0].top1:.2f} [1]", "81.13", "", "81.82", f"{results[1].top1:.2f} [2]"]
    assert markdown[17].startswith("1. resnest, ")
    assert markdown[17].endswith(
        "short side 32 bilinear, centre crop 32; NOT ImageNet's validation set: 40 images, 10 classes"
    )
    assert len({line.count("|") for line in markdown[:16]}) == 1

    lines = list(csv.DictReader(format_table(table, "csv").splitlines()))
    assert len(lines) == 14 * 2 + 1
    (line,) = [one for one in lines if one["model"] == "resnest50" and one["crop"] == "320"]
    assert (line["top1_paper"], float(line["top1"]), line["count"]) == ("81.82", results[1].top1, "40")
    rows = json.loads(format_table(table, "json"))
    assert rows[6]["measured"][1]["protocol"] == results[1].protocol
    assert rows[6]["top1_paper"] == {"224": 81.13, "320": 81.82}


def test_two_results_of_a_row_are_both_shown(tmp_path):
    for number, top1 in enumerate((81.0, 81.25)):
        path = tmp_path / f"{number}.json"
        path.write_text(make_results(results=[{**make_results.result, "top1": top1}]))
    measured, _ = read_measured([f"{tmp_path}/0.json", f"{tmp_path}/1.json"], {})
    markdown = format_table(make_table(measured), "markdown")
    assert "| 81.13 | 81.00 [1]; 81.25 [1] | 81.82 |" in markdown
    assert markdown.endswith("\n1. weights official:resnest50; short side 256 bilinear, centre crop 224")


TRAINING = {"recipe": "resnest", "epochs": 270, "ema_decay": 0.999}
OF_STEPS = TRAINING | {"epochs": None, "steps": 1000}


@pytest.mark.parametrize(
    ("changes", "recipe"),
    [
        ({}, "weights official:resnest50"),
        ({"training": TRAINING, "epoch": 270, "is_average": True}, "resnest, ema_decay=0.999"),
        ({"training": TRAINING, "epoch": 9, "is_average": True}, "resnest, ema_decay=0.999, after 9 epochs"),
        ({"training": TRAINING, "epoch": 270}, "resnest, ema_decay=0.999, not the moving average"),
        (
            {"training": {**TRAINING, "recipe": "mine"}, "epoch": 270, "is_average": True},
            "mine (no recipe of this project)",
        ),
        ({"training": OF_STEPS, "epoch": 9, "is_average": True}, "resnest, steps=1000, ema_decay=0.999"),
    ],
)
def test_a_result_says_what_was_evaluated(changes, recipe, tmp_path):
    (tmp_path / "a.json").write_text(make_results(**changes))
    measured, _ = read_measured([f"{tmp_path}/a.json"], {"resnest": {"epochs": 270, "steps": None, "ema_decay": None}})
    assert [one.recipe for one in measured] == [recipe]


@pytest.mark.parametrize(("step", "length"), [(150, ", after 150 of 1000 steps"), (1000, "")])
def test_how_far_a_run_of_steps_was(step, length, tmp_path):
    event = {"event": "eval", "epoch": 2, "step": step, "crop": 224, "top1": 1.0, "count": 2, "protocol": "p"}
    config = {"model": {"name": "resnest50", "num_classes": 10}, "train": OF_STEPS}
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    (tmp_path / "metrics.jsonl").write_text(json.dumps(event))
    measured, _ = read_measured([str(tmp_path)], {"resnest": {"epochs": 270, "steps": None, "ema_decay": 0.999}})
    assert [result.recipe for result in measured] == [f"resnest, steps=1000{length}"]


@pytest.mark.slow
def test_a_run_that_is_not_finished_says_so(run, recipes):
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("epochs: 1\n", "epochs: 9\n", 1))
    with open(run / "metrics.jsonl", "a") as file:
        file.write('\n{"event": "eval", "to')  # cut by the end of the run
    assert read_measured([str(run)], recipes)[0][0].recipe.endswith(", after 1 epochs")


@pytest.mark.parametrize(
    "damage", ["metrics.jsonl: ", "metrics.jsonl: {}", "config.yaml: ", "config.yaml: a: [", "config.yaml: 3"]
)
def test_what_is_no_run_is_skipped_in_a_pattern_and_refused_by_name(damage, tmp_path):
    (tmp_path / "run").mkdir()
    event = {"event": "eval", "epoch": 1, "crop": 224, "top1": 1.0, "count": 2, "protocol": "p"}
    model = {"name": "resnest50", "num_classes": 10}
    config = {"model": model, "train": {"recipe": "resnest", "epochs": 1}}
    for name, text in (("config.yaml", json.dumps(config)), ("metrics.jsonl", json.dumps(event))):
        (tmp_path / "run" / name).write_text(text)
    assert len(read_measured([f"{tmp_path}/*"], {})[0]) == 1
    name, text = damage.split(": ", 1)
    (tmp_path / "run" / name).write_text(text)
    (tmp_path / "log.txt").write_text("a stray file")
    line = f"results={tmp_path}/run: not a run folder with an evaluation"
    stray = f"results={tmp_path}/log.txt: not a file of resnest-eval out=..."
    assert read_measured([f"{tmp_path}/*"], {}) == ([], [stray, line])
    with pytest.raises(ConfigError, match=re.escape(line)):
        read_measured([f"{tmp_path}/run"], {})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file or run folder"),
        ("{}", "not a file of resnest-eval out="),
        ("[]", "not a file of resnest-eval out="),
        ("<html>", "not a file of resnest-eval out="),
        (make_results(results=[{**make_results.result, "top1": "81"}]), "not a file of resnest-eval out="),
    ],
)
def test_what_is_no_result_is_refused(content, message, tmp_path):
    path = tmp_path / "[1].json"  # no pattern, as it is there
    if content is not None:
        path.write_text(content)
    else:
        path = tmp_path / "1.json"
    with pytest.raises(ConfigError, match=message):
        read_measured([str(path)], {})
    assert read_measured([f"{tmp_path}/no*"], {}) == ([], [])


def test_on_a_terminal_the_columns_are_under_each_other():
    from resnest_imagenet.reports.aligned import align_tables

    markdown = format_table(make_table([]), "markdown")
    wide, narrow = (align_tables(markdown, width).splitlines() for width in (120, 80))
    assert max(map(len, narrow)) <= 80 < max(map(len, wide)) <= 120
    assert len(wide) == len(narrow) == 16 and not any("|" in line for line in wide)
    row = next(line for line in wide if line.startswith("ResNeSt-50 "))
    assert row.split() == ["ResNeSt-50", "resnest50", "27.5", "27.48", "5.39", "5.39", "81.13", "81.82"]
    assert [line.split()[1] for line in narrow if line.startswith("ResNeSt-50 ")] == ["27.5"]
    # Figures of a column end where its title does.
    assert wide[1].index("counted") + len("counted") == row.index("27.48") + len("27.48")
    assert wide[0].split() == ["M", "params", "GFLOPs", "top-1", "@224", "top-1", "@320"]
    linked = (
        "## Table\n\n| row | experiment | box AP: paper | here |\n|---|---|---:|---:|\n| A | [net](a.yaml) | 1.0 | 2 |"
    )
    assert (
        align_tables(linked, 80)
        == "## Table\n\n                 box AP\nrow  experiment  paper  here\nA    net           1.0     2"
    )
