"""train.batch_size=auto: what is chosen, and that it is the run of the same numbers typed."""

import shutil
from functools import partial

import pytest
import torch
import yaml

import tiny_task
from conftest import ALONE, CPU, LAUNCHED, compose_config
from faulty_task import Fault
from forked import ask_to_stop, compute_on_ranks, train_on_ranks
from resnest_imagenet.config import TrainConfig
from resnest_imagenet.distributed import Ranks
from resnest_imagenet.errors import ConfigError, Stopped
from resnest_imagenet.schemas import choose_schema
from resnest_imagenet.tasks.choice import open_task
from resnest_imagenet.training import batch_size
from resnest_imagenet.training.batch_size import agree_on_batch, choose_batch, with_batch
from resnest_imagenet.training.dry_run import describe_run
from resnest_imagenet.training.schedule import plan_steps
from resnest_imagenet.training.train import train
from run_files import assert_same_run

AUTO = "train.batch_size=auto"
PER_SAMPLE = 1.5 * 4 * (tiny_task.WIDTH + 3 * 16)  # bytes at the peak, see TinyTask.count_kept_bytes


def free_for(monkeypatch: pytest.MonkeyPatch, samples: float | None) -> None:
    """Let the machine have memory for so many samples, and a little more."""
    free = None if samples is None else int(samples * PER_SAMPLE) + 1
    monkeypatch.setattr(batch_size, "count_free_bytes", lambda: free)


def choose(tiny_run, *options: str, device: torch.device = CPU) -> tuple[int, int | None]:
    recipe = choose_batch(open_task(with_batch(tiny_run(AUTO, *options))), device).config.train
    return recipe.batch_size, recipe.global_batch


