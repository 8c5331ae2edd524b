"""Reads a folder with weights and their description as if it were the checkpoint that they come from."""

import json
from pathlib import Path
from typing import Any

from resnest_imagenet.checkpoint import load_checkpoint
from resnest_imagenet.errors import CheckpointError
from resnest_imagenet.weights.sources import SETTINGS

TENSORS, README = "model.safetensors", "README.md"
# The entries of a run's checkpoint that describe its network; there is also "palette" if the masks have one.
ENTRIES = ("task", "config", "classes", "epoch")


def read_folder(folder: Path) -> dict[str, Any]:
    """Return the content of a checkpoint: the entries of config.json, and the tensors as "model".

    Args:
        folder: of `export_deeplab_folder` or `export_rcnn_folder`.

    Raises:
        CheckpointError: it is not such a folder, or its files are missing, unreadable or damaged.
    """
    try:
        content = json.loads((folder / SETTINGS).read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / SETTINGS}: cannot be read ({error}): export the network again") from error
    if not isinstance(content, dict) or not set(ENTRIES) <= content.keys():
        raise CheckpointError(
            f"{folder}: not a folder with a network of segmentation or detection: give its file of weights, "
            f"{folder / TENSORS}, and the network's name"
        )
    return {**content, "model": load_checkpoint(folder / TENSORS)}
