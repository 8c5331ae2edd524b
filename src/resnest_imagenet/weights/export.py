"""Weights out of a checkpoint, for other programs."""

import hashlib
from os import PathLike
from pathlib import Path

import torch

from resnest_imagenet.checkpoint import save_checkpoint
from resnest_imagenet.errors import ConfigError
from resnest_imagenet.files import require_writable
from resnest_imagenet.models.resnest import ResNeStSpec
from resnest_imagenet.models.zoo import ARCHITECTURES, PeerSpec
from resnest_imagenet.weights.layouts import rename
from resnest_imagenet.weights.load import Weights, match_tensors, read_weights


def export_weights(
    source: str | PathLike[str],
    out: str | PathLike[str] | None = None,
    *,
    model: str | None = None,
    weights: str = "auto",
    layout: str = "official",
    form: str = "safetensors",
) -> str:
    """Write a bare state dict in the layout and format asked for; return a line about the file.

    Args:
        source: a checkpoint, a file of weights, or published weights.
        out: the file; None: MODEL-LAYOUT.FORMAT.
        model: name of the network; None where the weights tell.
        weights: "model", "ema" or "auto".
        layout: "official", "timm", "mmpretrain" or "detectron2" (without the classifier).
        form: "safetensors" or "pth".

    Raises:
        UserError: for what a user can cause, as one line.
    """
    loaded = read_weights(source, weights)
    name, tensors = match_tensors(loaded, model)
    if layout in ("mmpretrain", "detectron2") and not isinstance(ARCHITECTURES.get(name), ResNeStSpec):
        raise ConfigError(f"layout={layout} is known for ResNeSts, and {source} holds a {name}")
    if layout != "official" and name not in ARCHITECTURES:
        raise ConfigError(f"layout={layout} is known for this project's networks, and {source} holds a {name}")
    spec = ARCHITECTURES.get(name)
    if layout == "timm" and isinstance(spec, PeerSpec) and spec.strides_first:
        raise ConfigError(f"layout=timm: timm's {spec.timm_name} has other strides than {name}: use layout=official")
    file = choose_file(source, out, f"{name}-{layout}.{form}")
    renamed = {rename(key, layout): value for key, value in tensors.items()}
    # Contiguous, whatever layout training used, and no views of larger memory.
    content = {key: value.clone(memory_format=torch.contiguous_format) for key, value in renamed.items() if key}
    save_checkpoint(content, file)
    return f"wrote {file}: {describe_weights(loaded, name)}, {len(content)} tensors, SHA-256 {digest(file)}"


def choose_file(source: str | PathLike[str], out: str | PathLike[str] | None, default: str) -> Path:
    """Return the file to write, of the default's suffix.

    Args:
        source: what is exported.
        out: the file that was asked for.
        default: the file where none was.

    Raises:
        ConfigError: it has another one, cannot be written, or is the source itself.
    """
    file, suffix = Path(out or default), Path(default).suffix
    if file.suffix != suffix:
        raise ConfigError(f"out={file} does not end in {suffix}: set format=... or another name")
    require_other(source, out or file, file)
    require_writable(file, "out")
    if file.exists() and not file.is_file():  # its digest is read back
        raise ConfigError(f"out={file}: not a file")
    return file


def require_other(source: str | PathLike[str], out: str | PathLike[str], file: Path) -> None:
    """Raise a ConfigError where a file to be written is the source itself.

    Args:
        source: what is exported.
        out: the file or folder that was asked for, for the message.
        file: the file.
    """
    if file.exists() and Path(source).exists() and file.samefile(source):
        raise ConfigError(f"out={out} is the checkpoint itself: set another name")


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
