"""Writes a folder with weights and their description; `weights.folders` reads it."""

import json
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor

from resnest_imagenet.checkpoint import save_checkpoint
from resnest_imagenet.files import require_writable, write_atomically
from resnest_imagenet.weights.export import digest, require_other
from resnest_imagenet.weights.folders import README, TENSORS
from resnest_imagenet.weights.hub import read_score
from resnest_imagenet.weights.hub_push import push_folder
from resnest_imagenet.weights.load import Weights
from resnest_imagenet.weights.sources import SETTINGS


def export_folder(
    weights: Weights,
    tensors: dict[str, Tensor],
    card: Mapping[str, str],
    readme: str,
    out: str | PathLike[str] | None,
    *,
    name: str,
    words: str,
    takers: str,
    push: str | None = None,
) -> str:
    """Write model.safetensors, config.json and README.md; return a line about the folder.

    Args:
        weights: of a run's checkpoint.
        tensors: of its network.
        card: the description for other programs.
        readme: the text for people, with places for what the card has and for name, words, score and settings.
        out: the folder; None: NAME-hub.
        name: of the network.
        words: the same, for people.
        takers: what takes the folder.
        push: a repository of the Hugging Face hub, OWNER/NAME, to which the folder is sent; or None.

    Raises:
        UserError: it is the source itself, or cannot be written.
    """
    folder, score = Path(out or f"{name}-hub"), read_score(weights)
    score = f"- {score}\n" if score else ""
    text = readme.format(**card, name=name, words=words, score=score, settings=SETTINGS)
    file = _write_folder(folder, weights, tensors, card, text)
    sent = f"\n{push_folder(folder, push)}" if push else ""
    return (
        f"wrote {folder}: {words}; {TENSORS} has {len(tensors)} tensors, SHA-256 {digest(file)}: "
        f"{takers} take the folder{sent}"
    )


def _write_folder(
    folder: Path, weights: Weights, tensors: dict[str, Tensor], card: Mapping[str, str], readme: str
) -> Path:
    """Write the three files; return that of the weights."""
    file, settings = folder / TENSORS, folder / SETTINGS
    for path in (folder, file):
        require_other(weights.source, folder, path)
    require_writable(settings, "out")
    # Write the settings last: the folder is not read without them, so old settings never come with new weights.
    settings.unlink(missing_ok=True)
    save_checkpoint(tensors, file)
    for path, text in ((folder / README, readme), (settings, _describe_run(weights, card, tensors))):
        with write_atomically(path) as opened:
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
