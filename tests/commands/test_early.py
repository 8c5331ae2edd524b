"""What is refused before torch is imported: by the same words as later."""

import json
import os
import subprocess
import sys

import pytest

from resnest_imagenet.commands import compare, evaluate, explain, export, launch, predict, report, tables, train

# A command, its words, its exit code and the start of its line; SET is a data set without images, CLASSES has folders
# of classes alone, and RUN is a run folder.
REFUSED = [
    (train, "data.root=/gone", 3, "data.root=/gone: no such folder"),
    (train, "data.root=SET data.val_dir=gone", 3, "SET/gone: no such folder (in SET: train, val); set data.val_dir"),
    (
        train,
        "data.root=CLASSES",
        3,
        "CLASSES/train: no such folder (in CLASSES: class0, class1, class2, class3, class4 and 4 more); set "
        "data.train_dir; are these the classes? resnest-data split data.root=CLASSES out=... makes train and val of them",
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


def call(command, words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["resnest", *words])
    with pytest.raises(SystemExit) as ended:
        command.main()
    return ended.value.code, capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("row", REFUSED, ids=lambda row: row[1])
def test_the_work_refuses_the_same_by_the_same_words(row, places, tmp_path, monkeypatch, capsys):
    command, words, code, line = row
    monkeypatch.chdir(tmp_path)
    words = fill(words, places).split()
    early = call(command, words, monkeypatch, capsys)
    assert early[0] == code and early[1].startswith(f"resnest: {fill(line, places)}") and early[1].count("\n") == 1
    monkeypatch.setattr(launch, "refuse_early", lambda config: None)
    late = call(command, words, monkeypatch, capsys)
    if command is not compare:  # which reads the networks first
        assert late == early


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
    calls = [(command.__name__, fill(words, places).split()) for command, words, _, _ in REFUSED]
    process = [sys.executable, "-c", CALLS, json.dumps(calls)]
    result = subprocess.run(process, cwd=tmp_path, env=dict(os.environ), capture_output=True, check=True)
    lines, imported = json.loads(result.stdout)
    assert imported == []
    for line, (_, _, _, message) in zip(lines, REFUSED, strict=True):
        assert line.startswith(f"resnest: {fill(message, places)}")


@pytest.mark.slow
def test_a_run_that_resumes_need_not_have_the_weights_that_it_started_from(places, tmp_path, monkeypatch, capsys):
    words = [f"data.root={places['SET']}", "train.init_from=gone.pt", f"run_dir={tmp_path / 'run'}"]
    assert call(train, words, monkeypatch, capsys) == (4, "resnest: gone.pt: no such checkpoint\n")
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    (tmp_path / "run/checkpoints/step-00000001.pt").touch()
    code, line = call(train, words, monkeypatch, capsys)
    assert code == 3 and "train: no class folders" in line  # the next thing that is wrong
