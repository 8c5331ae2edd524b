"""A page on real runs, read from their folders and looked at in a real browser."""

import html
import itertools
import json
import os
import re
import shutil
import sys

import numpy as np
import pytest

from browser import look_at, needs_browser
from conftest import SMALL, compose_config, evaluate_checkpoint, use_golden_costs
from resnest_imagenet.commands import report as command
from resnest_imagenet.config import TrainConfig
from resnest_imagenet.config_reading import EvalConfig
from resnest_imagenet.errors import ConfigError
from resnest_imagenet.evaluation.accuracy import Evaluation
from resnest_imagenet.evaluation.measured import read_measured
from resnest_imagenet.evaluation.mistakes import calibrate, calibration_error, count_confusions, rank_confusions
from resnest_imagenet.evaluation.predictions import Predictions
from resnest_imagenet.evaluation.step_reports import collect_reports
from resnest_imagenet.reports.runs import Run, find_runs, list_differences, list_figures, read_run
from resnest_imagenet.reports.table3 import PAPER
from resnest_imagenet.training.train import train

CHARTS = ["Loss", "Accuracy after each epoch", "Learning rate", "Throughput", "Wait for data", "Calibration"]
CHARTS += ["Confidences", "Recall by class"]


def render_report(*arguments):
    from resnest_imagenet.reports import report  # late: it imports torchvision

    return report.render_report(*arguments)


@pytest.fixture(scope="module")
def folders(demo_images, tmp_path_factory):
    """Two runs, and one evaluation of the first in a folder of its own."""
    root = tmp_path_factory.mktemp("runs")
    places = ("loader=torchvision", f"data.root={demo_images}")
    for name, options in (("a", ()), ("b", ("train.mixup_alpha=0.2", "seed=1"))):
        train(compose_config("train", TrainConfig, *SMALL, *places, f"run_dir={root / name}", *options))
    for name, more in (("a", ()), ("c", (f"predictions={root}/c/predictions.csv",))):
        options = (*places, f"ckpt={root}/a/checkpoints/best.pt", "device=cpu", "loader.workers=0", "crop=[32,64]")
        evaluate_checkpoint(compose_config("eval", EvalConfig, *options, f"out={root}/{name}/eval.json", *more))
    return [root / name for name in "abc"]


@pytest.fixture(scope="module")
def page(folders, recipes, tmp_path_factory):
    out = tmp_path_factory.mktemp("page") / "report.html"
    runs, _ = find_runs(list(map(str, folders)), recipes)
    from resnest_imagenet.reports.report import write_report  # late: it imports torchvision

    with pytest.MonkeyPatch.context() as patch:
        use_golden_costs(patch)
        write_report(runs, out, latency=False, device="cpu")
    return out


@pytest.mark.process
def test_a_run_is_read_as_it_was(folders, recipes):
    a, b, c = (read_run(folder, recipes) for folder in folders)
    assert (a.model, c.model, a.status["state"], a.steps_per_epoch) == (
        "resnest14_half",
        "resnest14_half",
        "finished",
        6,
    )
    assert [one.crop for one in a.measured] == [32, 64]
    assert [(event["event"], event["epoch"]) for event in b.evaluations] == [("eval", 1), ("eval", 2)]
    # best.pt's, as the evaluation of that file finds it again.
    assert a.predictions[0].evaluation.top1 == max(event["top1"] for event in a.evaluations) == a.measured[0].top1
    for name in ("labels", "predicted", "in_top5"):
        assert (getattr(a.predictions[0].evaluation, name) == getattr(c.predictions[0].evaluation, name)).all()
    assert [said.protocol for said in c.predictions] == [one.protocol for one in c.measured]
    assert not c.steps and not c.config
    assert list_differences([a, b, c]) == [("seed", [0, 1]), ("train.mixup_alpha", [0.0, 0.2])]


