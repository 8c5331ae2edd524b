"""A run that was stopped, killed or interrupted resumes bit for bit."""

import errno
import os
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch

import tiny_task
from conftest import ALONE, newest_checkpoint
from faulty_task import Fault
from forked import ask_to_stop
from resnest_imagenet.checkpoint import load_checkpoint, save_checkpoint
from resnest_imagenet.errors import LoadingError, Stopped, StorageError
from resnest_imagenet.training import loop
from resnest_imagenet.training import train as train_module
from resnest_imagenet.training.control import Control
from resnest_imagenet.training.dry_run import describe_run
from resnest_imagenet.training.train import train
from run_files import (
    assert_equal,
    assert_same_run,
    list_places,
    read_events,
    read_scalars,
    read_status,
    without_clock,
)

# 12 steps in two epochs, of two batches each, with all that draws.
OPTIONS = ("train.batch_size=8", "train.global_batch=16", "train.ema_decay=0.9", "train.dropout=0.2")
OPTIONS += ("train.ema_warmup=true", "train.patience=9", "train.mixup_alpha=0.2")
OPTIONS += ("log.every_steps=5", "checkpoint.every_steps=3", "checkpoint.keep=2")


@pytest.mark.slow
def test_auto_keeps_the_loader_of_a_run(small_run, inject, tmp_path, capsys, signals):
    """As it was where auto took DALI for every recipe; a new run takes the faster for this one."""
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    options = (
        "train.policy=rotation",
        "train.epochs=null",
        "train.steps=3",
        "train.warmup_epochs=0",
        "log.trackers=[]",
    )

    def read(run):
        saved = load_checkpoint(newest_checkpoint(tmp_path / run))
        return {name: value for name, value in saved.items() if name != "config"}

    train(small_run(*options, "loader.name=dali", run="dali"))
    inject(Fault(0, 1, ask_to_stop))
    with pytest.raises(Stopped):
        train(small_run(*options, "loader.name=dali", run="resumed"))
    inject()
    capsys.readouterr()
    train(small_run(*options, "loader.name=auto", run="resumed"))
    printed = capsys.readouterr().out
    assert "resuming after step" in printed and "no longer bit for bit" not in printed
    assert_equal(read("dali"), read("resumed"))
    train(small_run(*options, "loader.name=auto", run="new"))
    assert [read(run)["circumstances"]["loader"] for run in ("resumed", "new")] == ["dali", "torchvision"]


def interrupt():
    raise KeyboardInterrupt


def stop(config, error=Stopped):
    """Train until the run ends with an error, and return the status and the newest checkpoint that it leaves."""
    with pytest.raises(error):
        train(config)
    run = Path(config.run_dir)
    return read_status(run), load_checkpoint(newest_checkpoint(run))


def test_a_run_resumes_wherever_it_was_stopped(tiny_run, inject, tmp_path, monkeypatch, capsys, signals):
    """In the middle of an epoch, after its last step, in the middle of an evaluation; interrupted, it loses steps."""
    options = (*OPTIONS, "log.trackers=tensorboard")
    train(tiny_run(*options, run="whole"))
    config = tiny_run(*options, run="stopped")
    # At the second batch of step 1, a request is read at the end of the next step; before a checkpoint, at once.
    for number, step in ((1, 2), (5, 3), (11, 6)):
        inject(Fault(0, number, ask_to_stop))
        status, saved = stop(config)
        assert (status["state"], status["exit_code"], saved["step"], saved["epoch"]) == ("stopped", 75, step, 0)
    inject()
    real = tiny_task.TinyTask._evaluate
    monkeypatch.setattr(tiny_task.TinyTask, "_evaluate", lambda *args: (ask_to_stop(), real(*args))[1])
    status, saved = stop(config)
    assert (saved["step"], saved["epoch"]) == (6, 0)
    monkeypatch.setattr(tiny_task.TinyTask, "_evaluate", real)
    inject(Fault(1, 10, interrupt))
    status, saved = stop(config, KeyboardInterrupt)
    assert (status["state"], status["exit_code"], saved["step"]) == ("stopped", 130, 9)
    inject()
    train(config)

    printed = capsys.readouterr().out
    assert "resuming after step 9, 1 epochs done\n" in printed
    assert "nan" not in printed  # of the loss, where the last report was of the process before
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")
    assert read_scalars(tmp_path / "whole") == read_scalars(tmp_path / "stopped")
    names = [path.name for path in sorted((tmp_path / "stopped/checkpoints").iterdir())]
    assert names == ["best.pt", "step-000000009.pt", "step-000000012.pt"]


