"""A checkpoint of the version before resumes: its form, written from one of today's."""

import pytest
from faulty_task import Fault
from forked import ask_to_stop

from conftest import ALONE, newest_checkpoint
from resnest_imagenet.checkpoint import load_checkpoint, save_checkpoint
from resnest_imagenet.config import EvalConfig
from resnest_imagenet.errors import CheckpointError, Stopped
from resnest_imagenet.training.losses import TOTAL
from resnest_imagenet.training.train import train
from resnest_imagenet.training.upgrade import upgrade_checkpoint
from run_files import assert_equal, assert_same_run, without_clock

# The names that the version before had in an identity and in the configuration, and its options that are new today.
OLD_NAMES = {"lr": "lr_per_256"}
NEW = ("task", "steps", "milestones", "poly_power", "reference_batch", "head_lr_factor", "warmup_steps", "warmup_start")
NEW += ("optimizer", "betas", "eps", "decay_biases", "clip_norm", "clip_value")


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
    old = {name: value for name, value in saved.items() if name not in ("task", "metric", "best")}
    return old | {
        "optimizer": {**saved["optimizer"], "param_groups": groups},
        "best_top1": saved["best"],
        "loss_sums": [sums[TOTAL] for sums in saved["loss_sums"]],
        "identity": identity,
        "config": config,
    }


# What the version before has in a checkpoint of a run with the moving average (a run of commit d27acea, 1 step).
KEYS = {"model", "ema", "ema_updates", "optimizer", "scaler", "step", "epoch", "best_top1", "skipped", "loss_sums"}
KEYS |= {"steps_summed", "bad_images", "history", "identity", "circumstances", "config", "classes"}