@pytest.mark.process
def test_the_page_says_what_was_measured(page, folders, recipes):
    text = page.read_text()
    assert not re.search(r"(src|href)=\"(?!data:|#)", text) and "<script" not in text
    words = html.unescape(re.sub(r"<[^>]*>", " ", text))
    for run in (read_run(folder, recipes) for folder in folders):
        assert words.count(run.name) >= 3
        lines = re.sub(r"  +", "  ", words)
        for what, figure in list_figures(run):
            assert f"  {run.name}  {what}  {figure.crop}  {figure.top1:.2f}  " in lines
        if run.evaluations:  # one accuracy for a run: the best network's
            best = max(run.evaluations, key=lambda event: event["top1"])
            assert f"best, epoch {best['epoch']}  32  {best['top1']:.2f}" in lines
            assert f"best top-1  {best['top1']:.2f} %  95 % interval" in lines
        for said in run.predictions:
            wrong = said.evaluation.count - said.evaluation.correct1
            assert f"{said.protocol}; {wrong} of 40 images wrong." in words


@needs_browser
@pytest.mark.process
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (400, True)], ids=["wide and light", "narrow and dark"])
def test_the_page_in_a_browser(page, folders, recipes, width, dark):
    seen = look_at(page, width, dark)
    predictions = [said for folder in folders for said in read_run(folder, recipes).predictions]
    expected = [*CHARTS, *["Confusion matrix"] * len(predictions)]
    assert [label.partition(":")[0] for label in seen["charts"]] == expected
    assert seen["pictures"] == sum(min(24, said.evaluation.count - said.evaluation.correct1) for said in predictions)
    assert (seen["width"] <= width, seen["outside"]) == (True, [])  # nothing sticks out
    assert seen["loaded"] == []  # no network
    assert (seen["paper"], seen["ink"]) == (
        ("rgb(22, 24, 28)", "rgb(236, 236, 236)") if dark else ("rgb(255, 255, 255)", "rgb(28, 28, 28)")
    )


@pytest.mark.slow
def test_imagenets_runs_stand_in_table_3(tmp_path, recipes, monkeypatch):
    use_golden_costs(monkeypatch)
    (tmp_path / "official").mkdir()
    result = {"crop": 224, "top1": 81.03, "top5": 95.4, "correct1": 40515, "correct5": 47700, "count": 50000}
    content = {"model": "resnest50", "ckpt": "official:resnest50", "is_average": False, "num_classes": 1000}
    content |= {"epoch": None, "training": None, "results": [{**result, "protocol": "centre crop 224"}]}
    (tmp_path / "official/eval.json").write_text(json.dumps(content))
    run = read_run(tmp_path / "official", recipes)
    latency = {row.model: 0.001 * number for number, row in enumerate(PAPER, 1)}
    text = render_report([run], 224, latency, "a device")
    for title in ("Accuracy against computation", "Accuracy against latency"):
        (chart,) = re.findall(rf'<svg role="img" aria-label="{title}.*?</svg>', text, re.DOTALL)
        assert str(tmp_path / "official") in chart and ">SKNet<" in chart
    assert "interleaved rounds on a device" in text and "Not placed" not in text


@pytest.mark.slow
def test_many_runs_have_one_key_in_place_of_legends():
    steps = collect_reports([{**STEP, "step": step, "epoch": 1} for step in (1, 6)], list(STEP)[1:])
    for number, places in ((7, (True, False)), (6, (False, True))):
        runs = [
            Run(f"run <{place}>", {}, steps, [EVALUATION | {"loss": 2.0}], {}, {}, [], []) for place in range(number)
        ]
        text = render_report(runs, 224, {}, "")
        named = text.count("</span> run &lt;")
        losses = text[text.index('aria-label="Loss') : text.index('aria-label="Accuracy')]
        assert (named == number, 'id="legend_1"' in losses) == places and named in (0, number)


