import re

import pytest
import torch

from conftest import ALONE, CPU, LAUNCHED, newest_checkpoint
from resnest_imagenet import build_model
from resnest_imagenet.checkpoint import save_checkpoint
from resnest_imagenet.commands.train import run as run_command
from resnest_imagenet.errors import CheckpointError, ConfigError, DataError
from resnest_imagenet.tasks.choice import open_task
from resnest_imagenet.training.describe import count_state_bytes
from resnest_imagenet.training.dry_run import describe_run
from resnest_imagenet.training.state import TrainingState
from resnest_imagenet.training.train import train


def parse(plan):
    return {line[:18].strip(): line[18:] for line in plan.splitlines()}


def test_the_plan_is_what_the_run_does(tiny_run, tmp_path):
    config = tiny_run()
    plan = parse(describe_run(config))
    assert not (tmp_path / "run").exists()
    assert plan["data"] == "103 training and 40 val samples"
    assert plan["steps"] == "12 in 2 epochs of 6; each of 16 images: train.batch_size=16 x 1 rank x 1 pass"
    assert plan["start"] == f"from scratch in {tmp_path / 'run'}"
    state = train(config)
    assert state.step == 12
    assert parse(describe_run(config))["start"] == f"finished: best accuracy {state.best:.2f} %, nothing to do"
    other = ("seed=3", "train.momentum=0.8")
    differences = r"was trained with train\.momentum=0\.9, not 0\.8; seed=0, not 3"
    with pytest.raises(CheckpointError, match=differences):
        describe_run(tiny_run(*other))
    aside = parse(describe_run(tiny_run(*other, "checkpoint.on_mismatch=set_aside")))["start"]
    assert re.search(f"^from scratch: .*{differences}, and is set aside$", aside)
    (tmp_path / "run/earlier-1.moving").mkdir()  # as a process leaves it that is killed while it sets the run aside
    assert parse(describe_run(config))["start"] == f"from scratch in {tmp_path / 'run'}"
    (tmp_path / "run/earlier-1.moving").rmdir()
    newest_checkpoint(tmp_path / "run").write_bytes(b"web page")
    assert parse(describe_run(config))["start"].startswith("from the one before the newest: ")


def test_a_shorter_last_epoch_is_in_the_plan(tiny_run):
    plan = parse(
        describe_run(tiny_run("train.epochs=null", "train.steps=10", "train.batch_size=8", "train.warmup_epochs=0"))
    )
    steps = "10 in 1 epoch of 12, the last of 10; each of 8 images: train.batch_size=8 x 1 rank x 1 pass"
    assert plan["steps"] == steps


@pytest.mark.slow
def test_classification_describes_its_network_its_images_and_a_first_batch(small_run):
    plan = parse(describe_run(small_run("loader=torchvision", "loader.workers=0")))
    parameters = sum(parameter.numel() for parameter in build_model("resnest14_half", 10).parameters())
    cost = "0.02 GFLOPs at 32 with 1000 classes"
    assert plan["network"] == f"resnest14_half, 10 classes, {cost}, {parameters / 1e6:.2f} M parameters"
    assert re.fullmatch("103 training and 40 val images in .*, read by torchvision", plan["data"])
    assert plan["images per class"] == "4 (disk) to 11 (checker), half of the classes have 11 or more"
    assert plan["first batch"].startswith("(16, 3, 32, 32) on cpu, after ")
    assert plan["evaluation"] == "short side 37 bilinear, centre crop 32"
    assert plan["start"].startswith("from scratch in ")


@pytest.mark.parametrize("option", ["train.ema_decay=null", "train.ema_decay=0.9"])
def test_a_checkpoint_is_as_large_as_the_plan_tells(small_run, tmp_path, option):
    task = open_task(small_run(option))
    state = TrainingState(task.build_model(True, CPU), task.config.train, task.head)
    save_checkpoint(state.state_dict(ALONE), tmp_path / "a.pt")
    with torch.device("meta"):  # as the dry run does
        planned = TrainingState(task.build_model(False, torch.device("meta")), task.config.train, task.head)
    size, parameters = count_state_bytes(planned)
    assert (size, parameters) == count_state_bytes(state)
    assert size == pytest.approx((tmp_path / "a.pt").stat().st_size, rel=0.01)
    assert parameters == sum(parameter.nbytes for parameter in state.model.parameters())


@pytest.mark.slow
def test_it_refuses_what_the_run_would(small_run, tmp_path):
    (tmp_path / "file").touch()
    for option, error, words in (
        ("model.num_classes=7", ConfigError, "model.num_classes=7"),
        ("data.root=/nowhere", DataError, "no such folder"),
        ("train.global_batch=8192", DataError, "do not fill a step"),
        ("train.global_batch=17", ConfigError, "is not a multiple"),
        ("train.init_from=/nope.pth", CheckpointError, "no such checkpoint"),
        (f"run_dir={tmp_path}/file/x", ConfigError, "cannot be written"),
    ):
        with pytest.raises(error, match=words):
            describe_run(small_run("loader=torchvision", "loader.workers=0", option))


def test_of_two_ranks_the_first_prints_and_none_writes(tiny_run, tmp_path, monkeypatch, capsys):
    """As torchrun would start them: they do not meet."""
    for rank in (0, 1):
        for name, value in {**LAUNCHED, "RANK": str(rank), "LOCAL_RANK": str(rank)}.items():
            monkeypatch.setenv(name, value)
        run_command(tiny_run("dry_run=true"))
    (steps,) = re.findall(r"^steps .*$", capsys.readouterr().out, re.MULTILINE)  # of one rank
    assert steps.endswith("each of 32 images: train.batch_size=16 x 2 ranks x 1 pass")
    assert list(tmp_path.iterdir()) == []
