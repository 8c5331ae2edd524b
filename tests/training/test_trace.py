import json
import os
import signal

import pytest

from resnest_imagenet.data.folder import read_image_folder
from resnest_imagenet.data.plan import BatchPlan, plan_evaluation
from resnest_imagenet.supervision import EVALUATING, LOADING
from resnest_imagenet.training.trace import Trace


@pytest.fixture
def sets(demo_images):
    parts = {"data.train_dir": "train", "data.val_dir": "val"}
    return [read_image_folder(str(demo_images), name, option) for option, name in parts.items()]


def make_plan(sets, rank=0, batch_size=8):
    return BatchPlan(len(sets[0]), batch_size, num_batches=12, rank=rank, world_size=2, shuffle=True, seed=3)


def leave(folder, plan, place):
    """Come to a place in a process of its own, which is then killed."""
    child = os.fork()
    if child == 0:
        trace = Trace(folder)
        trace.begin(plan)
        trace.note(*place)
        os.kill(os.getpid(), signal.SIGKILL)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL


def start(folder, plan, sets, capsys):
    """Start another attempt, and return what it says of the last one."""
    with Trace(folder) as trace:
        trace.begin(plan)
        trace.report_last_attempt(*sets)
    return capsys.readouterr().err


@pytest.mark.process
def test_what_a_signal_has_ended_is_named_once_with_its_images(sets, tmp_path, capsys):
    train_set = sets[0]
    leave(tmp_path, make_plan(sets, rank=1), (4, 2, LOADING))
    files = sorted(path.name for path in tmp_path.iterdir())
    assert start(tmp_path, make_plan(sets, rank=1), sets, capsys) == "", "rank 0 speaks"
    assert sorted(path.name for path in tmp_path.iterdir()) == files
    # The next attempt may have other batches.
    line = start(tmp_path, make_plan(sets, batch_size=4), sets, capsys)
    assert line.startswith(
        "WARNING: rank 1 of the last attempt ended without a message, waiting for data in batch 3 of epoch 5; "
        "its images: "
    )
    batches = list(make_plan(sets, rank=1).batches(4, 2))[:3]  # DALI decodes ahead
    names = [train_set.name(index) for indices in batches for index in indices]
    assert ", ".join(names[:3]) in line and f"resnest-data check data.root={train_set.root.parent}" in line
    assert (tmp_path / "suspects.txt").read_text().splitlines() == names
    assert start(tmp_path, make_plan(sets), sets, capsys) == ""
    assert [path.name for path in tmp_path.iterdir()] == ["suspects.txt"]


@pytest.mark.process
def test_in_an_evaluation_they_are_the_val_images(sets, tmp_path, capsys):
    plan = make_plan(sets)
    for rank in (0, 1):
        leave(tmp_path, make_plan(sets, rank), (0, len(plan) + 1 + rank, EVALUATING))
    line = start(tmp_path, plan, sets, capsys)
    assert (
        "WARNING: rank 0, 1 of the last attempt ended without a message, evaluating after epoch 1, in batch 2; " in line
    )
    (first, *_) = plan_evaluation(len(sets[1]), 8, 0, 2).batches(0, 1)
    assert sets[1].name(first[0]) in line
    # Parts of one folder, by a list or a split, are not checked by naming it.
    leave(tmp_path, plan, (0, 0, LOADING))
    assert "resnest-data check with the run's options of data" in start(tmp_path, plan, [sets[0]] * 2, capsys)


@pytest.mark.process
def test_of_other_data_there_are_no_names(sets, tmp_path, capsys):
    leave(tmp_path, make_plan(sets[::-1]), (0, 0, LOADING))
    assert start(tmp_path, make_plan(sets), sets, capsys).endswith("waiting for data in batch 1 of epoch 1\n")


@pytest.mark.process
def test_torchrun_reads_the_place_unless_it_was_told_of_a_cause(sets, tmp_path, monkeypatch):
    file = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
    leave(tmp_path, make_plan(sets, rank=1), (0, 1, LOADING))
    message = json.loads(file.read_text())["message"]
    assert message["message"] == "rank 1 was killed by a signal, waiting for data in batch 2 of epoch 1"
    assert int(message["extraInfo"]["timestamp"]) > 0
    with Trace(tmp_path) as trace:
        trace.begin(make_plan(sets))
    assert not file.exists()
    with Trace(tmp_path) as trace:
        trace.begin(make_plan(sets))
        file.write_text("another cause")
    assert file.read_text() == "another cause"
