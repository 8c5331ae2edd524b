"""How a run starts in a folder: refused, from scratch, extended, or with what is there set aside."""

import json
import shutil

import pytest
import torch

import tiny_task
from conftest import ALONE, compose_config, newest_checkpoint
from faulty_task import Fault
from forked import ask_to_stop
from resnest_imagenet.checkpoint import load_checkpoint, save_checkpoint
from resnest_imagenet.config import TrainConfig
from resnest_imagenet.errors import CheckpointError, ConfigError, DataError, Stopped
from resnest_imagenet.tasks.choice import open_task
from resnest_imagenet.training.dry_run import describe_run
from resnest_imagenet.training.schedule import plan_steps
from resnest_imagenet.training.train import train
from run_files import assert_equal, assert_same_run, list_files, list_places, read_events, read_status

ONE_EPOCH = ("train.epochs=1", "train.warmup_epochs=0", "train.ema_decay=0.9")


def test_refusals_before_training(small_run, tmp_path):
    with pytest.raises(ConfigError, match="model.num_classes=37, but .*train has 10 classes"):
        train(small_run("model.num_classes=37"))
    with pytest.raises(DataError, match="nowhere: no such folder"):
        train(small_run("data.val_dir=nowhere"))
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="device=cuda"):
            train(small_run("device=cuda", "data.root=/nowhere"))
    assert read_status(tmp_path / "run")["state"] == "failed"
    assert not (tmp_path / "run/config.yaml").exists()
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ConfigError, match="run_dir=.*file/run: cannot be written"):
        train(small_run(run="file/run"))


def test_a_run_of_an_unknown_task_is_refused_in_one_line(tiny_run):
    line = r"^unknown train.task 'tinny'; did you mean 'tiny'\? \(classification, segmentation, detection, tiny\)$"
    with pytest.raises(ConfigError, match=line):
        tiny_run("train.task=tinny")
    config = tiny_run()
    config = config.model_copy(update={"train": config.train.model_copy(update={"task": "tinny"})})
    with pytest.raises(ConfigError, match=line):
        open_task(config)


def test_a_run_of_another_task_in_the_same_folder_is_refused(tiny_run, small_run):
    train(tiny_run(*ONE_EPOCH))
    with pytest.raises(CheckpointError, match="was trained with train.task=tiny, not classification; "):
        train(small_run(*ONE_EPOCH))


def test_another_recipe_in_the_same_folder_is_refused(tiny_run):
    train(tiny_run(*ONE_EPOCH))
    with pytest.raises(
        CheckpointError, match=r"trained with train.weight_decay=0.0001, not 0.01: choose another run_dir"
    ):
        train(tiny_run(*ONE_EPOCH, "train.weight_decay=0.01"))


def test_another_training_set_in_the_same_folder_is_refused(tiny_run):
    train(tiny_run(*ONE_EPOCH))
    tiny_task.register(num_train=110)
    with pytest.raises(CheckpointError, match=r"was trained with training images 103 -> 110: choose another run_dir"):
        train(tiny_run(*ONE_EPOCH))


def test_an_earlier_run_is_set_aside_when_asked_for_and_the_new_one_resumes(tiny_run, tmp_path, capsys):
    run = tmp_path / "run"
    train(tiny_run(*ONE_EPOCH))
    for name in ("notes.txt", "tensorboard/mine", "wandb/x"):
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_text(name)
    before = {path: content for path, (content, _) in list_files(run).items()}
    other = (*ONE_EPOCH, "seed=1", "checkpoint.on_mismatch=set_aside")
    assert train(tiny_run(*other)).step == 6
    out = capsys.readouterr().out
    assert f"was trained with seed=0, not 1: moved to {run}/earlier-1, starting from scratch" in out
    assert {path: content for path, (content, _) in list_files(run / "earlier-1").items()} == before
    assert load_checkpoint(newest_checkpoint(run / "earlier-1"))["config"]["seed"] == 0
    assert load_checkpoint(newest_checkpoint(run))["config"]["seed"] == 1
    assert not (run / "notes.txt").exists()
    train(tiny_run(*other))
    assert "finished: best accuracy " in capsys.readouterr().out
    assert not (run / "earlier-2").exists()
    train(tiny_run(*ONE_EPOCH, "seed=2", "checkpoint.on_mismatch=set_aside"))
    assert (run / "earlier-2/metrics.jsonl").exists() and (run / "earlier-1/notes.txt").exists()


