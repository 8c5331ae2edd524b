"""Upgrades checkpoints of earlier versions when they are read."""

from typing import Any

from resnest_imagenet.earlier import upgrade_identity
from resnest_imagenet.training.losses import TOTAL


def upgrade_checkpoint(saved: dict[str, Any]) -> dict[str, Any]:
    """Return a run's checkpoint in the form of this version; other content is returned as it is."""
    identity, circumstances = saved.get("identity"), saved.get("circumstances")
    if isinstance(circumstances, dict):
        saved = {**saved, "circumstances": {"train.deterministic": False, **circumstances}}
    if not isinstance(identity, dict):
        return saved
    if "task" in saved:
        complete = upgrade_identity(identity)
        return saved if complete == identity else {**saved, "identity": complete}
    return {
        "history": [],
        **saved,
        "task": "classification",
        "metric": "top1",
        **({"best": saved["best_top1"]} if "best_top1" in saved else {}),  # a run's checkpoint has it
        "loss_sums": [{TOTAL: value} for value in saved.get("loss_sums", [])],
        "identity": upgrade_identity(identity),
    }
