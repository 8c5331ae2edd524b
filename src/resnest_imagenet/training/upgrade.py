"""Checkpoints of the versions before: brought to today's form when they are read."""

from typing import Any

from resnest_imagenet.config import upgrade_recipe
from resnest_imagenet.training.losses import TOTAL

_OPTION = "train."


def upgrade_checkpoint(saved: dict[str, Any]) -> dict[str, Any]:
    """Return a run's checkpoint as this version writes it; what is none of a run's is returned as it is."""
    identity = saved.get("identity")
    if "task" in saved or not isinstance(identity, dict):
        return saved
    recipe = {name.removeprefix(_OPTION): value for name, value in identity.items() if name.startswith(_OPTION)}
    others = {name: value for name, value in identity.items() if not name.startswith(_OPTION)}
    sums = saved.get("loss_sums", [])
    return {
        "history": [],
        **saved,
        "task": "classification",
        "metric": "top1",
        "best": saved.get("best_top1"),
        "loss_sums": [{TOTAL: value} for value in sums],
        "identity": {f"{_OPTION}{name}": value for name, value in upgrade_recipe(recipe).items()} | others,
    }