def test_nothing_changes_before_a_command_is_known_to_be_of_the_run(tiny_run, tmp_path, capsys):
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    train(tiny_run(*ONE_EPOCH))
    before = list_files(run)
    with pytest.raises(CheckpointError, match=r"train\.precision=fp32, not bf16"):
        train(tiny_run(*ONE_EPOCH, "train.precision=bf16"))
    assert json.loads((run / "failed_start.json").read_text())["exit_code"] == 4
    capsys.readouterr()
    state = train(tiny_run(*ONE_EPOCH, "train.compile=true"))
    assert capsys.readouterr().out == f"finished: best accuracy {state.best:.2f} %, nothing to do\n"
    assert (state.step, list_files(run)) == (6, before)

    (run / "checkpoints").rename(elsewhere)
    before = list_files(run)
    gone = r"run/checkpoints: .* are gone \(status.json names a checkpoint after step 6\): put them back, choose "
    for _ in range(2):
        with pytest.raises(CheckpointError, match=gone):
            train(tiny_run(*ONE_EPOCH))
    (run / "checkpoints").mkdir()
    shutil.copy(elsewhere / "best.pt", run / "checkpoints")
    with pytest.raises(CheckpointError, match=gone):
        describe_run(tiny_run(*ONE_EPOCH))
    (run / "checkpoints/best.pt").unlink()
    assert list_files(run) == before
    assert train(tiny_run(*ONE_EPOCH, "checkpoint.on_mismatch=set_aside")).step == 6
    assert list_files(run / "earlier-1") == before
    assert not (run / "failed_start.json").exists()


def test_a_run_is_extended_when_asked_for_whatever_became_of_its_metrics(tiny_run, tmp_path, capsys):
    run, two = tmp_path / "run", ("train.epochs=2", "log.every_steps=2")
    train(tiny_run(*ONE_EPOCH))
    first = newest_checkpoint(run)
    older = load_checkpoint(first)
    for name in ("val images", "val labels", "val sizes", "training labels", "training sizes", "classes"):
        del older["identity"][name]
    save_checkpoint(older, first)
    way = "choose another run_dir, checkpoint.on_mismatch=extend to train this one longer, or "
    with pytest.raises(CheckpointError, match=f"train.epochs=1, not 2: {way}"):
        train(tiny_run(*ONE_EPOCH, *two))
    with pytest.raises(CheckpointError, match=r"seed=0, not 1 \(on_mismatch=extend allows only more epochs or steps\)"):
        train(tiny_run(*ONE_EPOCH, *two, "seed=1", "checkpoint.on_mismatch=extend"))
    good = (run / "metrics.jsonl").read_bytes()
    bad = [bytes(20), b'{"event": "train", "epoch": 0\xff}', b'{"event": "tra' + good.splitlines()[-1]]
    (run / "metrics.jsonl").write_bytes(b"\n".join([*good.splitlines()[:-1], *bad, b'{"cut']))
    (run / "answers.csv").unlink()
    (run / "answers.csv").mkdir()
    extended = tiny_run(*ONE_EPOCH, *two, "checkpoint.on_mismatch=extend", "checkpoint.every_steps=4")
    assert f"from {first}, extended from 1 epochs" in describe_run(extended)
    capsys.readouterr()
    whole = train(extended).state_dict(ALONE)
    printed = capsys.readouterr()
    assert "extended from 1 to 2 epochs: from here on the schedule is that of 2 epochs\n" in printed.out
    assert "not compared, because the checkpoint lacks them: training images" not in printed.out
    assert ": val images, training labels, val labels, training sizes, val sizes\n" in printed.out
    assert "metrics.jsonl: damaged lines moved to metrics.jsonl.damaged: 3\n" in printed.err
    assert (run / "metrics.jsonl").read_bytes().startswith(good)
    assert (run / "metrics.jsonl.damaged").read_bytes().splitlines() == bad
    assert (run / "answers.csv.damaged").is_dir()
    assert whole["history"] == [{"epochs": 1, "until_step": 6}]
    rates = [plan_steps(103, config.train, 1).learning_rate for config in (tiny_run(*ONE_EPOCH), extended)]
    lrs = [event["lr"] for event in read_events(run) if event["event"] == "train"]
    assert lrs == [rates[0](5), rates[1](7), rates[1](9), rates[1](11)]

    newest_checkpoint(run).unlink()  # it resumes in the middle of the second epoch, and is asked for nothing
    assert newest_checkpoint(run).stem == "step-000000008"
    assert_equal(train(tiny_run(*ONE_EPOCH, *two)).state_dict(ALONE), whole)
    with pytest.raises(CheckpointError, match=r"train\.epochs=2, not 1 \(on_mismatch=extend allows only more"):
        train(tiny_run(*ONE_EPOCH, "checkpoint.on_mismatch=extend"))


