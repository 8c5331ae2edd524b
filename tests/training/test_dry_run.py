import re

import pytest

from conftest import newest_checkpoint, run_module
from resnest_imagenet.errors import CheckpointError, ConfigError, DataError
from resnest_imagenet.training.dry_run import count_checkpoint_bytes, describe_run
from resnest_imagenet.training.train import train


def parse(plan):
    return {line[:14].strip(): line[15:] for line in plan.splitlines()}


def test_the_plan_is_what_the_run_does(small_run, tmp_path):
    config = small_run("loader=torchvision")
    plan = parse(describe_run(config))
    assert not (tmp_path / "run").exists()
    assert plan["data"].startswith("103 training and 40 val images")
    assert plan["loader"].startswith("torchvision: a first batch (16, 3, 32, 32) on cpu")
    assert plan["steps"] == "12, 6 in each of 2 epochs; of 16 images, 16 x 1 ranks x 1 passes"
    assert plan["start"] == f"from scratch in {tmp_path / 'run'}"
    state = train(config)
    assert state.step == 12
    assert parse(describe_run(config))["start"] == f"finished: best top-1 {state.best_top1:.2f} %, nothing to do"
    other = ("loader=torchvision", "seed=3", "train.momentum=0.8")
    differences = r"was trained with train\.momentum=0\.9, not 0\.8; seed=0, not 3"
    with pytest.raises(CheckpointError, match=differences):
        describe_run(small_run(*other))
    aside = parse(describe_run(small_run(*other, "checkpoint.on_mismatch=set_aside")))["start"]
    assert re.search(f"^from scratch: .*{differences}, and is set aside$", aside)
    (tmp_path / "run/earlier-1.moving").mkdir()  # as a process leaves it that is killed while it sets the run aside
    assert parse(describe_run(config))["start"] == f"from scratch in {tmp_path / 'run'}"
    (tmp_path / "run/earlier-1.moving").rmdir()
    newest_checkpoint(tmp_path / "run").write_bytes(b"web page")
    assert parse(describe_run(config))["start"].startswith("from the one before the newest: ")


@pytest.mark.parametrize("option", ["train.ema_decay=null", "train.ema_decay=0.9"])
def test_a_checkpoint_is_as_large_as_said(small_run, tmp_path, option):
    config = small_run("loader=torchvision", "train.epochs=1", "train.warmup_epochs=0", option, "model.num_classes=10")
    train(config)
    size = newest_checkpoint(tmp_path / "run").stat().st_size
    assert count_checkpoint_bytes(config) == pytest.approx(size, rel=0.01)


def test_it_refuses_what_the_run_would(small_run, tmp_path):
    (tmp_path / "file").touch()
    for option, error, words in (
        ("model.num_classes=7", ConfigError, "model.num_classes=7"),
        ("data.root=/nowhere", DataError, "no such folder"),
        ("train.global_batch=8192", DataError, "do not fill a step"),
        ("train.global_batch=17", ConfigError, "no multiple"),
        ("train.init_from=/nope.pth", CheckpointError, "no such checkpoint"),
        (f"run_dir={tmp_path}/file/x", ConfigError, "cannot be written"),
    ):
        with pytest.raises(error, match=words):
            describe_run(small_run(option))


@pytest.mark.process
def test_two_ranks(demo_images, tmp_path):
    words = ["+experiment=demo", "device=cpu", f"data.root={demo_images}", "train.crop=32", "train.batch_size=16"]
    words += ["loader=torchvision", "loader.workers=1", "dry_run=true"]
    done = run_module("resnest_imagenet.commands.train", *words, ranks=2, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (steps,) = re.findall(r"^steps .*$", done.stdout, re.MULTILINE)  # of one rank
    assert steps.endswith("of 32 images, 16 x 2 ranks x 1 passes")
    assert list(tmp_path.iterdir()) == []