@pytest.mark.parametrize(("optimizer", "steps"), [("sgd", (1, 4, 5, 6, 7, 11)), ("adamw", (1, 7)), ("lamb", (1, 7))])
def test_a_run_resumes_after_any_step(optimizer, steps, tiny_run, tmp_path):
    options = (*OPTIONS, f"train.optimizer={optimizer}", "checkpoint.every_steps=1", "checkpoint.keep=99")
    options += ("train.clip_norm=0.5", "train.head_lr_factor=10")
    train(tiny_run(*options, run="whole"))
    for step in steps:
        run = tmp_path / f"from-{step}"
        shutil.copytree(tmp_path / "whole", run)
        for path in sorted((run / "checkpoints").glob("step-*.pt"))[step:]:
            path.unlink()
        train(tiny_run(*options, run=run.name))
        assert_same_run(tmp_path / "whole", run)


def test_a_checkpoint_names_all_that_the_future_depends_on(tiny_run, tmp_path):
    train(tiny_run("train.epochs=1", "train.warmup_epochs=0", "train.ema_decay=0.9"))
    saved = load_checkpoint(newest_checkpoint(tmp_path / "run"))
    state = {"model", "ema", "ema_updates", "optimizer", "scaler", "step", "epoch", "best", "skipped"}
    state |= {"stale", "loss_sums", "steps_summed", "bad_images", "history"}
    assert saved.keys() == state | {"identity", "circumstances", "config", "classes", "task", "metric"}
    assert (saved["task"], saved["metric"], saved["classes"]) == ("tiny", "accuracy", ["even", "odd"])
    assert saved["identity"]["training images"].startswith("103 ")
    assert saved["identity"]["train.global_batch"] == 16
    assert saved["circumstances"]["ranks"] == 1 and saved["circumstances"]["torch"] == torch.__version__.split("+")[0]
    assert "loader" not in saved["circumstances"]  # the task has one alone


def test_the_best_network_is_that_of_the_highest_score(tiny_run, tmp_path, monkeypatch):
    """The first of equals; its files and checkpoint stay when later ones are worse."""
    scores = [50.0, 75.0, 75.0, 20.0]
    real = tiny_task.TinyTask._evaluate

    def evaluate(*args):
        score = real(*args)
        epoch = len(events_of("eval"))
        score.values["accuracy"] = scores[epoch]
        score.files["answers.csv"] = f"of epoch {epoch + 1}".encode
        return score

    def events_of(kind):
        return [event for event in read_events(tmp_path / "run") if event["event"] == kind]

    monkeypatch.setattr(tiny_task.TinyTask, "_evaluate", evaluate)
    state = train(tiny_run("train.epochs=4", "checkpoint.keep=2", "checkpoint.every_steps=4"))
    assert [event["accuracy"] for event in events_of("eval")] == scores
    assert [event.get("files") for event in events_of("eval")] == [["answers.csv"], ["answers.csv"], None, None]
    assert {event["metric"] for event in events_of("eval")} == {"accuracy"}
    assert (tmp_path / "run/answers.csv").read_text() == "of epoch 2"
    checkpoints = tmp_path / "run/checkpoints"
    best = load_checkpoint(checkpoints / "best.pt")
    assert (best["step"], best["epoch"], best["best"]) == (12, 2, 75.0)
    assert state.best == read_status(tmp_path / "run")["best"] == 75.0
    assert load_checkpoint(newest_checkpoint(tmp_path / "run"))["best"] == 75.0
    names = sorted(path.name for path in checkpoints.iterdir())
    assert names == ["best.pt", "step-000000020.pt", "step-000000024.pt"]


def test_files_of_a_network_that_no_checkpoint_has_are_removed(tiny_run, inject, tmp_path, monkeypatch):
    """A run that dies between them and its checkpoint leaves them: its evaluation is dropped, and made again."""
    train(tiny_run(*OPTIONS, run="whole"))
    config, run = tiny_run(*OPTIONS, "checkpoint.every_steps=4"), tmp_path / "run"
    real = Control.save

    def die(control, state, *rest):
        if state.epoch == 1:
            raise KeyboardInterrupt
        real(control, state, *rest)

    monkeypatch.setattr(Control, "save", die)
    with pytest.raises(KeyboardInterrupt):
        train(config)
    monkeypatch.setattr(Control, "save", real)
    assert read_events(run)[-1]["files"] == ["answers.csv"] and (run / "answers.csv").exists()
    assert not (run / "checkpoints/best.pt").exists()
    (run / "mine.csv").touch()
    seen = []
    inject(Fault(0, 8, lambda: seen.append((read_events(run), {path.name for path in run.glob("*.csv")}))))
    train(config)
    assert seen == [([], {"mine.csv"})]
    assert_equal(*(load_checkpoint(newest_checkpoint(tmp_path / name))["model"] for name in ("whole", "run")))
    assert (run / "answers.csv").read_bytes() == (tmp_path / "whole/answers.csv").read_bytes()


