"""What a run prints before its first step and after its last."""

import re
import shlex
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from conftest import ALONE, CPU, compose_config
from faulty_task import Fault
from forked import ask_to_stop
from resnest_imagenet.commands.launch import quote_place
from resnest_imagenet.config import TrainConfig
from resnest_imagenet.config_reading import PredictConfig
from resnest_imagenet.data.demo_scenes import write_demo_scenes
from resnest_imagenet.data.source import describe_counts
from resnest_imagenet.errors import Stopped
from resnest_imagenet.schemas import list_places
from resnest_imagenet.tasks.choice import open_task
from resnest_imagenet.training.describe import describe_plan, format_lines, format_seconds
from resnest_imagenet.training.dry_run import describe_run
from resnest_imagenet.training.schedule import plan_steps
from resnest_imagenet.training.state import TrainingState
from resnest_imagenet.training.train import train

SCENES = ("+experiment=demo_segmentation", "device=cpu", "train.crop=64", "train.batch_size=2", "loader.workers=0")
STEPS = "12 in 2 epochs of 6; each of 16 images: train.batch_size=16 x 1 rank x 1 pass"


def parse(text):
    return {line[:18].strip(): line[18:] for line in text.splitlines()}


def test_a_run_begins_with_its_plan_and_ends_with_its_result(tiny_run, inject, tmp_path, capsys, signals):
    """The plan is that of the dry run, but for what that has more of; a run that resumes says so first."""
    config = tiny_run("train.weight_decay=0.01", "train.cutmix_alpha=1.0")
    dry = parse(describe_run(config))
    inject(Fault(1, 1, ask_to_stop))
    with pytest.raises(Stopped):
        train(config)
    head, _, _ = capsys.readouterr().out.partition("epoch 1/2")
    plan = parse(head)
    assert plan["steps"] == STEPS and plan["network"] == "tiny, 2 classes, 210 parameters"
    assert plan["recipe"] == (
        "demo: optimizer=sgd, momentum=0.9, nesterov=true, weight_decay=0.01, label_smoothing=0.1, cutmix_alpha=1.0, "
        "precision=fp32"
    )
    assert {name: text for name, text in dry.items() if name in plan} | {"memory": ""} == plan | {"memory": ""}
    assert dry.keys() - plan.keys() == {"first batch", "disk", "start"}

    inject()
    state = train(config)
    resumed, *_, finished, best, report = capsys.readouterr().out.splitlines()
    assert resumed == "resuming after step 9, 1 epochs done"
    after = rf"accuracy {state.best:.2f} % after epoch [12] of 2; 12 steps, \d+ s since step 9"
    assert re.fullmatch(rf"finished          best {after}", finished)
    assert best == f"best network      {tmp_path}/run/checkpoints/best.pt"
    assert report == f"next              resnest-report {tmp_path}/run"  # what reads other tasks' networks is theirs

    train(config)
    assert capsys.readouterr().out == f"finished: best accuracy {state.best:.2f} %, nothing to do\n"


@pytest.mark.slow
def test_the_plan_of_each_task_draws_nothing(small_run, object_run, tmp_path):
    """Neither from torch's nor from numpy's own generator: a run that resumes is the same bit for bit."""
    write_demo_scenes(tmp_path / "scenes", seed=0, train_scenes=2, val_scenes=1)
    scenes = compose_config("train", TrainConfig, *SCENES, f"data.root={tmp_path / 'scenes'}")
    subjects = {"network", "data", "evaluation", "recipe", "steps", "learning rate", "device", "memory", "checkpoints"}
    for config, is_dry in ((small_run("loader=torchvision"), True), (object_run(), False), (scenes, False)):
        task = open_task(config)
        state = TrainingState(task.build_model(True, CPU), config.train, task.head)
        plan = plan_steps(len(task.train_set), config.train, 1)
        torch.manual_seed(7)
        np.random.seed(7)
        before = torch.get_rng_state(), np.random.get_state()[1:3]
        lines = describe_plan(task, plan, state, ALONE, is_dry)
        after = torch.get_rng_state(), np.random.get_state()[1:3]
        assert torch.equal(before[0], after[0])
        assert (before[1][0] == after[1][0]).all() and before[1][1] == after[1][1]
        assert lines.keys() >= subjects and " M parameters" in lines["network"]
        assert lines["memory"].startswith("at most ") != is_dry


def test_the_classes_with_fewest_and_most_images_are_named():
    for numbers, text in (
        ([3, 1, 2, 9], "1 (b) to 9 (d), half of the classes have 2 or more"),
        ([4, 4, 4, 4], "4 in each of 4 classes"),
        ([0, 2000, 1, 5], "0 (a) to 2,000 (b), half of the classes have 3 or more"),
    ):
        labels = np.repeat(np.arange(4), numbers)
        assert describe_counts(labels, "abcd") == text


def test_long_lines_are_broken_on_a_terminal_only(monkeypatch):
    lines = {"memory": "word " * 30 + "end", "device": "cpu"}
    flat = f"memory            {'word ' * 30}end\ndevice            cpu"
    assert format_lines(lines) == flat
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(isatty=lambda: True))
    monkeypatch.setenv("COLUMNS", "60")
    broken = format_lines(lines).splitlines()
    assert len(broken) == 5 and max(map(len, broken)) <= 60 and broken[-1] == "device            cpu"
    assert all(line.startswith(" " * 18) for line in broken[1:-1])
    assert " ".join(" ".join(broken).split()) == " ".join(flat.split())
    monkeypatch.setenv("COLUMNS", "20")  # too narrow for a table
    assert format_lines(lines) == flat


def test_times_have_two_units():
    texts = {0.4: "0 s", 7: "7 s", 59.6: "1 min 0 s", 307: "5 min 7 s", 3599.7: "1 h 0 min", 90061: "25 h 1 min"}
    assert {seconds: format_seconds(seconds) for seconds in texts} == texts


@pytest.mark.slow
def test_the_commands_at_the_end_of_a_run_compose(small_run, few_images, tmp_path, capsys):
    from resnest_imagenet.reports.runs import find_runs

    run = tmp_path / "a run"
    options = ("train.epochs=1", "train.warmup_epochs=0", "log.trackers=[]", f"data.root={few_images}")
    train(small_run(*options, run=run.name))
    *_, first, second = capsys.readouterr().out.splitlines()
    command, folder = shlex.split(first.removeprefix("next"))
    assert command == "resnest-report" and find_runs([folder], {})[0][0].name == str(run)
    command, ckpt, images = shlex.split(second)
    places = list_places(PredictConfig)
    config = compose_config("predict", PredictConfig, *(quote_place(word, places) for word in (ckpt, images)))
    assert command == "resnest-predict" and config.ckpt == str(run / "checkpoints/best.pt")
    assert config.images == [str(next(iter(sorted((few_images / "val").rglob("*.JPEG")))))]