@pytest.mark.parametrize("steps", [10, 15])
def test_a_length_in_steps_is_extended_too(steps, tiny_run, inject, tmp_path, capsys, signals):
    """Its last epoch was shorter: the rest of that comes first. Then it resumes as any other run."""
    options = ("train.epochs=null", "train.warmup_epochs=0", "log.every_steps=3", "checkpoint.every_steps=2")
    train(tiny_run(*options, "train.steps=9"))
    with pytest.raises(CheckpointError, match="train.steps=9, not 1.: .*checkpoint.on_mismatch=extend to train this"):
        train(tiny_run(*options, f"train.steps={steps}"))
    seen = []
    longer = tiny_run(*options, f"train.steps={steps}", "checkpoint.on_mismatch=extend")
    inject(Fault(1, 3, lambda: seen.append("the fourth batch of the second epoch")))
    shutil.copytree(tmp_path / "run", tmp_path / "resumed")
    state = train(longer)
    assert (state.step, state.epoch, state.history) == (steps, 2 + steps // 12, [{"steps": 9, "until_step": 9}])
    printed = f"extended from 9 to {steps} steps: from here on the schedule is that of {steps} steps\n"
    assert printed in capsys.readouterr().out and len(seen) == 1
    places = list_places(read_events(tmp_path / "run"))
    assert [step for kind, _, step in places if kind == "train"] == {10: [3, 6, 9, 10], 15: [3, 6, 9, 12, 15]}[steps]
    evaluations = {10: [(1, 6), (2, 9), (2, 10)], 15: [(1, 6), (2, 9), (2, 12), (3, 15)]}[steps]
    assert [place for kind, *place in places if kind == "eval"] == [list(place) for place in evaluations]

    inject(Fault(1, 3, ask_to_stop))
    config = tiny_run(*options, f"train.steps={steps}", "checkpoint.on_mismatch=extend", run="resumed")
    with pytest.raises(Stopped):
        train(config)
    inject()
    train(config)
    assert_same_run(tmp_path / "run", tmp_path / "resumed")


def test_the_tasks_configuration_has_what_its_data_decides(tiny_run, tmp_path):
    train(tiny_run(*ONE_EPOCH))
    assert load_checkpoint(newest_checkpoint(tmp_path / "run"))["config"]["model"]["num_classes"] == 2


def test_the_shipped_configuration_is_of_classification():
    config = compose_config("train", TrainConfig, "data.root=unused")
    assert (config.train.task, config.eval.every_epochs, config.train.steps) == ("classification", 1, None)