@pytest.mark.slow
def test_a_thousand_classes_stay_readable(tmp_path):
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(1000), 50)
    predicted = np.where(rng.random(50_000) < 0.8, labels, rng.integers(0, 1000, 50_000))
    predicted[:30] = 7  # of class 0
    random = rng.random((2, 50_000))
    said = Evaluation(labels, predicted, predicted == labels, *random)
    classes = tuple(f"class{number:04}" for number in range(1000))
    files = np.array([str(tmp_path / "gone.jpg")] * 50_000, dtype=object)
    predictions = [Predictions("centre crop 224", files, classes, said)]
    text = render_report([Run("big", {}, collect_reports([]), [], {}, {}, [], predictions)], 224, {}, "")
    row = re.search(r"<h3>Most confused</h3>.*?<tbody><tr>(.*?)</tr>", text, re.DOTALL)
    assert re.findall(r"<td>(.*?)</td>", row[1]) == ["class0000", "class0007", "30", "60.0"]
    assert text.count("(no picture at") == 24
    assert len(text) < 1_500_000


def test_confusions_and_calibration_by_hand():
    said = Evaluation(
        labels=np.array([0, 0, 1, 1, 2]),
        predicted=np.array([0, 1, 0, 0, 2]),
        in_top5=np.ones(5, bool),
        confidence=np.array([0.95, 0.55, 0.9, 0.91, 1.0]),
        true_probability=np.zeros(5),
    )
    confusions = count_confusions(said, 3)
    assert confusions.tolist() == [[1, 1, 0], [2, 0, 0], [0, 0, 1]]
    assert rank_confusions(confusions, 5) == [(1, 0, 2), (0, 1, 1)]
    assert rank_confusions(confusions, 1) == [(1, 0, 2)]
    confidence, accuracy, counts = calibrate(said, bins=10)
    assert counts.tolist() == [1, 4]
    assert confidence.tolist() == pytest.approx([0.55, (0.95 + 0.9 + 0.91 + 1) / 4])
    assert accuracy.tolist() == [0, 0.5]
    assert calibration_error(said, bins=10) == pytest.approx((0.55 + 4 * (0.94 - 0.5)) / 5)


@pytest.mark.process
def test_refusals(tmp_path, recipes, folders):
    with pytest.raises(ConfigError, match="runs=.*nowhere: no such folder"):
        read_run(tmp_path / "nowhere", recipes)
    with pytest.raises(ConfigError, match="neither a run folder nor one with results"):
        read_run(tmp_path, recipes)
    (tmp_path / "metrics.jsonl").write_text('{"epoch": 1}\n')
    with pytest.raises(ConfigError, match=r"metrics\.jsonl: not what resnest-train writes"):
        read_run(tmp_path, recipes)
    (tmp_path / "config.yaml").write_text("[")
    (tmp_path / "metrics.jsonl").unlink()
    with pytest.raises(ConfigError, match=r"config\.yaml: cannot be read"):
        read_run(tmp_path, recipes)


STEP = {"event": "train", "step": 1, "loss": 1.0, "lr": 0.1, "images_per_s": 9.0, "data_wait": 0.1}
EVALUATION = {"event": "eval", "step": 6, "epoch": 1, "top1": 50.0, "count": 40, "crop": 32, "protocol": "p"}
OPTIONS = {"model": {"name": "resnest50", "num_classes": 10}, "train": {"recipe": "resnest", "epochs": 3}}
BOMB = "a: &a [x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in itertools.pairwise("abcdefghijklmnop"))


