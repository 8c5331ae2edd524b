"""What is refused before torch is imported: by the same words as later."""

import json
import os
import subprocess
import sys

import pytest

from conftest import compose_config
from resnest_imagenet.commands import compare, evaluate, explain, export, predict, report, tables, train
from resnest_imagenet.commands.early import refuse_early
from resnest_imagenet.config import TrainConfig
from resnest_imagenet.config_data import CheckDataConfig, ShardDataConfig, SplitDataConfig
from resnest_imagenet.config_reading import (
    CompareConfig,
    EvalConfig,
    ExplainConfig,
    ExportConfig,
    PredictConfig,
    ReportConfig,
    TablesConfig,
)
from resnest_imagenet.errors import UserError

SCHEMAS = {
    train: TrainConfig,
    evaluate: EvalConfig,
    predict: PredictConfig,
    explain: ExplainConfig,
    compare: CompareConfig,
    export: ExportConfig,
    report: ReportConfig,
    tables: TablesConfig,
}

# A command, its words, its exit code and the start of its line; SET is a data set without images, CLASSES has folders
# of classes alone, and RUN is a run folder.
REFUSED = [
    (train, "data.root=/gone", 3, "data.root=/gone: no such folder"),
    (
        train,
        "data.root=SET data.train_dir=gone",
        3,
        "SET/gone: no such folder (in SET: train, val); set data.train_dir",
    ),
    (
        train,
        "data.root=CLASSES",
        3,
        "CLASSES/train: no such folder (in CLASSES: class0, class1, class2, class3, class4 and 4 more); set "
        "data.train_dir; are these the classes? data.val_split=0.2 keeps a fifth of each for validation in "
        "training, resnest-data split makes folders of both parts",
    ),
    (
        train,
        "data.root=/gone train.batch_size=8 train.global_batch=12",
        2,
        "train.global_batch=12 is not a multiple of ",
    ),
    (train, "+experiment=demo_segmentation data.root=SET", 3, "SET/images: no such folder: is data.root=SET the data "),
    (train, "+experiment=demo_detection data.root=/gone", 3, "data.root=/gone: no such folder"),
    (evaluate, "ckpt=x.pt data.root=/gone", 3, "data.root=/gone: no such folder"),
    (evaluate, "ckpt=gone.pt data.root=SET", 4, "gone.pt: no such checkpoint"),
    (evaluate, "ckpt=resnest50 data.root=SET", 4, "resnest50: no such checkpoint; did you mean official:resnest50?"),
    (evaluate, "ckpt=RUN data.root=SET", 4, "RUN: no checkpoint in it: give a file of weights, or a run folder with "),
    (predict, "ckpt=gone.pt images=/gone", 3, "images=/gone: no such file or folder"),
    (predict, "ckpt=gone.pt images=CLASSES", 4, "gone.pt: no such checkpoint"),
    (explain, "ckpt=gone.pt images=CLASSES out=OUT", 4, "gone.pt: no such checkpoint"),
    (compare, "ckpt=[gone.pt,b.pt] images=CLASSES", 4, "gone.pt: no such checkpoint"),
    (compare, "ckpt=[gone.pt,b.pt] images=/gone", 3, "images=/gone: no such file or folder"),
    (export, "ckpt=gone.pt", 4, "gone.pt: no such checkpoint"),
    (report, "runs=/gone", 2, "runs=/gone: no such folder"),
    (tables, "results=/gone", 2, "results=/gone: no such file or run folder"),
]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("early")
    for name in ("set/train", "set/val", "run/checkpoints", *(f"classes/class{number}" for number in range(9))):
        (folder / name).mkdir(parents=True)
    for place in (folder / "classes").iterdir():
        (place / "1.jpg").touch()
    return {name.upper(): str(folder / name) for name in ("set", "run", "classes", "out")}


def fill(text, places):
    for name, path in places.items():
        text = text.replace(name, path)
    return text


def compose(command, words):
    name = "eval" if command is evaluate else command.__name__.rpartition(".")[2]
    return compose_config(name, SCHEMAS[command], *words)


@pytest.mark.slow
@pytest.mark.parametrize("row", REFUSED, ids=lambda row: row[1])
def test_the_work_refuses_the_same_by_the_same_words(row, places, tmp_path, monkeypatch):
    command, words, code, line = row
    monkeypatch.chdir(tmp_path)
    config = compose(command, fill(words, places).split())
    with pytest.raises(UserError) as early:
        refuse_early(config)
    assert early.value.exit_code == code and str(early.value).startswith(fill(line, places))
    if command is compare or (command is evaluate and code == 3):  # which read the networks first
        return
    with pytest.raises(UserError) as late:
        command.run(config)
    assert (str(late.value), type(late.value)) == (str(early.value), type(early.value))


# Calls each command in one process; prints what is then imported that takes seconds, and the lines.
CALLS = """
import contextlib, importlib, io, json, sys
lines = []
for name, words in json.loads(sys.argv[1]):
    command = importlib.import_module(name)
    sys.argv = ["resnest", *words]
    with contextlib.redirect_stderr(io.StringIO()) as text, contextlib.suppress(SystemExit):
        command.main()
    lines.append(text.getvalue())
print(json.dumps([lines, sorted({"torch", "timm", "torchvision", "matplotlib", "nvidia.dali"} & set(sys.modules))]))
"""


@pytest.mark.process
def test_nothing_is_imported_that_takes_seconds(places, tmp_path):
    rows = list({command: (words, line) for command, words, _, line in REFUSED}.items())  # one of each command
    calls = [(command.__name__, fill(words, places).split()) for command, (words, _) in rows]
    process = [sys.executable, "-c", CALLS, json.dumps(calls)]
    result = subprocess.run(process, cwd=tmp_path, env=dict(os.environ), capture_output=True, check=True)
    lines, imported = json.loads(result.stdout)
    assert imported == []
    for printed, (_, (_, line)) in zip(lines, rows, strict=True):
        assert printed.startswith(f"resnest: {fill(line, places)}") and printed.count("\n") == 1


def test_a_run_that_resumes_need_not_have_the_weights_that_it_started_from(places, tmp_path):
    words = [f"data.root={places['SET']}", "train.init_from=gone.pt", f"run_dir={tmp_path / 'run'}"]
    config = compose(train, words)
    with pytest.raises(UserError, match=r"^gone\.pt: no such checkpoint$"):
        refuse_early(config)
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    (tmp_path / "run/checkpoints/step-00000001.pt").touch()
    refuse_early(config)


@pytest.mark.parametrize(
    ("name", "schema", "words"),
    [
        ("data_check", CheckDataConfig, []),
        ("data_shard", ShardDataConfig, ["out=shards"]),
        ("data_split", SplitDataConfig, ["out=split"]),
    ],
)
def test_the_commands_about_data_refuse_a_missing_folder_early(name, schema, words):
    with pytest.raises(UserError, match=r"^data\.root=/gone: no such folder$"):
        refuse_early(compose_config(name, schema, "data.root=/gone", *words))