def test_files_of_the_best_network_stay_when_a_run_resumes(tiny_run, inject, tmp_path, signals):
    config, run = tiny_run(*OPTIONS), tmp_path / "run"
    inject(Fault(1, 2, ask_to_stop))
    stop(config)
    answers = (run / "answers.csv").read_bytes()
    inject(Fault(1, 6, ask_to_stop))
    stop(config)
    assert (run / "answers.csv").read_bytes() == answers


def test_a_run_that_died_before_its_first_checkpoint_begins_again(tiny_run, tmp_path, monkeypatch):
    options = ("train.epochs=1", "train.warmup_epochs=0", "train.ema_decay=0.9", "log.every_steps=1")
    train(tiny_run(*options, run="whole"))
    died = tmp_path / "died"
    monkeypatch.setattr(Control, "save", lambda *args: interrupt())
    for _ in range(2):  # the second time there are the events, and the answers, of the first
        with pytest.raises(KeyboardInterrupt):
            train(tiny_run(*options, run="died"))
        assert {path.name for path in died.iterdir()} >= {"metrics.jsonl", "answers.csv", "config.yaml"}
        (died / "status.json").write_text('{"state": "running", "saved_step": null}')  # as a kill leaves it
    monkeypatch.undo()
    train(tiny_run(*options, run="died"))
    assert without_clock(read_events(died)) == without_clock(read_events(tmp_path / "whole"))


def test_a_signal_before_the_first_step_stops_at_once(tiny_run, tmp_path, monkeypatch, signals):
    monkeypatch.setattr(train_module, "open_task", lambda config: os.kill(os.getpid(), signal.SIGUSR1))
    with pytest.raises(Stopped, match="SIGUSR1: stopped before the first step"):
        train(tiny_run())
    status = read_status(tmp_path / "run")
    assert (status["state"], status["exit_code"]) == ("stopped", 75)


def test_bad_samples_are_remembered(tiny_run, tmp_path, capsys):
    bad = range(0, 103, 20)
    tiny_task.register(bad=set(bad))
    options = ("data.on_error=substitute", f"data.max_errors={len(bad)}", "train.warmup_epochs=0")
    train(tiny_run(*options))
    assert capsys.readouterr().err.count("; replaced by sample ") == len(bad)
    newest_checkpoint(tmp_path / "run").unlink()
    (known,) = load_checkpoint(newest_checkpoint(tmp_path / "run"))["bad_images"]
    assert len(known) >= 4  # the others are in what the first epoch does not see
    train(tiny_run(*options))
    captured = capsys.readouterr()
    assert "resuming after step 6" in captured.out
    assert captured.err.count("; replaced by ") == len(bad) - len(known)
    assert load_checkpoint(newest_checkpoint(tmp_path / "run"))["bad_images"] == [list(bad)]