def write_run(folder, **files):
    """Write a run folder by hand; a file's value may be its events or options."""
    files = {"metrics.jsonl": [STEP, EVALUATION], "config.yaml": OPTIONS, "status.json": {"state": "finished"}} | files
    for name, content in files.items():
        lines = content if isinstance(content, list) else [content]
        text = content if isinstance(content, str | bytes) else "".join(f"{json.dumps(line)}\n" for line in lines)
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "content"),
    [
        *(("metrics.jsonl", [STEP, EVALUATION | {"epoch": value}]) for value in (0, -1, True, 0.0, None, "1", 10**400)),
        *(("metrics.jsonl", [STEP, EVALUATION | {"top1": value}]) for value in (None, "81", [81], 1e308)),
        ("metrics.jsonl", [STEP, EVALUATION | {"step": 0}]),
        ("metrics.jsonl", [STEP | {"loss": None}]),
        ("metrics.jsonl", [STEP | {"lr": "0.1"}]),
        ("metrics.jsonl", [{"event": ["eval"]}]),
        ("metrics.jsonl", b"\xff{}\n"),
        ("metrics.jsonl", '{"event":' + "[" * 10**5 + "}\n"),
        ("config.yaml", BOMB),
        ("config.yaml", "[" * 5000),
        ("config.yaml", b"\xff\x00"),
        ("config.yaml", "? [a]\n: b\n"),
        ("config.yaml", "a: " + "b" * 10**6),
        ("config.yaml", {"model": {"name": ["resnest50"]}}),
        ("status.json", BOMB),
        ("status.json", "[1]"),
    ],
)
def test_a_damaged_run_folder_is_a_line(name, content, tmp_path, recipes):
    write_run(tmp_path)
    assert read_run(tmp_path, recipes).evaluations == [EVALUATION]
    write_run(tmp_path, **{name: content})
    with pytest.raises(ConfigError, match=f"^{tmp_path}/{name}: (cannot be read|not what resnest-train writes)$"):
        read_run(tmp_path, recipes)


@pytest.mark.parametrize(
    ("places", "expected"),
    [
        ([("train", 4, 0), ("train", 6, 0), ("train", 8, 1), ("train", 12, 1), ("train", 15, 2), ("eval", 15, 3)], 6),
        ([("train", 4, 0), ("train", 6, 0), ("train", 8, 1)], 6),
        ([("train", 4, 0)], 1),  # in the first epoch
        # Those of steps counted from 1, as today.
        ([("train", 4, 1), ("train", 6, 1), ("train", 8, 2), ("train", 12, 2), ("train", 15, 3), ("eval", 15, 3)], 6),
        ([("train", 4, 1), ("train", 6, 1), ("train", 8, 2)], 6),
        ([("train", 4, 1)], 1),
        ([("eval", 12, 2)], 6),
    ],
)
def test_steps_of_an_epoch_where_not_every_epoch_is_evaluated(places, expected, tmp_path, recipes):
    by_kind = {"train": STEP, "eval": EVALUATION}
    events = [by_kind[kind] | {"step": step, "epoch": epoch} for kind, step, epoch in places]
    write_run(tmp_path, **{"metrics.jsonl": events})
    assert read_run(tmp_path, recipes).steps_per_epoch == expected


@pytest.mark.slow
def test_a_run_of_another_task_is_drawn_by_its_own_metric(tmp_path, recipes, monkeypatch):
    """Its evaluations have neither top1 nor crop nor protocol."""
    use_golden_costs(monkeypatch)
    for name, number in (("seg", 2), ("other", 3)):
        (tmp_path / name).mkdir()
        evaluations = [
            {"event": "eval", "metric": "miou", "step": 6 * epoch, "epoch": epoch, "miou": 30.0 + epoch, "count": 40}
            for epoch in range(1, number + 1)
        ]
        write_run(tmp_path / name, **{"metrics.jsonl": [STEP, *evaluations]})
    runs, skipped = find_runs([str(tmp_path / "*")], recipes)
    assert [(run.metric, run.measured, len(run.evaluations)) for run in runs] == [("miou", [], 3), ("miou", [], 2)]
    assert skipped == []
    text = render_report(runs, 224, {}, "")
    assert "<th>best mIoU %</th><th>last</th>" in text and "<td>33.00 (epoch 3)</td><td>33.00</td>" in text
    (chart,) = re.findall(r'aria-label="([^"]* after each epoch[^"]*)"', text)
    assert chart == "mIoU after each epoch: mIoU % against epoch"
    assert "Table 3" not in text and "top-1" not in text and "top1" not in text

    # Beside a classifier: each with its own metric, and the classifier's place in Table 3.
    (tmp_path / "cls").mkdir()
    write_run(tmp_path / "cls", **{"metrics.jsonl": [STEP, EVALUATION | {"metric": "top1"}]})
    text = render_report([*runs, read_run(tmp_path / "cls", recipes)], 224, {}, "")
    assert "<th>best</th>" in text and "<td>50.00 top-1 % (epoch 1)</td>" in text
    assert "<td>33.00 mIoU % (epoch 3)</td>" in text and "Table 3" not in text  # it has ten classes
    charts = re.findall(r'aria-label="([^"]*) after each epoch', text)
    assert charts == ["mIoU", "Accuracy"]
    with pytest.raises(ConfigError, match=f"results={tmp_path}/seg: its evaluations are of miou, not of top1"):
        read_measured([str(tmp_path / "seg")], recipes)


