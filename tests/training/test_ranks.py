"""Runs over several ranks: the same steps as one process that accumulates, stops and skips that all agree to."""

import shutil

import pytest
import torch

import tiny_task
from conftest import newest_checkpoint
from faulty_task import Fault
from forked import ask_to_stop, train_on_ranks
from resnest_imagenet.checkpoint import load_checkpoint
from resnest_imagenet.training.train import train
from run_files import assert_same_run, list_places, read_events, read_status

# A step is two batches of 8: of two ranks, or of one that accumulates.
OPTIONS = ("train.batch_size=8", "train.global_batch=16", "train.mixup_alpha=0.2", "train.dropout=0.2")
OPTIONS += ("checkpoint.every_steps=4", "checkpoint.keep=9", "log.every_steps=5", "train.ema_decay=0.9")
OPTIONS += ("train.ema_warmup=true", "train.patience=9")
PARAMETERS = [name for name, _ in tiny_task.TinyNetwork(0).named_parameters()]


@pytest.fixture(autouse=True)
def one_thread():
    """As the ranks have: the number of threads changes the order of sums."""
    number = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(number)


def assert_same_parameters(*runs):
    """BN statistics differ: each rank has those of its batches."""
    first, second = (load_checkpoint(newest_checkpoint(run))["model"] for run in runs)
    for name in PARAMETERS:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.process
def test_two_ranks_equal_one_process_that_accumulates(tiny_run, tmp_path):
    """The same batches, mixed alike, and gradients that are summed in the same order: equal parameters, bit for bit."""
    tiny_task.register(num_parts=2)
    ended = train_on_ranks(tiny_run(*OPTIONS, run="two"), tmp_path, 2, num_parts=2)
    assert [rank.code for rank in ended] == [0, 0], ended
    assert ended[0].text.count("epoch 2/2: loss") == 1 and not ended[1].text
    train(tiny_run(*OPTIONS, run="one"))
    assert_same_parameters(tmp_path / "one", tmp_path / "two")
    one, two = ([e for e in read_events(tmp_path / run) if e["event"] == "train"] for run in ("one", "two"))
    for event, other in zip(one, two, strict=True):
        for name in ("loss", "cross_entropy", "size"):
            assert event[name] == pytest.approx(other[name], rel=1e-6)
    assert read_events(tmp_path / "two")[-1]["count"] == tiny_task.NUM_VAL


@pytest.mark.process
def test_ranks_stop_and_resume_together_bit_for_bit(tiny_run, tmp_path):
    """The second rank is asked, in the middle of an epoch; sums of the losses are each rank's own."""
    config = tiny_run(*OPTIONS, run="whole")
    assert [rank.code for rank in train_on_ranks(config, tmp_path, 2, num_parts=2)] == [0, 0]
    config = tiny_run(*OPTIONS)
    ended = train_on_ranks(config, tmp_path, 2, [Fault(1, 1, ask_to_stop)], num_parts=2)
    assert [rank.code for rank in ended] == [75, 75], ended
    assert "stopped after step 8; the same command resumes the run" in ended[0].text
    status = read_status(tmp_path / "run")
    assert (status["state"], status["exit_code"], status["saved_step"]) == ("stopped", 75, 8)
    sums = load_checkpoint(newest_checkpoint(tmp_path / "run"))["loss_sums"]
    assert len(sums) == 2 and sums[0] != sums[1]
    ended = train_on_ranks(config, tmp_path, 2, num_parts=2)
    assert [rank.code for rank in ended] == [0, 0] and "resuming after step 8" in ended[0].text
    assert_same_run(tmp_path / "whole", tmp_path / "run")


@pytest.mark.process
def test_a_run_resumes_with_another_number_of_ranks(tiny_run, tmp_path, capsys):
    """From 2 to 1 that accumulates, and back: the same samples in the same steps, so equal parameters here as well."""
    assert train_on_ranks(tiny_run(*OPTIONS, run="whole"), tmp_path, 2)[0].code == 0
    for run in ("two_to_one", "one_to_two"):
        if run == "one_to_two":
            train(tiny_run(*OPTIONS, run=run))
        else:
            shutil.copytree(tmp_path / "whole", tmp_path / run)
        for later in sorted((tmp_path / run / "checkpoints").glob("step-*.pt"))[1:]:
            later.unlink()
    capsys.readouterr()
    train(tiny_run(*OPTIONS, run="two_to_one"))
    printed = capsys.readouterr().out
    assert "resuming after step 4, 0 epochs done\n" in printed
    line = "no longer bit for bit, but each remaining image of the epoch is still seen once: ranks {}\n"
    assert line.format("2 -> 1") in printed
    ended = train_on_ranks(tiny_run(*OPTIONS, run="one_to_two"), tmp_path, 2)
    assert [rank.code for rank in ended] == [0, 0] and line.format("1 -> 2") in ended[0].text
    for run in ("two_to_one", "one_to_two"):
        assert_same_parameters(tmp_path / "whole", tmp_path / run)
        # The report after the change has the mean loss of all its steps.
        losses = [
            next(event["loss"] for event in read_events(tmp_path / name) if (event["epoch"], event["step"]) == (1, 5))
            for name in ("whole", run)
        ]
        assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.process
