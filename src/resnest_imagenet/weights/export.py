"""Writes the weights of a checkpoint for other programs."""

import hashlib
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor

from resnest_imagenet.checkpoint import save_checkpoint
from resnest_imagenet.errors import ConfigError
from resnest_imagenet.files import require_writable
from resnest_imagenet.models.resnest import ResNeStSpec
from resnest_imagenet.models.zoo import ARCHITECTURES, PeerSpec
from resnest_imagenet.weights.layouts import rename, rename_deeplab
from resnest_imagenet.weights.load import Weights, match_tensors, read_weights
from resnest_imagenet.weights.segmentation import SEGMENTATION, restore_deeplab


def export_weights(
    source: Weights | str | PathLike[str],
    out: str | PathLike[str] | None = None,
    *,
    model: str | None = None,
    weights: str = "auto",
    layout: str = "official",
    form: str = "safetensors",
) -> str:
    """Write a bare state dict in a layout and format; return a line about the file.

    Args:
        source: a checkpoint, a file of weights, or published weights; or the result of `read_weights` for one.
        out: the file; None: MODEL-LAYOUT.FORMAT.
        model: name of the network; None if the weights include it.
        weights: "model", "ema" or "auto".
        layout: "official", "timm", "mmpretrain", "mmsegmentation" or "detectron2" (both without the classifier).
        form: "safetensors" or "pth".

    Raises:
        UserError: a user's error, in one line.
    """
    loaded = source if isinstance(source, Weights) else read_weights(source, weights)
    name, tensors = match_tensors(loaded, model)
    require_layout(layout, name, loaded.source)
    if layout != "official" and name not in ARCHITECTURES:
        raise ConfigError(f"layout={layout} is known for this project's networks, and {loaded.source} holds a {name}")
    file = choose_file(loaded.source, out, f"{name}-{layout}.{form}")
    renamed = {rename(key, layout): value for key, value in tensors.items()}
    return write_tensors(file, {key: value for key, value in renamed.items() if key}, describe_weights(loaded, name))


def export_deeplab(
    source: Weights | str | PathLike[str],
    out: str | PathLike[str] | None = None,
    *,
    weights: str = "auto",
    layout: str = "official",
    form: str = "safetensors",
) -> str:
    """Write a bare state dict of a DeepLabV3; return a line about the file.

    A run can start from it (train.init_from=...) if its classes are the same, in the same order. The mmsegmentation
    layout has only the backbone: its head has a 3x3 convolution where this head has a 1x1 and another 3x3.

    Args:
        source: a checkpoint of a run of segmentation, or the result of `read_weights` for one.
        out: the file; None: deeplabv3_MODEL-official.FORMAT.
        weights: "model", "ema" or "auto".
        layout: "official" (PyTorch-Encoding's names) or "mmsegmentation".
        form: "safetensors" or "pth".

    Raises:
        UserError: a user's error, in one line.
    """
    if layout not in ("official", "mmsegmentation"):
        raise ConfigError(
            f"layout={layout} is of classification: a DeepLabV3 takes official (PyTorch-Encoding's) or mmsegmentation"
        )
    loaded = source if isinstance(source, Weights) else read_weights(source, weights, (SEGMENTATION,))
    network = restore_deeplab(loaded)
    file = choose_file(loaded.source, out, f"deeplabv3_{loaded.model}-{layout}.{form}")
    words = describe_deeplab(loaded)
    if layout == "official":
        tensors = {rename_deeplab(key, "encoding"): value for key, value in network.state_dict().items()}
        return write_tensors(file, tensors, words)
    assert loaded.model
    require_layout(layout, loaded.model, loaded.source)
    renamed = {rename(key, layout): value for key, value in network.backbone.state_dict().items()}
    tensors = {key: value for key, value in renamed.items() if key}
    return write_tensors(
        file, tensors, f"the backbone alone of {words} (the heads of mmsegmentation have other layers)"
    )


def require_layout(layout: str, name: str, source: str) -> None:
    """Raise a ConfigError if a layout has no names for a network's tensors."""
    if layout not in ("official", "timm") and not isinstance(ARCHITECTURES.get(name), ResNeStSpec):
        raise ConfigError(f"layout={layout} is known for ResNeSts, and {source} holds a {name}")
    spec = ARCHITECTURES.get(name)
    if layout == "timm" and isinstance(spec, PeerSpec) and spec.strides_first:
        raise ConfigError(f"layout=timm: timm's {spec.timm_name} has other strides than {name}: use layout=official")


def write_tensors(file: Path, tensors: dict[str, Tensor], words: str) -> str:
    """Write a state dict; return a line about the file, with some words about the network."""
    # Contiguous, whatever memory format training used, and not views of larger storages.
    content = {key: value.clone(memory_format=torch.contiguous_format) for key, value in tensors.items()}
    save_checkpoint(content, file)
    return f"wrote {file}: {words}, {len(content)} tensors, SHA-256 {digest(file)}"


def choose_file(source: str | PathLike[str], out: str | PathLike[str] | None, default: str) -> Path:
    """Return the file to write; it must have the default's suffix.

    Args:
        source: the checkpoint that is exported.
        out: the user's choice, or None.
        default: the file if there is no choice.

    Raises:
        ConfigError: it has another suffix, cannot be written, or is the source itself.
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
    """Raise a ConfigError if the file to be written is the source itself.

    Args:
        source: the checkpoint that is exported.
        out: the file or folder that the user chose, for the message.
        file: the file to be written.
    """
    if file.exists() and Path(source).exists() and file.samefile(source):
        raise ConfigError(f"out={out} is the checkpoint itself: set another name")


def describe_weights(weights: Weights, name: str) -> str:
    """Return the exported network in words, with its classes if they are the outputs' numbers in another order."""
    words = f"moving average of {name}" if weights.is_average else name
    classes, numbers = weights.classes or [], [str(output) for output in range(len(weights.classes or []))]
    if classes != numbers and set(classes) == set(numbers):
        words += f" with its outputs for the classes {', '.join(classes[:8])}, ..."
    of_its_own = {"mean": weights.mean, "std": weights.std}
    pixels = [f"{name} {values}" for name, values in of_its_own.items() if values is not None]
    return f"{words} for pixels of {' and '.join(pixels)}" if pixels else words


def describe_deeplab(weights: Weights) -> str:
    """Return the exported network of segmentation in words."""
    name = f"DeepLabV3 on {weights.model} with {len(weights.classes or ())} classes"
    return f"moving average of {name}" if weights.is_average else name


def digest(file: Path) -> str:
    """Return a file's SHA-256."""
    return hashlib.sha256(file.read_bytes()).hexdigest()
