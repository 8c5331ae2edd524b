"""Whole runs of the shipped configuration, shrunk."""

import inspect
import json
import os
import re
import shutil
import signal
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from conftest import ALONE, CPU, newest_checkpoint
from resnest_imagenet import build_model
from resnest_imagenet.checkpoint import load_checkpoint, save_checkpoint
from resnest_imagenet.data.augment import Augmentation
from resnest_imagenet.data.demo import write_demo_images
from resnest_imagenet.data.folder import read_image_folder
from resnest_imagenet.data.loader import build_loader
from resnest_imagenet.data.plan import BatchPlan
from resnest_imagenet.data.transforms import ERandomCrop, TrainTransform
from resnest_imagenet.data.webdataset import write_shards
from resnest_imagenet.errors import CheckpointError, ConfigError, DataError, NonFiniteError, Stopped
from resnest_imagenet.evaluation.accuracy import Evaluation
from resnest_imagenet.models.dropblock import DropBlock
from resnest_imagenet.supervision import AGREEING, BACKWARD, FORWARD, Watch
from resnest_imagenet.tasks.evaluate_checkpoint import evaluate_checkpoint
from resnest_imagenet.training import health as health_module
from resnest_imagenet.training import loop as loop_module
from resnest_imagenet.training import train as train_module
from resnest_imagenet.training.control import Control
from resnest_imagenet.training.dry_run import describe_run
from resnest_imagenet.training.health import Health
from resnest_imagenet.training.loop import train_epoch
from resnest_imagenet.training.schedule import plan_steps
from resnest_imagenet.training.state import TrainingState
from resnest_imagenet.training.stopping import SIGNALS, StopRequest
from resnest_imagenet.training.train import train

BOTH_PARTS = {"data.train_dir": "train", "data.val_dir": "val"}