def test_a_step_is_skipped_on_all_ranks_for_the_loss_of_one(tiny_run, tmp_path):
    faults = [Fault(0, 5, loss_factor=torch.nan), Fault(1, 3, gradient_factor=torch.inf)]  # of the second rank
    config = tiny_run(*OPTIONS, "train.max_skipped_steps=2", "log.every_steps=6", run="two")
    ended = train_on_ranks(config, tmp_path, 2, faults)
    assert [rank.code for rank in ended] == [0, 0], ended
    events = read_events(tmp_path / "two")
    assert [event.get("ranks") for event in events if event["event"] == "skipped"] == [[1], [1]]
    assert [place for place in list_places(events) if place[0] == "skipped"] == [("skipped", 1, 3), ("skipped", 2, 8)]
    assert "step 3 was not applied: loss or gradient not finite on ranks [1]\n" in ended[0].text
    assert load_checkpoint(newest_checkpoint(tmp_path / "two"))["ema_updates"] == 10
    config = tiny_run(*OPTIONS, "train.max_skipped_steps=1", run="ended")
    ended = train_on_ranks(config, tmp_path, 2, faults)
    assert {rank.code for rank in ended} == {5}
    assert "rank 1: loss or gradient not finite at step 8" in ended[0].text


@pytest.mark.process
def test_bad_samples_are_each_ranks_own(tiny_run, tmp_path, capsys):
    bad = set(range(0, 103, 20))
    options = (*OPTIONS, "data.on_error=substitute", f"data.max_errors={len(bad)}")
    config = tiny_run(*options, run="two")
    ended = train_on_ranks(config, tmp_path, 2, bad=bad)
    assert [rank.code for rank in ended] == [0, 0], ended
    lists = load_checkpoint(newest_checkpoint(tmp_path / "two"))["bad_images"]
    assert set().union(*lists) == bad and len(lists) == 2
    tiny_task.register(bad=bad)
    train(tiny_run(*options, run="one"))
    assert_same_parameters(tmp_path / "one", tmp_path / "two")
    # One process takes over what both have counted, and does not report it again.
    newest_checkpoint(tmp_path / "two").unlink()
    known = set().union(*load_checkpoint(newest_checkpoint(tmp_path / "two"))["bad_images"])
    capsys.readouterr()
    train(tiny_run(*options, run="two"))
    assert capsys.readouterr().err.count("; replaced by ") == len(bad - known)


@pytest.mark.process
def test_three_ranks_see_each_val_sample_once(tiny_run, tmp_path):
    """40 samples in 5 batches: the third rank has one batch less than the others."""
    ended = train_on_ranks(tiny_run("train.batch_size=8", "train.epochs=1", "train.warmup_epochs=0"), tmp_path, 3)
    assert [rank.code for rank in ended] == [0, 0, 0], ended
    assert read_events(tmp_path / "run")[-1]["count"] == tiny_task.NUM_VAL
    assert len((tmp_path / "run/answers.csv").read_text().splitlines()) == tiny_task.NUM_VAL
    assert load_checkpoint(newest_checkpoint(tmp_path / "run"))["circumstances"]["ranks"] == 3


@pytest.mark.process
def test_a_run_folder_that_is_not_shared_is_noticed(tiny_run, tmp_path):
    """Ranks that would resume from different steps stop instead."""
    here, empty = tmp_path / "here", tmp_path / "empty"
    here.mkdir(), empty.mkdir()
    config = tiny_run(*OPTIONS).model_copy(update={"run_dir": "run"})
    ended = train_on_ranks(config, tmp_path, 2, [Fault(0, 5, ask_to_stop)], folders=[here, here])
    assert [rank.code for rank in ended] == [75, 75]
    ended = train_on_ranks(config, tmp_path, 2, folders=[here, empty])
    assert 0 not in [rank.code for rank in ended]
    assert "run/checkpoints/step-000000004.pt: not there: run_dir=run is not shared by all ranks" in ended[1].text
    assert "rank 1: run/checkpoints/step-000000004.pt: not there" in ended[0].text
    assert (here / "run/checkpoints/step-000000004.pt").exists() and not (empty / "run").exists()