@pytest.mark.parametrize("number", [4, 5])
def test_where_the_storage_fails_after_a_whole_step_it_is_saved(number, tiny_run, tmp_path, monkeypatch):
    """Not in the middle of one: there the last checkpoint stands."""
    options = (*OPTIONS, "checkpoint.every_steps=100")
    train(tiny_run(*options, run="whole"))
    real = tiny_task.TinyLoader.batches

    def batches(loader, epoch, start=0):
        for index, batch in enumerate(real(loader, epoch, start), start):
            if loader.plan.shuffle and index == number:
                raise LoadingError(errno.EIO, "sample 3: cannot be read")
            yield batch

    monkeypatch.setattr(tiny_task.TinyLoader, "batches", batches)
    with pytest.raises(LoadingError if number == 4 else StorageError, match="sample 3: cannot be read"):
        train(tiny_run(*options))
    assert read_status(tmp_path / "run")["state"] == "failed"
    saved = [load_checkpoint(path)["step"] for path in (tmp_path / "run/checkpoints").glob("step-*.pt")]
    assert saved == ([2] if number == 4 else [])
    monkeypatch.setattr(tiny_task.TinyLoader, "batches", real)
    train(tiny_run(*options))
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_a_length_in_steps_ends_in_the_middle_of_an_epoch(tiny_run, inject, tmp_path, capsys, signals):
    """16 steps are 2 epochs of 6 and one of 4."""
    options = (*OPTIONS, "train.epochs=null", "train.steps=16", "train.warmup_epochs=null", "train.warmup_steps=3")
    state = train(tiny_run(*options, run="whole"))
    assert (state.step, state.epoch) == (16, 3)
    assert re.search(r"epoch 3/3, step 4/4: .*, left: epoch 00:00, run 00:00, ", capsys.readouterr().out)
    assert list_places(read_events(tmp_path / "whole")) == [
        ("train", 1, 5), ("train", 1, 6), ("eval", 1, 6), ("train", 2, 10), ("train", 2, 12), ("eval", 2, 12),
        ("train", 3, 15), ("train", 3, 16), ("eval", 3, 16),
    ]  # fmt: skip
    config = tiny_run(*options)
    for epoch, number, step in ((1, 2, 9), (2, 2, 15), (2, 7, 16)):
        inject(Fault(epoch, number, ask_to_stop))
        assert stop(config)[1]["step"] == step
    inject()
    assert train(config).step == 16
    assert_same_run(tmp_path / "whole", tmp_path / "run")
    capsys.readouterr()
    train(config)
    assert capsys.readouterr().out.startswith("finished: best accuracy ")


def test_a_shorter_last_epoch_asks_for_no_batch_too_many(tiny_run, tmp_path, monkeypatch):
    """The loader is closed where the run ends; one that ends before its plan does is another matter."""
    taken = []
    real = tiny_task.TinyLoader.batches

    def batches(loader, epoch, start=0):
        for batch in real(loader, epoch, start):
            if loader.plan.shuffle:
                taken.append(epoch)
            yield batch

    monkeypatch.setattr(tiny_task.TinyLoader, "batches", batches)
    train(tiny_run(*OPTIONS, "train.epochs=null", "train.steps=8", "train.warmup_epochs=0"))
    assert (taken.count(0), taken.count(1)) == (12, 4)


def test_not_every_epoch_is_evaluated(tiny_run, inject, tmp_path, capsys, signals):
    """Only each third and the last; best.pt is of one that was, also where a run resumes in between."""
    options = (*OPTIONS, "train.epochs=5", "eval.every_epochs=3", "checkpoint.keep=99")
    state = train(tiny_run(*options, run="whole"))
    evaluations = [event for event in read_events(tmp_path / "whole") if event["event"] == "eval"]
    assert [(event["epoch"], event["step"]) for event in evaluations] == [(3, 18), (5, 30)]
    best = max(evaluations, key=lambda event: event["accuracy"])
    assert state.best == best["accuracy"]
    assert load_checkpoint(tmp_path / "whole/checkpoints/best.pt")["step"] == best["step"]
    saved = {path.stem: load_checkpoint(path) for path in (tmp_path / "whole/checkpoints").glob("step-*.pt")}
    assert {name: content["best"] for name, content in saved.items() if content["step"] < 18} == {
        f"step-{step:09}": -1.0 for step in (3, 6, 9, 12, 15)
    }
    config = tiny_run(*options)
    for epoch, number in ((1, 3), (2, 11), (3, 11), (4, 5)):  # at the end of an epoch, and in the middle of one
        inject(Fault(epoch, number, ask_to_stop))
        stop(config)
    inject()
    train(config)
    assert_same_run(tmp_path / "whole", tmp_path / "run")
    best = [load_checkpoint(tmp_path / run / "checkpoints/best.pt")["model"] for run in ("whole", "run")]
    assert_equal(*best)