@pytest.mark.parametrize(
    "evaluation", [{"metric": "miou"}, {"metric": "miou", "miou": None}, {"metric": "miou", "miou": "1"}]
)
def test_an_evaluation_without_its_metric_is_damaged(evaluation, tmp_path, recipes):
    write_run(tmp_path, **{"metrics.jsonl": [STEP, EVALUATION | evaluation]})
    with pytest.raises(ConfigError, match=r"metrics\.jsonl: not what resnest-train writes"):
        read_run(tmp_path, recipes)


@pytest.mark.parametrize("training", [{}, {"recipe": [], "epochs": 2}, {"recipe": "resnest", "epochs": None}])
def test_a_damaged_result_is_a_line(training, tmp_path, recipes):
    content = {"model": "resnest50", "ckpt": "x", "is_average": False, "num_classes": 10, "epoch": 1, "results": []}
    write_run(tmp_path, **{"eval.json": {**content, "training": training}})
    with pytest.raises(ConfigError, match=r"eval\.json: not a file of resnest-eval out="):
        read_run(tmp_path, recipes)


def test_a_pipe_in_a_run_folder_is_not_waited_for(tmp_path, recipes):
    write_run(tmp_path)
    os.mkfifo(tmp_path / "predictions.csv")
    with pytest.raises(ConfigError, match=r"predictions\.csv: not a file"):
        read_run(tmp_path, recipes)


def call(monkeypatch, capsys, *words):
    use_golden_costs(monkeypatch)
    monkeypatch.setattr(sys, "argv", ["resnest-report", *map(str, words), "latency=false", "device=cpu"])
    command.main()
    return capsys.readouterr()


@pytest.mark.process
def test_folders_come_bare_and_have_any_name(folders, tmp_path, monkeypatch, capsys):
    out = tmp_path / "r.html"
    odd = tmp_path / "lr=0.1, it's $x & <b>"
    shutil.copytree(folders[2], odd)
    assert call(monkeypatch, capsys, folders[0], odd, f"out={out}").out == f"wrote {out}: {folders[0]}, {odd}\n"
    text = out.read_text()
    assert "<b>" not in text and str(odd) in html.unescape(text)


@pytest.mark.process
def test_a_pattern_skips_what_is_no_run(folders, tmp_path, monkeypatch, capsys):
    shutil.copytree(folders[1], tmp_path / "b")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    # Cut as a killed run leaves it: no evaluation yet, the last line half written.
    (tmp_path / "young").mkdir()
    lines = (folders[0] / "metrics.jsonl").read_text().splitlines()[:1]
    (tmp_path / "young/metrics.jsonl").write_text(f"{lines[0]}\n{lines[0][:30]}")
    shutil.copy(folders[0] / "config.yaml", tmp_path / "young")
    printed = call(monkeypatch, capsys, f"runs={tmp_path}/*", f"out={tmp_path}/r.html")
    assert printed.out.endswith(f": {tmp_path}/b, {tmp_path}/young\n")
    assert [line.rpartition(": ")[2] for line in printed.err.splitlines()] == [
        "neither a run folder nor one with results of resnest-eval",
        "not a folder",
    ]
    with pytest.raises(SystemExit, match="2"):
        call(monkeypatch, capsys, f"{tmp_path}/nothing*")