def read_events(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def without_clock(events):
    return [{k: v for k, v in e.items() if k not in ("time", "images_per_s", "data_wait")} for e in events]


def read_scalars(folder):
    """Return all of TensorBoard's points but those of the clock, as (step, value) by name."""
    scalars = EventAccumulator(str(folder / "tensorboard"))
    scalars.Reload()
    names = scalars.Tags()["scalars"]
    clock = ("train/images_per_s", "train/data_wait")
    return {name: [(s.step, s.value) for s in scalars.Scalars(name)] for name in names if name not in clock}


def assert_equal(one, other):
    """Compare nested plain containers bit for bit."""
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_equal(one[key], other[key])
    elif isinstance(one, list):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_equal(a, b)
    else:
        assert one == other


@pytest.mark.parametrize("loader", ["dali", "torchvision"])
def test_a_run_leaves_what_it_promises_and_evaluates_to_the_same_number(
    loader, small_run, evaluation_of, tmp_path, capsys
):
    config = small_run(f"loader={loader}", "log.every_steps=4", "train.mixup_alpha=0.2", "protocol=full")
    state = train(config)
    run = tmp_path / "run"
    assert (state.epoch, state.step) == (2, 12)

    events = read_events(run)
    assert [(e["event"], e["epoch"], e["step"]) for e in events] == [
        ("train", 0, 4), ("train", 0, 6), ("eval", 1, 6), ("train", 1, 8), ("train", 1, 12), ("eval", 2, 12),
    ]  # fmt: skip
    first = events[0]
    assert first["images_per_s"] > 0 and 0 <= first["data_wait"] <= 1 and 1.5 < first["loss"] < 5
    assert first["lr"] == pytest.approx(0.4 * 16 / 256 * 3 / 6)
    protocol = "short side 32 bilinear, centre crop 32"
    assert [e["protocol"] for e in events if e["event"] == "eval"] == [protocol] * 2
    assert capsys.readouterr().out.count(f"of 40 images ({protocol})") == 2

    status = json.loads((run / "status.json").read_text())
    assert status["state"] == "finished" and status["step"] == 12
    environment = json.loads((run / "environment.json").read_text())
    assert environment["packages"]["torch"] == torch.__version__.partition("+")[0]
    assert "resnest14_half" in (run / "config.yaml").read_text()

    logged = [(e["step"], pytest.approx(e["loss"])) for e in events if e["event"] == "train"]
    assert read_scalars(run)["train/loss"] == logged

    checkpoint = load_checkpoint(newest_checkpoint(run))
    assert_equal(checkpoint["model"], state.model.state_dict())
    assert not list((run / "checkpoints").glob("*.tmp"))
    (result,) = evaluate_checkpoint(evaluation_of(newest_checkpoint(run), f"loader={loader}", "protocol=full"))
    assert (result.top1, result.top5, result.count) == (events[-1]["top1"], events[-1]["top5"], 40)
    best = max(e["top1"] for e in events if e["event"] == "eval")
    (result,) = evaluate_checkpoint(evaluation_of(run / "checkpoints/best.pt", f"loader={loader}", "protocol=full"))
    assert result.top1 == best == state.best_top1


@pytest.fixture
def signals():
    """Give back the signals that a stopped run leaves ignored: its process would have ended."""
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("loader", ["dali", "torchvision"])
def test_the_same_command_goes_on_bit_for_bit(loader, small_run, tmp_path, monkeypatch, capsys, signals):
    """Stopped amid an epoch, after the last step of one, amid an evaluation; and interrupted, which loses steps."""
    options = (f"loader={loader}", "train.ema_decay=0.9", "train.dropout=0.2", "train.mixup_alpha=0.2")
    # At 48 pixels layer3's maps hold one 3x3 block.
    options += ("train.dropblock=0.2", "train.crop=48", "train.mixup_per_sample=true", "train.mixup_partner=permuted")
    options += ("train.policy=resnest", "train.jitter=0.4", "train.lighting=0.1", "train.erasing=0.5")
    options += ("train.cutmix_alpha=1.0", "train.batch_size=8", "train.global_batch=16", "log.every_steps=5")
    options += ("checkpoint.every_steps=3", "checkpoint.keep=2")
    train(small_run(*options, run="whole"))
    real_loss, real_evaluate = loop_module.compute_loss, train_module.evaluate

    def at_batch(epoch, number, act):
        def compute_loss(*args):
            if args[-2:] == (epoch, number):
                act()
            return real_loss(*args)

        monkeypatch.setattr(loop_module, "compute_loss", compute_loss)

    def ask_to_stop():
        os.kill(os.getpid(), signal.SIGTERM)

    def interrupt():
        raise KeyboardInterrupt

    def stops_at(step, state="stopped"):
        with pytest.raises((Stopped, KeyboardInterrupt)):
            train(small_run(*options, run="stopped"))
        monkeypatch.undo()
        status = json.loads((tmp_path / "stopped/status.json").read_text())
        assert status["state"] == "stopped"
        assert load_checkpoint(newest_checkpoint(tmp_path / "stopped"))["step"] == step
        return status

    at_batch(0, 1, ask_to_stop)  # the second of step 1's two batches: read at the end of the next step
    assert stops_at(2)["exit_code"] == 75
    at_batch(0, 5, ask_to_stop)  # after this step comes a checkpoint anyway
    stops_at(3)
    at_batch(0, 11, ask_to_stop)
    stops_at(6)
    monkeypatch.setattr(train_module, "evaluate", lambda *args: (ask_to_stop(), real_evaluate(*args)))
    stops_at(6)
    at_batch(1, 10, interrupt)
    assert stops_at(9)["exit_code"] == 130
    train(small_run(*options, run="stopped"))

    printed = capsys.readouterr().out
    assert "resuming after step 9, 1 epochs done" in printed
    assert "nan" not in printed  # of the loss, where the last report was of the process before
    whole, resumed = (load_checkpoint(newest_checkpoint(tmp_path / run)) for run in ("whole", "stopped"))
    assert whole.pop("config")["run_dir"] != resumed.pop("config")["run_dir"]
    assert_equal(whole, resumed)
    assert without_clock(read_events(tmp_path / "whole")) == without_clock(read_events(tmp_path / "stopped"))
    assert read_scalars(tmp_path / "whole") == read_scalars(tmp_path / "stopped")
    names = [path.name for path in sorted((tmp_path / "stopped/checkpoints").iterdir())]
    assert names == ["best.pt", "step-000000009.pt", "step-000000012.pt"]


@pytest.mark.parametrize("loader", ["dali", "torchvision"])
def test_a_run_on_shards_is_the_run_on_the_folder_and_goes_on(
    loader, small_run, demo_images, evaluation_of, tmp_path, monkeypatch
):
    write_shards(str(demo_images), BOTH_PARTS, tmp_path / "shards", 30, shuffle=False)
    shards = ("data=webdataset", f"data.root={tmp_path / 'shards'}")
    train(small_run(f"loader={loader}", run="folder"))
    real = train_module.train_epoch

    def interrupt_second_epoch(state, *rest):
        if state.epoch == 1:
            raise KeyboardInterrupt
        real(state, *rest)

    monkeypatch.setattr(train_module, "train_epoch", interrupt_second_epoch)
    with pytest.raises(KeyboardInterrupt):
        train(small_run(f"loader={loader}", *shards, run="shards"))
    monkeypatch.undo()
    train(small_run(f"loader={loader}", *shards, run="shards"))
    runs = [tmp_path / "folder", tmp_path / "shards"]
    assert without_clock(read_events(runs[0])) == without_clock(read_events(runs[1]))
    one, other = (load_checkpoint(newest_checkpoint(run)) for run in runs)
    assert_equal(one["model"], other["model"])
    assert one["classes"] == other["classes"]
    with pytest.raises(CheckpointError, match="was trained with data.shuffle_shards=None, not 2"):
        train(small_run(f"loader={loader}", *shards, "data.shuffle_shards=2", run="shards"))
    (result,) = evaluate_checkpoint(evaluation_of(newest_checkpoint(runs[1]), *shards, f"loader={loader}"))
    assert (result.top1, result.count) == (read_events(runs[0])[-1]["top1"], 40)


def test_bad_images_end_a_run_or_are_replaced_as_asked(small_run, demo_images, tmp_path, monkeypatch, capsys):
    """A run that they ended goes on with on_error=substitute, and both loaders then agree about the labels."""
    shutil.copytree(demo_images, tmp_path / "data")
    bad = sorted((tmp_path / "data/train").rglob("*.JPEG"))[::20]
    for path in bad:
        path.write_bytes(b"<html>")
    root = f"data.root={tmp_path / 'data'}"
    with pytest.raises(DataError, match="JPEG: not a readable image"):
        train(small_run(root, "loader=torchvision", run="torchvision"))
    seen = {"dali": [], "torchvision": []}
    real = loop_module.compute_loss
    for loader, labels in seen.items():
        monkeypatch.setattr(
            loop_module, "compute_loss", lambda *args, out=labels: (out.append(args[2]), real(*args))[1]
        )
        train(small_run(root, f"loader={loader}", "data.on_error=substitute", run=loader))
        assert {line.partition(": ")[0] for line in capsys.readouterr().err.splitlines()} == {str(path) for path in bad}
    assert_equal(*seen.values())
    with pytest.raises(DataError, match="bad image number 3, data.max_errors=2"):
        train(small_run(root, "data.on_error=substitute", "data.max_errors=2"))


def test_shuffling_by_shards_reaches_the_plan(small_run, demo_images, tmp_path, monkeypatch):
    write_shards(str(demo_images), BOTH_PARTS, tmp_path / "shards", 30, shuffle=False)
    plans = []
    monkeypatch.setattr(train_module, "BatchPlan", lambda **values: plans.append(BatchPlan(**values)) or plans[-1])
    train(small_run("data=webdataset", f"data.root={tmp_path / 'shards'}", "data.shuffle_shards=2"))
    assert (plans[0].shard_sizes, plans[0].shuffle_shards) == ((30, 30, 30, 13), 2)


def test_another_recipe_in_the_same_folder_is_refused(small_run):
    train(small_run("train.epochs=1", "train.warmup_epochs=0"))
    with pytest.raises(
        CheckpointError, match=r"trained with train.weight_decay=0.0001, not 0.01: choose another run_dir"
    ):
        train(small_run("train.epochs=1", "train.warmup_epochs=0", "train.weight_decay=0.01"))
    # The best accuracy so far would be compared with one of another protocol.
    with pytest.raises(CheckpointError, match="trained with evaluation=short side 37 bilinear, centre crop 32, not "):
        train(small_run("train.epochs=1", "train.warmup_epochs=0", "protocol=full"))


def test_an_earlier_run_is_set_aside_when_asked_for_and_then_the_new_one_goes_on(small_run, tmp_path, capsys):
    train(small_run("train.epochs=1", "train.warmup_epochs=0"))
    before = (tmp_path / "run/metrics.jsonl").read_text()
    other = ("train.epochs=1", "train.warmup_epochs=0", "seed=1", "checkpoint.on_mismatch=set_aside")
    assert train(small_run(*other)).step == 6
    out = capsys.readouterr().out
    assert f"was trained with seed=0, not 1: moved to {tmp_path}/run/earlier-1, starting from scratch" in out
    assert (tmp_path / "run/earlier-1/metrics.jsonl").read_text() == before
    assert load_checkpoint(newest_checkpoint(tmp_path / "run/earlier-1"))["config"]["seed"] == 0
    assert load_checkpoint(newest_checkpoint(tmp_path / "run"))["config"]["seed"] == 1
    train(small_run(*other))
    assert "finished: best top-1 " in capsys.readouterr().out
    assert not (tmp_path / "run/earlier-2").exists()


def test_a_signal_before_the_first_step_stops_at_once(small_run, tmp_path, monkeypatch, signals):
    def open_source(*args):
        os.kill(os.getpid(), signal.SIGUSR1)

    monkeypatch.setattr(train_module, "open_source", open_source)
    with pytest.raises(Stopped, match="SIGUSR1: stopped before the first step"):
        train(small_run())
    status = json.loads((tmp_path / "run/status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("stopped", 75)


def test_bad_images_are_remembered_when_a_run_goes_on(small_run, demo_images, tmp_path, capsys):
    shutil.copytree(demo_images, tmp_path / "data")
    bad = sorted((tmp_path / "data/train").rglob("*.JPEG"))[::20]
    for path in bad:
        path.write_bytes(b"")
    options = (f"data.root={tmp_path / 'data'}", "data.on_error=substitute", f"data.max_errors={len(bad)}")
    options += ("loader=torchvision", "train.warmup_epochs=0")
    train(small_run(*options))
    assert capsys.readouterr().err.count("; replaced by ") == len(bad)
    newest_checkpoint(tmp_path / "run").unlink()
    (known,) = load_checkpoint(newest_checkpoint(tmp_path / "run"))["bad_images"]
    assert len(known) >= 4  # the others are in what the first epoch leaves out
    train(small_run(*options))
    captured = capsys.readouterr()
    assert "resuming after step 6" in captured.out
    assert captured.err.count("; replaced by ") == len(bad) - len(known)
    assert load_checkpoint(newest_checkpoint(tmp_path / "run"))["bad_images"] == [list(range(0, 103, 20))]


def test_a_checkpoint_names_all_that_the_future_depends_on(small_run, tmp_path):
    train(small_run("train.epochs=1", "train.warmup_epochs=0", "train.ema_decay=0.9"))
    saved = load_checkpoint(newest_checkpoint(tmp_path / "run"))
    state = {"model", "ema", "ema_updates", "optimizer", "scaler", "step", "epoch", "best_top1", "skipped"}
    state |= {"loss_sums", "steps_summed", "bad_images", "history"}
    assert saved.keys() == state | {"identity", "circumstances", "config", "classes"}
    assert saved["identity"]["training images"].startswith("103 ")
    assert saved["identity"]["train.global_batch"] == 16
    assert saved["circumstances"]["ranks"] == 1 and saved["circumstances"]["torch"] == torch.__version__.split("+")[0]


def test_in_fp16_a_scale_below_1_is_no_excuse(small_run):
    config = small_run("train.precision=fp16")
    state = TrainingState(nn.Sequential(nn.Linear(2, 2)), config.train)
    for scale, is_sound in ((2.0, True), (0.5, False)):
        state.scaler.load_state_dict({**state.scaler.state_dict(), "scale": scale})
        with Health(state, config.train) as health:
            state.scaler.scale(state.model(torch.full((1, 2), torch.inf)).sum()).backward()
            assert health.judge(0.1, False, ALONE) == 1
            if is_sound:
                assert [(each.is_skipped, each.unsound) for each in health.read()] == [(False, [])]
            else:
                with pytest.raises(NonFiniteError, match="the sum over the ranks: .* at step 1, learning rate 0.1;"):
                    list(health.read())
            state.scaler.update()
            state.optimizer.zero_grad()


def test_every_option_of_the_recipe_reaches_its_place(small_run, monkeypatch):
    """Two runs that lose the same option are equal: so what each part is given is looked at, all off their defaults."""
    seen = {}

    def spy(module, name):
        real = getattr(module, name)

        def call(*args, **kwargs):
            seen[name] = inspect.signature(real).bind(*args, **kwargs).arguments
            return real(*args, **kwargs)

        monkeypatch.setattr(module, name, call)

    for name in ("build_model", "TrainTransform", "dropblock_probability"):
        spy(train_module, name)
    for name in ("draw_mixup", "draw_cutmix", "erase_rectangles", "smoothed_cross_entropy"):
        spy(loop_module, name)
    spy(DropBlock, "set_probability")
    options = {"dropblock": 0.3, "mixup_alpha": 0.7, "mixup_per_sample": True, "mixup_partner": "permuted"}
    options |= {"label_smoothing": 0.17, "init": "fan_out", "zero_gamma": False, "dropout": 0.13, "crop": 40}
    options |= {"min_crop_area": 0.6, "antialias": True, "interpolation": "bicubic", "cropping": "erandom"}
    options |= {"policy": "rotation", "jitter": 0.21, "lighting": 0.22, "pixel_shift": 3, "erasing": 0.23}
    options |= {"cutmix_alpha": 0.8, "decay_all": True, "weight_decay": 0.003, "momentum": 0.8}
    overrides = [f"train.{name}={value}" for name, value in options.items()]
    state = train(small_run("train.epochs=1", "train.warmup_epochs=0", "train.nesterov=false", *overrides))
    assert seen["set_probability"]["probability"] == 0.3
    assert [seen["draw_mixup"][name] for name in ("alpha", "per_sample", "partner")] == [0.7, True, "permuted"]
    assert seen["smoothed_cross_entropy"]["smoothing"] == 0.17
    assert seen["smoothed_cross_entropy"]["targets"].shape == (16, 10)
    built = seen["build_model"]
    assert (built["dropout"], built["zero_gamma"], built["init"]) == (0.13, False, "fan_out")
    cropping, look = ERandomCrop(40, 0.6), Augmentation("rotation", 0.21, 0.22, 3)
    assert list(seen["TrainTransform"].values()) == [40, 0, cropping, True, "bicubic", look]
    assert (seen["draw_cutmix"]["alpha"], seen["draw_cutmix"]["partner"]) == (0.8, "permuted")
    assert seen["erase_rectangles"]["probability"] == 0.23
    groups = state.optimizer.param_groups
    assert [(g["weight_decay"], g["momentum"], g["nesterov"]) for g in groups] == [(0.003, 0.8, False)] * 2


def test_fine_tuning_starts_from_a_backbone_and_does_not_read_it_again(small_run, tmp_path, capsys):
    source = tmp_path / "imagenet.safetensors"
    backbone = build_model("resnest14_half", 1000, zero_gamma=False)
    save_checkpoint(backbone.state_dict(), source)
    # A step of almost nothing leaves the weights where they started.
    options = (f"train.init_from={source}", "train.epochs=1", "train.lr=1e-9", "train.warmup_epochs=0")
    state = train(small_run(*options, "model.num_classes=10", "train.ema_decay=0.5"))
    torch.testing.assert_close(state.model.layer4[0].conv1.weight, backbone.layer4[0].conv1.weight)
    torch.testing.assert_close(state.ema.module.layer4[0].conv1.weight, backbone.layer4[0].conv1.weight)
    assert state.model.fc.out_features == 10
    assert f"starting from {source}, with a new classifier of 10 classes" in capsys.readouterr().out
    source.unlink()
    assert train(small_run(*options, "model.num_classes=10", "train.ema_decay=0.5")).step == 6
    with pytest.raises(CheckpointError, match="trained with train.init_from=.*imagenet.safetensors, not None"):
        train(small_run("train.epochs=1", "train.lr=1e-9", "train.warmup_epochs=0", "train.ema_decay=0.5"))

    again = small_run(*options, f"train.init_from={tmp_path}/run/checkpoints/best.pt", run="again")
    torch.testing.assert_close(train(again).model.fc.weight, state.ema.module.fc.weight)
    assert "best.pt, its classifier too" in capsys.readouterr().out


def list_files(run):
    """Return content and time of all files of a run, but for those about the process or the last start."""
    files = [path for path in run.rglob("*") if path.is_file() and path.name not in ("lock", "failed_start.json")]
    return {path.relative_to(run): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


ONE_EPOCH = ("loader=torchvision", "train.epochs=1", "train.warmup_epochs=0", "train.ema_decay=0.9")


def test_nothing_changes_before_a_command_is_known_to_be_of_the_run(small_run, tmp_path, capsys):
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    train(small_run(*ONE_EPOCH))
    before = list_files(run)
    with pytest.raises(CheckpointError, match=r"train\.precision=fp32, not bf16"):
        train(small_run(*ONE_EPOCH, "train.precision=bf16"))
    assert json.loads((run / "failed_start.json").read_text())["exit_code"] == 4
    capsys.readouterr()
    state = train(small_run(*ONE_EPOCH, "train.compile=true"))
    assert capsys.readouterr().out == f"finished: best top-1 {state.best_top1:.2f} %, nothing to do\n"
    assert (state.step, list_files(run)) == (6, before)

    (run / "checkpoints").rename(elsewhere)
    before = list_files(run)
    gone = r"run/checkpoints: .* are gone \(status.json tells of a checkpoint after step 6\): put them back, choose "
    for _ in range(2):
        with pytest.raises(CheckpointError, match=gone):
            train(small_run(*ONE_EPOCH))
    (run / "checkpoints").mkdir()
    shutil.copy(elsewhere / "best.pt", run / "checkpoints")
    with pytest.raises(CheckpointError, match=gone):
        describe_run(small_run(*ONE_EPOCH))
    (run / "checkpoints/best.pt").unlink()
    assert list_files(run) == before
    assert train(small_run(*ONE_EPOCH, "checkpoint.on_mismatch=set_aside")).step == 6
    assert list_files(run / "earlier-1") == before
    assert not (run / "failed_start.json").exists()


def test_a_run_that_died_before_its_first_checkpoint_begins_again(small_run, tmp_path, monkeypatch, capsys):
    train(small_run(*ONE_EPOCH, "log.every_steps=1", run="whole"))
    died = tmp_path / "died"

    def die(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(Control, "save", die)
    for _ in range(2):  # the second time there are the events, and the predictions, of the first
        with pytest.raises(KeyboardInterrupt):
            train(small_run(*ONE_EPOCH, "log.every_steps=1", run="died"))
        assert {path.name for path in died.iterdir()} >= {"metrics.jsonl", "predictions.csv", "config.yaml"}
        (died / "status.json").write_text('{"state": "running", "saved_step": null}')  # as a kill leaves it
    monkeypatch.undo()
    train(small_run(*ONE_EPOCH, "log.every_steps=1", run="died"))
    assert without_clock(read_events(died)) == without_clock(read_events(tmp_path / "whole"))


def test_a_run_is_extended_when_asked_for_whatever_became_of_its_metrics(small_run, tmp_path, capsys):
    run, two = tmp_path / "run", ("train.epochs=2", "log.every_steps=2")
    train(small_run(*ONE_EPOCH))
    first = newest_checkpoint(run)
    older = load_checkpoint(first)
    for name in ("val images", "val labels", "val sizes", "training labels", "training sizes", "classes"):
        del older["identity"][name]
    del older["history"]
    save_checkpoint(older, first)
    way = "choose another run_dir, checkpoint.on_mismatch=extend to train this one longer, or "
    with pytest.raises(CheckpointError, match=f"train.epochs=1, not 2: {way}"):
        train(small_run(*ONE_EPOCH, *two))
    with pytest.raises(CheckpointError, match=r"seed=0, not 1 \(on_mismatch=extend is for more epochs, and for "):
        train(small_run(*ONE_EPOCH, *two, "seed=1", "checkpoint.on_mismatch=extend"))
    good = (run / "metrics.jsonl").read_bytes()
    bad = [bytes(20), b'{"event": "train", "epoch": 0\xff}', b'{"event": "tra' + good.splitlines()[-1]]
    (run / "metrics.jsonl").write_bytes(b"\n".join([*good.splitlines()[:-1], *bad, b'{"cut']))
    (run / "predictions.csv").unlink()
    (run / "predictions.csv").mkdir()
    extended = small_run(*ONE_EPOCH, *two, "checkpoint.on_mismatch=extend", "checkpoint.every_steps=4")
    assert f"from {first}, extended from 1 epochs" in describe_run(extended)
    capsys.readouterr()
    whole = train(extended).state_dict(ALONE)
    printed = capsys.readouterr()
    assert "extended from 1 to 2 epochs: from here on the schedule is that of 2 epochs\n" in printed.out
    assert "not compared, as the checkpoint does not tell them: training images" not in printed.out
    assert ": val images, training labels, val labels, training sizes, val sizes\n" in printed.out
    assert "metrics.jsonl: damaged lines moved to metrics.jsonl.damaged: 3\n" in printed.err
    assert (run / "metrics.jsonl").read_bytes().startswith(good)
    assert (run / "metrics.jsonl.damaged").read_bytes().splitlines() == bad
    assert (run / "predictions.csv.damaged").is_dir()
    assert whole["history"] == [{"epochs": 1, "until_step": 6}]
    rates = [plan_steps(103, config.train, 1).learning_rate for config in (small_run(*ONE_EPOCH), extended)]
    lrs = [event["lr"] for event in read_events(run) if event["event"] == "train"]
    assert lrs == [rates[0](5), rates[1](7), rates[1](9), rates[1](11)]

    newest_checkpoint(run).unlink()  # it resumes in the middle of the second epoch, and is asked for nothing
    assert newest_checkpoint(run).stem == "step-000000008"
    assert_equal(train(small_run(*ONE_EPOCH, *two)).state_dict(ALONE), whole)
    with pytest.raises(CheckpointError, match=r"train\.epochs=2, not 1 \(on_mismatch=extend is for more"):
        train(small_run(*ONE_EPOCH, "checkpoint.on_mismatch=extend"))


def test_another_training_set_in_the_same_folder_is_refused(small_run, tmp_path):
    train(small_run("train.epochs=1", "train.warmup_epochs=0"))
    write_demo_images(tmp_path / "other", seed=1, train_per_class=11, val_per_class=4)
    with pytest.raises(
        CheckpointError, match=r"was trained with training images 103 -> 110; 40 val images of other names: "
    ):
        train(small_run("train.epochs=1", "train.warmup_epochs=0", f"data.root={tmp_path / 'other'}"))


def test_accumulated_gradients_are_the_mean_over_the_whole_batch(small_run, demo_images):
    """Without batch norm, whose statistics are of one batch: a linear network, one step of 16 and of 2 x 8 images."""
    weights = []
    for batch_size in (16, 8):
        config = small_run(f"train.batch_size={batch_size}", "train.global_batch=16", "train.warmup_epochs=0")
        train_set = read_image_folder(str(demo_images), "train", "data.train_dir")
        plan = replace(plan_steps(len(train_set), config.train, 1), steps_per_epoch=1)
        batches = BatchPlan(len(train_set), batch_size, plan.accumulation, shuffle=True)
        loader = build_loader("torchvision", train_set, batches, TrainTransform(32, seed=0), CPU, 0)
        torch.manual_seed(0)
        network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10))
        state = TrainingState(network, config.train)
        initial = network[1].weight.detach().clone()
        log = SimpleNamespace(start_epoch=id, is_due=lambda _: False, advance=lambda: None, wants_samples=False)
        with Health(state, config.train) as health:
            control = Control(ALONE, Watch(ALONE, 60, print), StopRequest(), health, log, None, 1000)
            train_epoch(state, network, loader, plan, config.train, 0, control)
        assert state.step == 1
        weights.append(network[1].weight.detach() - initial)
    assert weights[0].abs().max() > 1e-3
    torch.testing.assert_close(weights[0], weights[1], rtol=0, atol=1e-6)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_reduced_precision_keeps_float32_weights(precision, small_run, tmp_path):
    state = train(small_run(f"train.precision={precision}", "train.epochs=1", "train.warmup_epochs=0"))
    assert {p.dtype for p in state.model.parameters()} == {torch.float32}
    assert state.scaler.is_enabled() == (precision == "fp16")
    assert 1.5 < read_events(tmp_path / "run")[0]["loss"] < 6


@pytest.mark.skipif(not shutil.which("c++"), reason="torch.compile needs a C++ compiler on a CPU")
def test_a_compiled_run_has_the_plain_keys_and_goes_on_bit_for_bit(small_run, tmp_path, capsys):
    config = small_run("train.compile=true", "checkpoint.every_steps=4", "checkpoint.keep=9")
    whole = train(config).state_dict(ALONE)
    assert re.search(r"^compiled in \d+ s$", capsys.readouterr().out, re.MULTILINE)
    assert whole["model"].keys() == build_model(config.model.name, 10).state_dict().keys()
    saved = sorted((tmp_path / "run/checkpoints").glob("step-*.pt"))
    assert [path.stem for path in saved] == [f"step-{step:09}" for step in (4, 6, 8, 12)]
    for path in saved[1:]:
        path.unlink()
    assert_equal(train(config).state_dict(ALONE), whole)
    assert "resuming after step 4" in capsys.readouterr().out


@pytest.mark.parametrize("loader", ["dali", "torchvision"])
def test_a_run_is_compiled_once_before_its_first_step(loader, small_run, graphs, monkeypatch):
    compiled = []
    monkeypatch.setattr(train_module, "train_epoch", lambda *args: compiled.append(graphs.frame_count) or loop(*args))
    loop = train_epoch
    options = ("train.epochs=1", "train.warmup_epochs=0", "train.crop=48", "train.batch_size=8", "train.erasing=0.5")
    options += ("train.global_batch=16", "train.mixup_alpha=0.2", "train.cutmix_alpha=1.0", "train.dropblock=0.2")
    train(small_run("train.compile=true", f"loader={loader}", "train.precision=bf16", *options))
    assert (compiled, graphs.frame_count) == ([1], 1)


def test_the_moving_average_is_what_is_evaluated(small_run, evaluation_of, tmp_path):
    state = train(small_run("train.ema_decay=0.5"))
    last = newest_checkpoint(tmp_path / "run")
    logged = read_events(tmp_path / "run")[-1]["top1"]
    assert evaluate_checkpoint(evaluation_of(last))[0].top1 == logged
    saved = load_checkpoint(last)
    assert saved["ema_updates"] == 12
    assert_equal(saved["ema"], state.ema.module.state_dict())
    assert not torch.equal(saved["ema"]["fc.weight"], saved["model"]["fc.weight"])


def test_an_evaluation_that_is_not_finite_stops_the_run(small_run, tmp_path):
    """Losses are finite, with each batch's own statistics; those of evaluation have no square root."""
    model = build_model("resnest14_half", 10)
    torch.nn.init.constant_(model.bn1.running_var, -1e9)
    torch.save(model.state_dict(), tmp_path / "bare.pth")
    with pytest.raises(
        NonFiniteError, match=r"checker_0_00000\.JPEG: its logits are not finite in fp32, like .* 40 of 40"
    ):
        train(small_run(f"train.init_from={tmp_path}/bare.pth", "train.epochs=1", "train.warmup_epochs=0"))
    status = json.loads((tmp_path / "run/status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", 5)
    assert not list((tmp_path / "run/checkpoints").iterdir())


def test_a_loss_that_is_not_finite_stops_the_run(small_run, tmp_path):
    with pytest.raises(NonFiniteError, match="rank 0: loss or gradient not finite at step 2, learning rate 6.144e.28"):
        train(small_run("train.lr=1e30", "train.warmup_epochs=0"))
    status = json.loads((tmp_path / "run/status.json").read_text())
    assert status["state"] == "failed" and "not finite at step" in status["error"]
    assert status["exit_code"] == 5


@pytest.fixture
def bad_losses(monkeypatch):
    """Make the losses of batches not finite: (epoch, number of the batch over all ranks)."""

    def install(*places):
        real = loop_module.compute_loss

        def bad(*args):
            return real(*args) * (torch.nan if args[-2:] in places else 1.0)

        monkeypatch.setattr(loop_module, "compute_loss", bad)

    return install


def test_what_is_skipped_does_not_depend_on_when_it_is_read(small_run, tmp_path, bad_losses):
    """At the end of the next step, before a report, or at once; the first step of the run among them."""
    bad_losses((0, 0), (0, 3), (1, 1))
    options = ("train.max_skipped_steps=3", "train.ema_decay=0.9", "log.every_steps=4", "checkpoint.keep=20")
    options += ("train.dropout=0.2", "train.lr=0.8")
    for name, steps in (("late", 1000), ("at_once", 1)):
        train(small_run(*options, f"checkpoint.every_steps={steps}", run=name))
    late, at_once = (load_checkpoint(newest_checkpoint(tmp_path / run)) for run in ("late", "at_once"))
    assert late.pop("config")["run_dir"] != at_once.pop("config")["run_dir"]
    assert (late["skipped"], late["ema_updates"]) == (3, 9)
    assert_equal(late, at_once)
    events = read_events(tmp_path / "late")
    assert without_clock(events) == without_clock(read_events(tmp_path / "at_once"))
    assert [(e["event"], e["epoch"], e["step"]) for e in events] == [
        ("skipped", 0, 1), ("skipped", 0, 4), ("train", 0, 4), ("train", 0, 6), ("eval", 1, 6),
        ("skipped", 1, 8), ("train", 1, 8), ("train", 1, 12), ("eval", 2, 12),
    ]  # fmt: skip
    first = load_checkpoint(tmp_path / "at_once/checkpoints/step-000000001.pt")
    assert (first["ema_updates"], first["steps_summed"], first["loss_sums"]) == (0, 0, [0.0])
    assert not any(each["momentum_buffer"].any() for each in first["optimizer"]["state"].values())
    moved = [name for name, value in first["model"].items() if "running_mean" in name and value.any()]
    assert not moved and not torch.equal(first["model"]["fc.weight"], late["model"]["fc.weight"])


def test_a_run_that_ends_with_a_step_names_it_and_saves_nothing_after_it(small_run, tmp_path, bad_losses):
    bad_losses((0, 1), (0, 3))
    options = ("train.max_skipped_steps=1", "train.warmup_epochs=0", "checkpoint.every_steps=5", "log.every_steps=100")
    with pytest.raises(NonFiniteError, match=r"rank 0: .* at step 4, learning rate 0.02134;.*\(number 2, .*steps=1\)"):
        train(small_run(*options))
    assert [(e["event"], e["step"]) for e in read_events(tmp_path / "run")] == [("skipped", 2)]
    assert not list((tmp_path / "run/checkpoints").glob("*.pt"))


HOST_READS = {"tolist", "numpy", "item", "cpu", "nonzero", "unique", "masked_select", "is_nonzero", "equal"}
HOST_READS |= {"__array__", "__bool__", "__contains__", "__float__", "__index__", "__int__", "__repr__"}


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("device", ["cpu", *["cuda"] * torch.cuda.is_available()])
def test_between_reports_the_host_reads_only_what_came_of_the_step_before(device, precision, small_run, monkeypatch):
    """Whatever it reads of this step it has to wait for. On a GPU torch itself refuses to, besides."""
    reads, verdicts, now = [], [], SimpleNamespace(step=0, counts=False)

    def note(name):
        if now.counts:
            reads.append((now.step, name))

    class Functions(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            name = getattr(function, "__name__", "")
            if name in HOST_READS:
                note(name)
            return function(*args, **(kwargs or {}))

    class Operators(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            name = operator.overloadpacket.__name__
            masks = name == "index" and any(each is not None and each.dtype == torch.bool for each in args[1])
            if masks or name in HOST_READS | {"_local_scalar_dense", "_unique2", "unique_dim"}:
                note(name)
            return operator(*args, **(kwargs or {}))

    def at(watch, epoch, batch, doing):
        real_at(watch, epoch, batch, doing)
        now.step = batch // 2 + 1
        now.counts = doing in (FORWARD, BACKWARD, AGREEING)
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("error" if now.counts and now.step not in (4, 6) else "default")

    def read(unread):
        counted, now.counts = now.counts, False
        verdicts.append((unread.step, now.step))
        verdict = real_read(unread)
        now.counts = counted
        return verdict

    def watched_epoch(*args):
        with Functions(), Operators():
            real_epoch(*args)

    real_at, real_read, real_epoch = Watch.at, health_module._Unread.read, train_module.train_epoch
    monkeypatch.setattr(Watch, "at", at)
    monkeypatch.setattr(health_module._Unread, "read", read)
    monkeypatch.setattr(train_module, "train_epoch", watched_epoch)
    # fp16 is slow on a CPU: six steps of four images, and no evaluation.

    def shorten(*args):
        return replace(plan_steps(*args), steps_per_epoch=6, total_steps=6)

    monkeypatch.setattr(train_module, "plan_steps", shorten)

    def judge_nothing(model, loader, *args):
        return Evaluation(*np.zeros((5, loader.plan.num_samples), dtype=int))

    monkeypatch.setattr(train_module, "evaluate", judge_nothing)
    options = ("train.epochs=1", "train.warmup_epochs=0", "train.batch_size=2", "train.global_batch=4")
    options += ("train.mixup_alpha=0.2", "train.mixup_per_sample=true", "train.mixup_partner=permuted")
    options += ("train.cutmix_alpha=1.0", "train.erasing=0.5", "train.dropout=0.2", "train.dropblock=0.2")
    options += ("train.crop=48", "train.ema_decay=0.9", "train.max_skipped_steps=2", "log.every_steps=4")
    train(small_run(*options, f"device={device}", f"train.precision={precision}"))
    assert {step for step, _ in reads} == {4, 6}, reads  # the reports
    assert verdicts == [(1, 2), (2, 3), (3, 4), (4, 4), (5, 6), (6, 6)]


def test_refusals_before_training(small_run, tmp_path):
    with pytest.raises(ConfigError, match="model.num_classes=37, but .*train has 10 classes"):
        train(small_run("model.num_classes=37"))
    with pytest.raises(DataError, match="nowhere: no such folder"):
        train(small_run("data.val_dir=nowhere"))
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="device=cuda"):
            train(small_run("device=cuda", "data.root=/nowhere"))
    assert json.loads((tmp_path / "run/status.json").read_text())["state"] == "failed"
    assert not (tmp_path / "run/config.yaml").exists()
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ConfigError, match="run_dir=.*file/run: cannot be written"):
        train(small_run(run="file/run"))
