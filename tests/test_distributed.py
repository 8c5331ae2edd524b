"""Real process groups on the CPU, as torchrun starts them and under it."""

import json
import os
import signal
import threading
import time

import pytest
import torch
import torch.distributed as dist
from pydantic import TypeAdapter, ValidationError

from conftest import CPU, LAUNCHED, SMALL, compose_config, newest_checkpoint, run_module
from faults.harness import Command, Place
from forked import start_server
from resnest_imagenet import build_model
from resnest_imagenet.checkpoint import load_checkpoint
from resnest_imagenet.config_reading import InfoConfig
from resnest_imagenet.distributed import choose_device, gather, join, launched_as
from resnest_imagenet.errors import ConfigError, DistributedError, Stopped
from resnest_imagenet.options import Device
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


def test_devices_are_chosen_by_name_and_refused_in_one_line(launched, monkeypatch):
    """What torch has here is made up: none of them, and then two CUDA devices and one of Apple's."""
    launched()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for name, message in (
        ("cuda", "device=cuda: torch sees no CUDA device; device=auto takes the CPU then"),
        ("cuda:0", "device=cuda:0: torch sees no CUDA device"),
        ("mps", "device=mps: torch sees no GPU of Apple's; device=auto takes CUDA, or the CPU"),
        ("gpu", r"device='gpu': auto, cpu, cuda, cuda:1 \(any number\) and mps are valid"),
        ("meta", "device=meta: only a CPU, a CUDA device or mps is valid"),
    ):
        with pytest.raises(ConfigError, match=f"^{message}$"):
            choose_device(name)
    assert choose_device("auto") == choose_device("cpu") == CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    chosen = [str(choose_device(name)) for name in ("auto", "cuda", "cuda:1", "mps")]
    assert chosen == ["cuda:0", "cuda:0", "cuda:1", "mps"]
    with pytest.raises(ConfigError, match="^device=cuda:2: torch sees cuda:0, cuda:1$"):
        choose_device("cuda:2")
    launched(**LAUNCHED)
    for name in ("cuda:1", "mps"):
        with pytest.raises(ConfigError, match=f"^device={name} is for one process: under torchrun set device=cuda, "):
            choose_device(name)
    assert str(choose_device("cuda")) == "cuda:0"


def test_a_device_that_no_torch_has_is_refused_before_torch_is_imported():
    assert compose_config("info", InfoConfig, "models=[resnest50]", "device=cuda:1").device == "cuda:1"  # in no quotes
    with pytest.raises(ConfigError, match=r"^device=gpu: auto, cpu, cuda, cuda:1 \(any number\) and mps are valid$"):
        compose_config("info", InfoConfig, "models=[resnest50]", "device=gpu")
    device = TypeAdapter(Device)
    for name in ("auto", "cpu", "cuda", "cuda:0", "cuda:12", "mps"):
        assert device.validate_python(name) == name
    for name in ("cuda1", "cuda:", "cuda:x", "cuda:-1", "cuda:\u0661", "CUDA", "mps:0", "", " cpu"):
        with pytest.raises(ValidationError):
            device.validate_python(name)