def test_cards_say_what_came_of_a_run(tmp_path, recipes):
    """Of a run by hand: 36 of 40 images right, those of class b worst, and 0.95 sure of each."""
    from resnest_imagenet.reports.cards import list_cards  # late: it imports torchvision

    labels, predicted = np.repeat([0, 1], 20), np.repeat([0, 1, 0], [20, 16, 4])
    evaluation = Evaluation(labels, predicted, np.ones(40, bool), np.full(40, 0.95), np.full(40, 0.5))
    status = {"state": "failed", "error": "a <reason>", "time": 1_800_000_000.0}
    events = [{**STEP, "step": step, "epoch": 1, "time": 1_799_990_000.0 + step} for step in (1, 3, 6)]
    steps = collect_reports(events, ("step", "loss", "lr", "images_per_s", "data_wait"))
    scores = [{**EVALUATION, "epoch": epoch, "top1": top1} for epoch, top1 in ((1, 90.0), (2, 70.0))]
    config = {"train.epochs": 3, "model.num_classes": 2}
    predictions = [Predictions("p", np.array(["x"] * 40, object), ("a", "b"), evaluation)]
    cards = list_cards(Run("r", config, steps, scores, status, {}, [], predictions))
    assert [(card.label, card.value, card.note) for card in cards] == [
        ("state", "failed", "epochs: 2 of 3; a <reason>"),
        ("best top-1", "90.00 %", "95 % interval 76.9 to 96.0; after epoch 1 of 3"),
        ("worst class", "b", "recall 80.0 %, precision 100.0 %, 20 images"),
        ("confidence", "as sure as right", "calibration error 0.050; chance of 40 images: 0.093"),
        ("duration", "5 s", "from the first report to the last"),
        ("date", "2027-01-15", "08:00 UTC"),
        ("evaluated on", "40 images", "2 classes"),
    ]
    early = {"state": "finished", "reason": "train.patience=1", "error": "of an earlier start"}
    assert list_cards(Run("r", config, steps, scores, early, {}, [], []))[0].note == "epochs: 2 of 3; train.patience=1"
    page = render_report([Run("r", config, steps, scores, status, {}, [], predictions)], 224, {}, "")
    assert page.index("a &lt;reason&gt;") < page.index("<nav") < page.index("<table")


def test_the_interval_is_that_of_the_score_test():
    """Wilson's bounds are the shares from which the counted one is just 1.96 standard deviations away."""
    from resnest_imagenet.evaluation.intervals import describe_confidence, wilson_interval

    for right, count in ((0.9675, 400), (0.0, 5), (1.0, 40), (0.5, 1)):
        shares = np.linspace(0, 1, 1_000_001)
        inside = shares[np.abs(shares - right) <= 1.959964 * np.sqrt(shares * (1 - shares) / count)]
        assert wilson_interval(right, count) == pytest.approx((inside.min(), inside.max()), abs=2e-6)
    right = np.arange(1000) < 800
    for confidence, verdict in (
        (0.95, "too sure by 0.15"),
        (0.65, "not sure enough by 0.15"),
        (0.81, "as sure as right"),
    ):
        labels = np.zeros(1000, int)
        evaluation = Evaluation(labels, np.where(right, 0, 1), right, np.full(1000, confidence), np.zeros(1000))
        assert describe_confidence(evaluation) == verdict


def test_a_chart_has_few_digits_of_its_places_and_all_of_its_texts():
    from resnest_imagenet.evaluation import charts  # late: it imports matplotlib

    svg = charts.render_chart("0.123456 <b>", "x", "y", lambda axes: axes.plot([0, 1, 2], [1e-4, 3e-4, 2.123e-4]))
    assert "0.123456 &lt;b&gt;" in svg and "<b>" not in svg
    ticks = [float(text) for text in re.findall(r">(0\.\d+)</text>", svg)]
    assert len(set(ticks)) == len(ticks) and 0.0002 in ticks
    assert not re.search(r'd="[^"]*\d\.\d{3}', svg)
