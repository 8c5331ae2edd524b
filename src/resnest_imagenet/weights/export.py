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
from resnest_imagenet.weights.load import Weights, match_tensors, read_weights


def export_weights(config: ExportConfig) -> str:
    """Write a bare state dict in the layout and format asked for; return a line about the file.

    Raises:
        UserError: for what a user can cause, as one line.
    """
    weights = read_weights(config.ckpt, config.weights)
    name, tensors = match_tensors(weights, config.model.name if config.model else None)
    if config.layout in ("mmpretrain", "detectron2") and not isinstance(ARCHITECTURES.get(name), ResNeStSpec):
        raise ConfigError(f"layout={config.layout} is known for ResNeSts, and {config.ckpt} holds a {name}")
    out = choose_file(config, f"{name}-{config.layout}.{config.format}")
    renamed = {rename(key, config.layout): value for key, value in tensors.items()}
    # Contiguous, whatever layout training used, and no views of larger memory.
    content = {key: value.clone(memory_format=torch.contiguous_format) for key, value in renamed.items() if key}
    save_checkpoint(content, out)
    return f"wrote {out}: {describe_weights(weights, name)}, {len(content)} tensors, SHA-256 {digest(out)}"


def choose_file(config: ExportConfig, default: str) -> Path:
    """Return the file to write, of the default's suffix.

    Raises:
        ConfigError: it has another one, cannot be written, or is the checkpoint itself.
    """
    out, suffix = Path(config.out or default), Path(default).suffix
    if out.suffix != suffix:
        raise ConfigError(f"out={out} does not end in {suffix}: set format=... or another name")
    require_other(config, out)
    require_writable(out, "out")
    if out.exists() and not out.is_file():  # its digest is read back
        raise ConfigError(f"out={out}: not a file")
    return out


def require_other(config: ExportConfig, file: Path) -> None:
    """Raise a ConfigError where a file to be written is the checkpoint itself."""
    if file.exists() and Path(config.ckpt).exists() and file.samefile(config.ckpt):
        raise ConfigError(f"out={config.out or file} is the checkpoint itself: set another name")


def describe_weights(weights: Weights, name: str) -> str:
    """Return what was exported, in words: with the classes, where these are numbers, but not those of the outputs."""
    words = f"moving average of {name}" if weights.is_average else name
    classes, numbers = weights.classes or [], [str(output) for output in range(len(weights.classes or []))]
    if classes != numbers and set(classes) == set(numbers):
        words += f" with its outputs for the classes {', '.join(classes[:8])}, ..."
    return words


def digest(file: Path) -> str:
    """Return a file's SHA-256."""
    return hashlib.sha256(file.read_bytes()).hexdigest()
