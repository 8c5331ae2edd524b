"""A checkpoint of the version before resumes: its form, written from one of today's."""

import shutil

import pytest

from conftest import evaluate_checkpoint, newest_checkpoint
from resnest_imagenet.checkpoint import load_checkpoint, save_checkpoint
from resnest_imagenet.errors import CheckpointError
from resnest_imagenet.training.losses import TOTAL
from resnest_imagenet.training.train import train
from resnest_imagenet.training.upgrade import upgrade_checkpoint
from run_files import assert_same_run, read_events

# The names that the version before had in an identity and in the configuration, and its options that are new today.
OLD_NAMES = {"lr": "lr_per_256"}
NEW = ("task", "steps", "milestones", "poly_power", "reference_batch", "head_lr_factor", "warmup_steps", "warmup_start")
NEW += ("optimizer", "betas", "eps", "decay_biases", "clip_norm", "clip_value", "deterministic")
# Those of a later version, of which an identity has all but patience.
NEWER = ("layer_decay", "ema_warmup", "patience", "flips", "mean", "std", "class_weights", "drop_path", "freeze")
NEW += NEWER


def write_as_before(saved):
    """Return a checkpoint as the version before wrote it (commit d27acea)."""
    recipe = {OLD_NAMES.get(n, n): value for n, value in saved["config"]["train"].items() if n not in NEW}
    identity = {}
    for name, value in saved["identity"].items():
        option = name.removeprefix("train.")
        if name.startswith("train.") and option not in NEW:
            identity[f"train.{OLD_NAMES.get(option, option)}"] = value
        elif not name.startswith("train."):
            identity[name] = value
    config = {**saved["config"], "train": recipe, "eval": {"crop": saved["config"]["eval"]["crop"]}}
    groups = [{k: v for k, v in group.items() if k != "lr_factor"} for group in saved["optimizer"]["param_groups"]]
    old = {name: value for name, value in saved.items() if name not in ("task", "metric", "best", "stale")}
    return old | {
        "optimizer": {**saved["optimizer"], "param_groups": groups},
        "best_top1": saved["best"],
        "loss_sums": [sums[TOTAL] for sums in saved["loss_sums"]],
        "identity": identity,
        "config": config,
    }


# What a checkpoint of that version has, and which options are in its identity.
KEYS = {"model", "ema", "ema_updates", "optimizer", "scaler", "step", "epoch", "best_top1", "skipped", "loss_sums"}
KEYS |= {"steps_summed", "bad_images", "history", "identity", "circumstances", "config", "classes"}
OPTIONS = """
    antialias crop cropping cutmix_alpha decay_all dropblock dropout ema_decay epochs erasing global_batch
    init init_from interpolation jitter label_smoothing lighting lr_per_256 min_crop_area mixup_alpha
    mixup_partner mixup_per_sample momentum nesterov pixel_shift policy precision schedule step_epochs
    step_factor warmup_epochs weight_decay zero_gamma
"""


def test_a_checkpoint_without_the_options_of_fine_tuning_resumes_bit_for_bit(tiny_run, tmp_path, capsys):
    """Whatever the task: TinyTask's recipe has the options of classification."""
    options = ("train.ema_decay=0.9", "train.dropout=0.2", "checkpoint.every_steps=4", "checkpoint.keep=99")
    train(tiny_run(*options, run="whole"))
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    for later in sorted((tmp_path / "run/checkpoints").glob("step-*.pt"))[1:]:
        later.unlink()
    saved = load_checkpoint(newest_checkpoint(tmp_path / "run"))
    del saved["stale"]
    for name in NEWER:
        del saved["config"]["train"][name]
        assert (saved["identity"].pop(f"train.{name}", None) is None) == (
            name in ("patience", "mean", "std", "class_weights")
        )
    save_checkpoint(saved, newest_checkpoint(tmp_path / "run"))
    with pytest.raises(CheckpointError, match="was trained with train.flips=horizontal, not both: choose another"):
        train(tiny_run(*options, "train.flips=both"))
    capsys.readouterr()
    train(tiny_run(*options))
    assert capsys.readouterr().out.startswith("resuming after step 4, 0 epochs done\n")
    assert_same_run(tmp_path / "whole", tmp_path / "run")


@pytest.mark.slow
def test_a_checkpoint_of_the_version_before_resumes_bit_for_bit(small_run, evaluation_of, tmp_path, capsys):
    options = (
        "train.ema_decay=0.9",
        "train.epochs=1",
        "train.warmup_epochs=0",
        "train.dropout=0.2",
        "loader.workers=0",
    )
    options += ("loader=torchvision", "log.every_steps=5", "log.trackers=[]", "checkpoint.every_steps=4")
    whole, run = tmp_path / "whole", tmp_path / "run"
    train(small_run(*options, run="whole"))
    shutil.copytree(whole, run)
    newest_checkpoint(run).unlink()
    old = write_as_before(load_checkpoint(newest_checkpoint(run)))
    assert old.keys() == KEYS
    assert {name for name in old["identity"] if name.startswith("train.")} == {f"train.{o}" for o in OPTIONS.split()}
    save_checkpoint(old, newest_checkpoint(run))
    with pytest.raises(CheckpointError, match="was trained with train.clip_norm=null, not 1.0: choose another run_dir"):
        train(small_run(*options, "train.clip_norm=1.0"))
    capsys.readouterr()
    train(small_run(*options))
    printed = capsys.readouterr().out
    assert printed.startswith("resuming after step 4, 0 epochs done\n") and "no longer" not in printed
    assert_same_run(whole, run)

    # The best network of such a run, as commands read it.
    save_checkpoint(write_as_before(load_checkpoint(whole / "checkpoints/best.pt")), tmp_path / "best.pt")
    (result,) = evaluate_checkpoint(evaluation_of(tmp_path / "best.pt", "loader=torchvision", "loader.workers=0"))
    assert result.top1 == read_events(whole)[-1]["top1"]


def test_what_a_version_before_lacks_is_filled_in():
    old = {"identity": {"train.lr_per_256": 0.1, "seed": 3}, "best_top1": 70.5, "loss_sums": [1.5, 2.5], "step": 7}
    new = upgrade_checkpoint(old)
    assert (new["task"], new["metric"], new["best"], new["history"]) == ("classification", "top1", 70.5, [])
    assert new["loss_sums"] == [{"loss": 1.5}, {"loss": 2.5}]
    assert (new["identity"]["train.lr"], new["identity"]["seed"], new["identity"]["train.optimizer"]) == (0.1, 3, "sgd")
    assert upgrade_checkpoint(new) is new
    bare = {"model": {}}
    assert upgrade_checkpoint(bare) is bare
