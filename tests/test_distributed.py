"""Real process groups on the CPU, as torchrun starts them and under it."""

import json
import os
import signal
import threading
import time

import pytest
import torch
import torch.distributed as dist

from conftest import CPU, LAUNCHED, SMALL, newest_checkpoint, run_module
from faults.harness import Command, Place
from forked import start_server
from resnest_imagenet import build_model
from resnest_imagenet.checkpoint import load_checkpoint
from resnest_imagenet.distributed import gather, join, launched_as
from resnest_imagenet.errors import ConfigError, DistributedError, Stopped
from resnest_imagenet.training.stopping import StopRequest

TRAIN = "resnest_imagenet.commands.train"


@pytest.fixture
def place(tmp_path):
    place = Place(tmp_path, fast=True)
    yield place
    place.end_children()


@pytest.mark.process
def test_two_ranks_equal_one_process_that_accumulates(few_images, place):
    """The same batches, mixed alike, and gradients that are summed in the same order: equal parameters, bit for bit."""
    models = {}
    for ranks in (1, 2):
        options = ("train.batch_size=4", "train.global_batch=8", "train.mixup_alpha=0.2", "loader=dali")
        # At 48 pixels layer3's maps hold one 3x3 block.
        options += ("train.policy=resnest", "train.jitter=0.4", "train.erasing=0.5", "train.cutmix_alpha=1.0")
        options += ("train.dropblock=0.2", "train.crop=48", "train.dropout=0.2", "train.mixup_per_sample=true")
        options += ("train.epochs=1", "train.warmup_epochs=0")
        run = place.new_run()
        trainer = Command(place, "train", *SMALL, f"data.root={few_images}", f"run_dir={run}", *options, ranks=ranks)
        assert trainer.wait() == [0] * ranks, trainer.output
        assert trainer.output.count("epoch 1/1: loss") == 1  # one rank speaks
        checkpoint = load_checkpoint(newest_checkpoint(run))
        assert checkpoint["step"] == 2
        models[ranks] = checkpoint["model"]
        assert json.loads((run / "environment.json").read_text())["ranks"] == ranks
    parameters = [name for name, _ in build_model("resnest14_half", 10).named_parameters()]
    assert all(torch.equal(models[1][name], models[2][name]) for name in parameters)


@pytest.mark.process
def test_103_images_give_the_same_integers_with_1_and_3_ranks(demo_images, place):
    torch.manual_seed(0)
    torch.save(build_model("resnest14_half", 10).state_dict(), place.folder / "bare.pth")
    network = (f"ckpt={place.folder / 'bare.pth'}", "model=resnest14_half")
    images = (f"data.root={demo_images}", "data.val_dir=train", "crop=[32,48]", "batch_size=16", "loader.workers=1")
    counts = []
    for ranks in (1, 3):
        out = place.folder / f"{ranks}.json"
        evaluation = Command(place, "evaluate", *network, *images, f"out={out}", ranks=ranks)
        assert evaluation.wait() == [0] * ranks, evaluation.output
        counts.append([(r["correct1"], r["correct5"], r["count"]) for r in json.loads(out.read_text())["results"]])
    assert counts[0] == counts[1]
    assert [count for _, _, count in counts[0]] == [103, 103]
    assert 0 < counts[0][0][0] < 103


@pytest.mark.process
def test_an_error_before_the_ranks_meet_is_said_once(tmp_path):
    result = run_module(TRAIN, "data.root=/nowhere", f"run_dir={tmp_path}", ranks=2)
    assert result.returncode != 0
    ranks, _, summary = result.stderr.partition("ChildFailedError")
    assert ranks.count("data.root=/nowhere: no such folder") == 1
    assert "data.root=/nowhere: no such folder" in summary


@pytest.fixture
def launched(monkeypatch):
    """Set torchrun's variables."""

    def launch(**variables):
        for name in ("LOCAL_WORLD_SIZE", *LAUNCHED):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return launch


@pytest.mark.parametrize(
    "variables", [{}, {"WORLD_SIZE": "1"}, {"WORLD_SIZE": ""}, {"MASTER_PORT": "29500", "SLURM_NTASKS": "2"}]
)
def test_what_no_launcher_has_set_is_a_process_alone(variables, launched):
    launched(**variables)
    assert launched_as() == (0, 0, 1)
    with join(CPU) as ranks:
        assert ranks.store is None


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": "1"}, "RANK set without LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE set without RANK, LOCAL_RANK, "),
        ({**LAUNCHED, "MASTER_ADDR": ""}, "RANK, LOCAL_RANK, WORLD_SIZE set without MASTER_ADDR: "),
        ({**LAUNCHED, "RANK": "x"}, "RANK=x is not a number"),
        ({**LAUNCHED, "WORLD_SIZE": "-2"}, "WORLD_SIZE=-2 is not a number"),
        ({**LAUNCHED, "RANK": "2"}, "RANK=2 must be less than WORLD_SIZE=2"),
    ],
)
def test_variables_of_torchrun_that_make_no_sense(variables, message, launched):
    launched(**variables)
    with pytest.raises(ConfigError, match=message):
        launched_as()


def test_a_rank_that_never_comes_is_named_and_a_signal_ends_the_wait(launched):
    launched(**LAUNCHED)
    with (
        pytest.raises(DistributedError, match=r"^rank 1 did not join within 0.3 s \(timeout_seconds\)$"),
        join(CPU, 0.3),
    ):
        pass
    launched(**{**LAUNCHED, "RANK": "1"})
    with (
        pytest.raises(DistributedError, match=r"^rank 0 does not answer at 127.0.0.1:0 .* within 0.3 s "),
        join(CPU, 0.3),
    ):
        pass
    for rank in "01":
        launched(**{**LAUNCHED, "RANK": rank})
        started = time.monotonic()
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
        with pytest.raises(Stopped), StopRequest(speaks=False), join(CPU, 60):
            pass
        assert time.monotonic() - started < 3


def gather_twice(environment, queue):
    """Join and gather twice in this process, a rank."""
    os.environ.update(environment)
    for value in (1, 10):
        with join(CPU, 20) as ranks:
            queue.put(gather(value + ranks.rank, ranks))


@pytest.mark.process
def test_ranks_join_a_second_time():
    """As in a script under torchrun, which has the store, that calls `evaluate` twice."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    queue, processes = start_server().SimpleQueue(), []
    for rank in "01":
        environment = LAUNCHED | {"RANK": rank, "LOCAL_RANK": rank, "MASTER_PORT": str(store.port)}
        environment["TORCHELASTIC_USE_AGENT_STORE"] = "True"
        processes.append(start_server().Process(target=gather_twice, args=(environment, queue), daemon=True))
        processes[-1].start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert sorted(queue.get() for _ in range(4)) == [[1, 2], [1, 2], [10, 11], [10, 11]]
