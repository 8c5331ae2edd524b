import ast
import fcntl
import json
import os
import re
import struct
import sys
import termios
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

import resnest_imagenet
from conftest import ALONE, CPU
from resnest_imagenet.evaluation.events import parse_events
from resnest_imagenet.evaluation.score import Score
from resnest_imagenet.training.history import resume_history
from resnest_imagenet.training.log import Report, RunLog
from resnest_imagenet.training.state import TrainingState
from resnest_imagenet.training.trackers import _read_ids
from resnest_imagenet.training.train import prepare
from run_files import read_events


def resume(path, step, epoch):
    """Return the events that remain before a state, and the files that the dropped ones name."""
    history = resume_history(path, "top1", SimpleNamespace(step=step, epoch=epoch, best=0.0))
    remaining = list(history)
    assert list(history) == remaining  # it can be read again
    return remaining, history.dropped_files


def name_files(events):
    return [name for event in events for name in event["files"]]


def test_of_damaged_files_that_is_kept_which_can_be_read(tmp_path, capsys):
    events = [
        {"event": "train", "epoch": 1, "step": step, "loss": 1.5, "files": [f"{step}.csv"], "time": 0.25}
        for step in range(1, 7)
    ]
    lines = [json.dumps(event).encode() for event in events]
    path, aside = tmp_path / "metrics.jsonl", tmp_path / "metrics.jsonl.damaged"
    damaged = [
        bytes(100),
        b"\xff\xfe",
        b"[" * 100_000,
        b"7",
        b'{"event": "train", "epoch": 0}',
        lines[1][:9] + lines[1],
    ]
    path.write_bytes(b"\n".join([lines[0], lines[0], *damaged, b"", *lines[2:5], lines[5]]))
    assert resume(path, step=5, epoch=0) == (events[:5], name_files(events[5:]))
    assert path.read_bytes() == b"".join(line + b"\n" for line in lines[:5])
    assert sorted(aside.read_bytes().splitlines()) == sorted(damaged)
    assert capsys.readouterr().err == f"WARNING: {path}: damaged lines moved to {aside.name}: 6\n"
    assert resume(path, step=2, epoch=0) == (events[:2], name_files(events[2:5]))
    assert capsys.readouterr().err == ""

    # An evaluation is of the epoch that it ends: where that is to be made again, it is dropped.
    evaluation = {**events[3], "event": "eval", "epoch": 1, "files": ["predictions.csv"]}
    write_events(path, [*events[:4], evaluation])
    assert resume(path, step=4, epoch=1) == ([*events[:4], evaluation], name_files([]))
    assert resume(path, step=4, epoch=0) == (events[:4], name_files([evaluation]))


def write_events(path, events):
    path.write_text("".join(json.dumps(event) + "\n" for event in events))


def test_epochs_are_counted_from_1_in_every_event_and_old_files_are_read_so(tmp_path):
    """Earlier versions counted the epochs of steps from 0. A run that resumes writes its file in today's way."""
    places = [("train", 0, 3), ("skipped", 0, 5), ("train", 0, 6), ("eval", 1, 6), ("train", 1, 9), ("eval", 2, 12)]
    old = [{"event": kind, "epoch": epoch, "step": step, "files": [kind], "time": 0.25} for kind, epoch, step in places]
    today = [event if event["event"] == "eval" else {**event, "epoch": event["epoch"] + 1} for event in old]
    path = tmp_path / "metrics.jsonl"
    write_events(path, old)
    assert parse_events(path) == (today, [])
    assert resume(path, step=9, epoch=1) == (today[:5], name_files(today[5:]))
    assert read_events(tmp_path) == today[:5]
    assert resume(path, step=9, epoch=1) == (today[:5], name_files([]))
    # Before the evaluation of an epoch, and where its steps are a run's last.
    assert resume(path, step=6, epoch=0) == (today[:3], name_files(today[3:5]))


@contextmanager
def terminal(monkeypatch):
    """Make stderr a terminal of 60 columns; yield what reads all that was written to it."""
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 25, 60, 0, 0))
    with os.fdopen(theirs, "w") as screen, open(ours, "rb", buffering=0) as written, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", screen)

        def read():
            print("THE END", file=screen, flush=True)  # the kernel passes it on in its own time
            text = ""
            while "THE END" not in text:
                text += written.read(10_000).decode()
            return text.partition("THE END")[0]

        yield read


def report_one_epoch(log, state):
    """Go through the first epoch and a half of the second."""
    log.start_epoch(state)
    state.step = 6
    state.end_epoch(75.0)
    log.evaluation(state, Score({"accuracy": 75.0}, "accuracy 75.00 % of 40 samples"), is_best=True)
    log.start_epoch(state)
    state.step = 9
    log.training(state, 0.1, Report({"loss": 1.25}, steps=3, seconds=6.0, waited=3.0))


@pytest.fixture
def run_log(tiny_run, tmp_path):
    config = tiny_run("log.every_steps=3")
    task, plan, _ = prepare(config)
    state = TrainingState(task.build_model(True, CPU), config.train)
    with ExitStack() as ending, RunLog(tmp_path, plan, task, state, ALONE, ending) as log:
        yield log, state


def test_a_narrow_terminal_shows_loss_and_metric(run_log, monkeypatch):
    with terminal(monkeypatch) as read:
        report_one_epoch(*run_log)
        lines = [line.strip("\n ") for line in read().split("\r")]
    assert max(map(len, lines)) <= 60
    assert any(re.fullmatch(r"epoch 2/2 \|.{8}\| 0/6, loss 1\.250, accuracy 75\.00 %.*", line) for line in lines), lines


def test_a_pipe_gets_whole_lines_that_tell_what_is_left_of_what(run_log, capsys):
    report_one_epoch(*run_log)
    printed = capsys.readouterr()
    last = "epoch 2/2, step 3/6: loss 1.250, accuracy 75.00 %, left: epoch 00:06, run 00:06, lr 0.1, 8 images/s, "
    assert (printed.out.splitlines()[-1], printed.err) == (f"{last}data wait 50%", "")


def test_damaged_names_of_trackers_are_moved_aside(tmp_path):
    for content in (bytes(50), b"[]", b'{"wandb": "x'):
        (tmp_path / "trackers.json").write_bytes(content)
        assert _read_ids(tmp_path) == {}
    assert len(list(tmp_path.glob("trackers.json.damaged*"))) == 3 and _read_ids(tmp_path) == {}


def test_no_bar_goes_into_a_pipe():
    """tqdm's own default is to write one anywhere; disable=None: to terminals only."""
    package = Path(resnest_imagenet.__file__).parent
    calls = [
        (path.name, node.lineno, {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords})
        for path in package.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "tqdm"
    ]
    assert len(calls) > 10
    assert [call for call in calls if call[2].get("disable") not in ("None", "True")] == []