def test_a_run_without_a_better_best_ends_early_and_counts_alike_when_resumed(
    tiny_run, inject, tmp_path, monkeypatch, capsys, signals
):
    """Scores by epoch; an epoch without an evaluation does not count. With more patience it resumes, and ends there."""
    scores = {2: 50.0, 4: 75.0, 6: 75.0, 8: 20.0, 10: 80.0, 12: 70.0, 14: 70.0, 16: 90.0}
    real = tiny_task.TinyTask._evaluate
    epoch = 0

    def evaluate(*args):
        score = real(*args)
        score.values["accuracy"] = scores[epoch]
        return score

    def end_epoch(state, *args):
        nonlocal epoch
        epoch = state.epoch + 1
        return real_end(state, *args)

    real_end = loop.end_epoch
    monkeypatch.setattr(train_module, "end_epoch", end_epoch)
    monkeypatch.setattr(tiny_task.TinyTask, "_evaluate", evaluate)
    options = (*OPTIONS, "train.epochs=16", "eval.every_epochs=2", "train.patience=2", "checkpoint.keep=99")
    state = train(tiny_run(*options, run="whole"))
    assert (state.epoch, state.best, state.stale) == (8, 75.0, 2)
    status = read_status(tmp_path / "whole")
    assert (status["state"], status["epoch"], status["reason"]) == ("finished", 8, "train.patience=2")
    printed = capsys.readouterr().out
    assert "finished          best accuracy 75.00 % after epoch 4 of 8; " in printed
    assert "ended by          train.patience=2: as many evaluations without a better best\n" in printed

    config = tiny_run(*options)
    for at in (3, 5, 6):  # after the best, after one that is no better, and in the middle of the evaluations' epochs
        inject(Fault(at, 3, ask_to_stop))
        stop(config)
    inject()
    train(config)
    assert_same_run(tmp_path / "whole", tmp_path / "run")
    capsys.readouterr()
    assert train(config).epoch == 8
    finished = (
        "finished: best accuracy 75.00 %, nothing to do: train.patience=2 has ended it, and more patience resumes it"
    )
    assert finished in capsys.readouterr().out.splitlines()
    # More epochs alone do not help, and the dry run has the same line.
    extended = tiny_run(*options, "train.epochs=20", "checkpoint.on_mismatch=extend")
    assert train(extended).epoch == 8 and finished in capsys.readouterr().out.splitlines()
    assert finished in describe_run(extended)

    longer = (*options, "train.patience=3")
    train(tiny_run(*longer, run="longer"))
    assert read_status(tmp_path / "longer")["epoch"] == 16
    assert train(tiny_run(*longer)).stale == 0
    assert_same_run(tmp_path / "longer", tmp_path / "run")
    assert "reason" not in read_status(tmp_path / "run")


def test_losses_of_several_parts_are_logged_by_name_and_resumed_exactly(tiny_run, inject, tmp_path, signals):
    tiny_task.register(num_parts=2)
    options = (*OPTIONS, "log.trackers=tensorboard", "checkpoint.every_steps=4")
    train(tiny_run(*options, run="whole"))
    reports = [event for event in read_events(tmp_path / "whole") if event["event"] == "train"]
    for report in reports:
        assert report["loss"] == pytest.approx(report["cross_entropy"] + report["size"], rel=1e-6)
        assert 0 < report["size"] < report["cross_entropy"]
    scalars = read_scalars(tmp_path / "whole")
    assert scalars["train/size"] == [(report["step"], pytest.approx(report["size"])) for report in reports]
    config = tiny_run(*options)
    for epoch, number, step in ((0, 6, 4), (1, 2, 8)):  # between two reports: sums are in the checkpoint
        inject(Fault(epoch, number, ask_to_stop))
        saved = stop(config)[1]
        assert (saved["step"], saved["steps_summed"]) == (step, step % 5 % 6 if step < 6 else 2)
        (sums,) = saved["loss_sums"]
        assert sums.keys() == {"loss", "cross_entropy", "size"} and all(sums.values())
    inject()
    train(config)
    assert_same_run(tmp_path / "whole", tmp_path / "run")
    assert scalars == read_scalars(tmp_path / "run")


def test_other_loss_terms_than_a_checkpoint_has_do_not_stop_a_run(tiny_run, inject, tmp_path, signals):
    """A checkpoint of the version before has the sum only."""
    tiny_task.register(num_parts=2)
    config = tiny_run(*OPTIONS)
    inject(Fault(0, 3, ask_to_stop))
    saved = stop(config)[1]
    save_checkpoint(
        {**saved, "loss_sums": [{"loss": saved["loss_sums"][0]["loss"]}]}, newest_checkpoint(tmp_path / "run")
    )
    inject()
    train(config)
    assert read_events(tmp_path / "run")[0].keys() >= {"loss", "cross_entropy", "size"}


def test_a_finished_run_returns_its_state(tiny_run):
    config = tiny_run(*OPTIONS)
    assert_equal(train(config).state_dict(ALONE), train(config).state_dict(ALONE))
