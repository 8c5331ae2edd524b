"""Writes a folder with weights and their description; `weights.folders` reads it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from resnest_imagenet.checkpoint import save_checkpoint
from resnest_imagenet.files import replacing, require_writable
from resnest_imagenet.weights.export import require_other
from resnest_imagenet.weights.folders import README, TENSORS
from resnest_imagenet.weights.load import Weights
from resnest_imagenet.weights.sources import SETTINGS


def write_folder(
    folder: Path, weights: Weights, tensors: dict[str, Tensor], card: Mapping[str, str], readme: str
) -> Path:
    """Write model.safetensors, config.json and README.md; return the first.

    Args:
        folder: the folder to write.
        weights: of a run's checkpoint.
        tensors: of its network.
        card: the description for other programs.
        readme: the text for people.

    Raises:
        UserError: it is the source itself, or cannot be written.
    """
    file, settings = folder / TENSORS, folder / SETTINGS
    for path in (folder, file):
        require_other(weights.source, folder, path)
    require_writable(settings, "out")
    # Write the settings last: the folder is not read without them, so old settings never come with new weights.
    settings.unlink(missing_ok=True)
    save_checkpoint(tensors, file)
    for path, text in ((folder / README, readme), (settings, _describe_run(weights, card, tensors))):
        with replacing(path) as opened:
            opened.write(text.encode())
    return file


def _describe_run(weights: Weights, card: Mapping[str, str], tensors: dict[str, Tensor]) -> str:
    """Return the checkpoint's description of its network and the card, without paths of the run's machine."""
    run, training = weights.run, weights.training
    assert run and training
    shown = ("input", "output", "channels", "protocol", "mean", "std")
    content: dict[str, Any] = {
        "task": weights.task,
        "config": {
            "model": run["model"],
            "train": {name: value for name, value in training.items() if name != "init_from"},
            "protocol": run["protocol"],
            "data": {"kind": run["data"]["kind"]},
        },
        "classes": weights.classes,
        "palette": weights.palette,
        "category_ids": weights.category_ids,
        "epoch": weights.epoch,
        "card": {name: card[name] for name in shown if name in card},
        "parameters": sum(tensor.numel() for tensor in tensors.values() if tensor.is_floating_point()),
    }
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"
