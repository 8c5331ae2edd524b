"""Weights out of a checkpoint, for other programs."""

import hashlib
from pathlib import Path

import torch

from resnest_imagenet.checkpoint import save_checkpoint
from resnest_imagenet.config import ExportConfig
from resnest_imagenet.errors import ConfigError
from resnest_imagenet.files import require_writable
from resnest_imagenet.models.resnest import ResNeStSpec
from resnest_imagenet.models.zoo import ARCHITECTURES
from resnest_imagenet.weights.layouts import rename
from resnest_imagenet.weights.load import match_tensors, read_weights


def export_weights(config: ExportConfig) -> str:
    """Write a bare state dict in the layout and format asked for; return a line about the file.

    Raises:
        UserError: for what a user can cause, as one line.
    """
    weights = read_weights(config.ckpt, config.weights)
    name, tensors = match_tensors(weights, config.model.name if config.model else None)
    if config.layout in ("mmpretrain", "detectron2") and not isinstance(ARCHITECTURES[name], ResNeStSpec):
        raise ConfigError(f"layout={config.layout} is known for ResNeSts, and {config.ckpt} holds a {name}")
    out = Path(config.out or f"{name}-{config.layout}.{config.format}")
    if out.suffix != f".{config.format}":
        raise ConfigError(f"out={out} does not end in .{config.format}: set format=... or another name")
    if out.exists() and Path(config.ckpt).exists() and out.samefile(config.ckpt):
        raise ConfigError(f"out={out} is the checkpoint itself: set another name")
    require_writable(out, "out")
    renamed = {rename(key, config.layout): value for key, value in tensors.items()}
    # Contiguous, whatever layout training used, and no views of larger memory.
    content = {key: value.clone(memory_format=torch.contiguous_format) for key, value in renamed.items() if key}
    save_checkpoint(content, out)
    digest = hashlib.sha256(out.read_bytes()).hexdigest()
    kind = "moving average of " if weights.is_average else ""
    return f"wrote {out}: {kind}{name}, {len(content)} tensors, SHA-256 {digest}"