def test_the_device_chooses_the_batch_and_the_recipe_the_step(tiny_run, monkeypatch, capsys):
    """The step is the same whatever fits: 103 samples have at least 16 steps of 4."""
    for samples, options, sizes in (
        (None, (), (4, 4)),
        (1000, (), (4, 4)),
        (3, (), (2, 4)),
        (0.5, (), (2, 4)),  # `require_memory` refuses it
        (1000, ("train.reference_batch=2",), (2, 2)),
        (1000, ("train.global_batch=36",), (36, 36)),
        (20, ("train.global_batch=36",), (18, 36)),
        (8, ("train.global_batch=36",), (6, 36)),
        (1000, ("train.global_batch=1",), (1, 1)),
    ):
        free_for(monkeypatch, samples)
        assert choose(tiny_run, *options) == sizes, (samples, options)
    assert capsys.readouterr().out.splitlines()[2] == (
        "train.batch_size=auto: 2 images at a time (at most 0.0 GB of 0.0 GB that are free), train.global_batch=4 in "
        "each step"
    )
    for name, value in {**LAUNCHED, "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    free_for(monkeypatch, 20)
    assert choose(tiny_run, "train.global_batch=36") == (9, 36)  # of two ranks on this machine
    monkeypatch.setenv("WORLD_SIZE", "3")
    free_for(monkeypatch, 1000)
    assert choose(tiny_run) == (2, 6)
    with pytest.raises(ConfigError, match="train.global_batch=16 is not a multiple of 3 ranks"):
        choose(tiny_run, "train.global_batch=16")


@pytest.mark.slow
def test_every_task_takes_the_batch(small_run, object_run, tmp_path):
    """Its blank batch, by which a GPU tries a step, has as many images; the data are listed once."""
    from resnest_imagenet.data.demo_scenes import write_demo_scenes

    write_demo_scenes(tmp_path / "scenes", seed=0, train_scenes=4, val_scenes=1)
    segmentation = ("+experiment=demo_segmentation", f"data.root={tmp_path}/scenes", "device=cpu", "train.crop=64")
    sizes = (AUTO, "train.global_batch=6")
    for config in (
        small_run(*sizes),
        object_run(*sizes),
        compose_config("train", TrainConfig, *segmentation, *sizes),
    ):
        task = open_task(with_batch(config))
        for batch, chosen in ((6, choose_batch(task, CPU)), (2, task)):
            images = chosen.blank_batch(CPU)[0]
            assert len(images) == batch == chosen.config.train.batch_size
            assert chosen.train_set is task.train_set and chosen.plan_batches(1, ALONE).batch_size == batch


def test_a_gpu_tries_a_step(tiny_run, monkeypatch):
    real, tried = tiny_task.TinyTask.loss, []

    def loss(task, network, batch, draws):
        tried.append(len(batch[0]))
        if len(batch[0]) > 8:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return real(task, network, batch, draws)

    monkeypatch.setattr(tiny_task.TinyTask, "loss", loss)
    fits = batch_size._fits
    monkeypatch.setattr(batch_size, "_fits", lambda task, device: fits(task, CPU))  # all but CUDA's own counters
    assert choose(tiny_run, "train.global_batch=32", device=torch.device("cuda")) == (8, 32) and tried == [32, 16, 8]
    monkeypatch.setattr(tiny_task.TinyTask, "loss", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        choose(tiny_run, device=torch.device("cuda"))


@pytest.mark.usefixtures("signals")
def test_it_is_the_run_of_the_same_numbers_and_resumes_with_them(
    tiny_run, inject, tmp_path, monkeypatch, capsys, signals
):
    """With less memory than before, too; a trial leaves no trace in the random numbers."""
    options = ("train.global_batch=16", "train.dropout=0.2", "train.mixup_alpha=0.2", "checkpoint.every_steps=3")
    train(tiny_run("train.batch_size=8", *options, run="typed"))
    free_for(monkeypatch, 9)
    train(tiny_run(AUTO, *options, run="whole"))
    assert_same_run(tmp_path / "typed", tmp_path / "whole")
    inject(Fault(1, 3, ask_to_stop))
    config = tiny_run(AUTO, *options)
    with pytest.raises(Stopped):
        train(config)
    inject()
    free_for(monkeypatch, 2)
    capsys.readouterr()
    assert "train.batch_size=8 x 1 rank x 2 passes" in describe_run(config)
    train(config)
    assert "train.batch_size=auto: 8 images at a time (as before)" in capsys.readouterr().out
    assert_same_run(tmp_path / "typed", tmp_path / "run")
    # What died before its first checkpoint, perhaps of its batch, chooses again.
    for path in (tmp_path / "run/checkpoints").iterdir():
        path.unlink()
    assert choose(tiny_run, *options) == (2, 16)


def test_a_run_of_a_typed_batch_may_resume_with_auto(tiny_run, tmp_path):
    train(tiny_run("train.batch_size=32"))
    assert yaml.safe_load((tmp_path / "run/config.yaml").read_text())["train"]["global_batch"] is None
    assert choose(tiny_run) == (32, 32)
    # It counts for the same run, and for another that will be refused, but not for one that sets it aside.
    set_aside = "checkpoint.on_mismatch=set_aside"
    for options, sizes in (
        ((set_aside,), (32, 32)),
        (("seed=1",), (32, 32)),
        ((set_aside, "seed=1"), (4, 4)),
        ((set_aside, "train.global_batch=16"), (16, 16)),
        ((set_aside, "train.global_batch=64"), (64, 64)),
    ):
        assert choose(tiny_run, *options) == sizes, options
    shutil.copy(tmp_path / "run/config.yaml", tmp_path / "run/environment.json")
    assert choose(tiny_run) == (4, 4)


def agree(values: dict, ranks: Ranks) -> tuple[int, int, int]:
    """Choose 8 on the first rank and 4 on the second, and return what they agree on."""
    tiny_task.register()
    config = choose_schema(TrainConfig, values).model_validate(values)
    task = open_task(with_batch(config, (8, 4)[ranks.rank], 16))
    plan = plan_steps(len(task.train_set), task.config.train, ranks.world_size)
    assert plan.accumulation == (1, 2)[ranks.rank]
    task, plan = agree_on_batch(task, plan, ranks)
    return task.config.train.batch_size, plan.global_batch, plan.accumulation


@pytest.mark.process
def test_ranks_agree_on_the_smallest(tiny_run):
    assert compute_on_ranks(partial(agree, tiny_run().model_dump()), 2) == [(4, 16, 2), (4, 16, 2)]


@pytest.mark.process
def test_it_is_the_run_of_the_same_numbers_on_ranks(tiny_run, tmp_path):
    """And one rank resumes with the step of two."""
    options = ("train.dropout=0.2", "train.mixup_alpha=0.2", "checkpoint.every_steps=4")
    for run, sizes in (("typed", ("train.batch_size=2", "train.global_batch=4")), ("auto", (AUTO,))):
        ended = train_on_ranks(tiny_run(*sizes, *options, run=run), tmp_path, 2)
        assert [rank.code for rank in ended] == [0, 0], ended
    assert_same_run(tmp_path / "typed", tmp_path / "auto")
    assert choose(tiny_run, f"run_dir={tmp_path / 'auto'}") == (2, 4)
