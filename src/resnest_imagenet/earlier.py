"""What becomes of the recipes that earlier versions wrote."""

from collections.abc import Mapping
from typing import Any

# The options whose names have changed, with their new names.
RENAMED = {"lr_per_256": "lr"}
# Values of older runs, which did not have these options.
_IMPLIED: dict[str, Any] = {
    "task": "classification",
    "steps": None,
    "milestones": None,
    "poly_power": 0.9,
    "reference_batch": 256,
    "head_lr_factor": 1.0,
    "warmup_steps": None,
    "warmup_start": 0.0,
    "optimizer": "sgd",
    "betas": [0.9, 0.999],
    "eps": 1e-8,
    "decay_biases": False,
    "clip_norm": None,
    "clip_value": None,
    "deterministic": False,
    "layer_decay": 1.0,
    "ema_warmup": False,
    "patience": None,
}
# The same for options of `ClassificationRecipe` alone.
_IMPLIED_FOR_CLASSES: dict[str, Any] = {
    "flips": "horizontal",
    "mean": None,
    "std": None,
    "class_weights": None,
    "drop_path": 0.0,
    "freeze": 0,
}


def upgrade_recipe(training: Mapping[str, Any]) -> dict[str, Any]:
    """Return a recipe's values under today's names, and the values that an earlier version implied.

    Args:
        training: "train" of a checkpoint, a results file or a config.yaml of any version; values may be missing.
    """
    of_classes = _IMPLIED_FOR_CLASSES if "mixup_alpha" in training else {}
    return {**_IMPLIED, **of_classes, **{RENAMED.get(name, name): value for name, value in training.items()}}


def upgrade_identity(identity: Mapping[str, Any]) -> dict[str, Any]:
    """Do the same with the recipe in a run's identity, whose keys are option names such as "train.lr"."""
    training = {name.partition(".")[2]: value for name, value in identity.items() if name.startswith("train.")}
    others = {name: value for name, value in identity.items() if not name.startswith("train.")}
    return {**others, **{f"train.{name}": value for name, value in upgrade_recipe(training).items()}}
