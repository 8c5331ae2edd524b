"""Checkpoint files: plain containers and tensors, written atomically, verified when read."""

import warnings
import zipfile
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from resnest_imagenet.errors import CheckpointError, DamagedCheckpointError
from resnest_imagenet.files import replacing


def save_checkpoint(content: dict[str, Any], path: Path) -> None:
    """Write a file whole or not at all.

    A .safetensors file holds contiguous tensors only, any other suffix means torch's format.

    Raises:
        StorageError: it cannot be written; what was there before still is.
    """
    with replacing(path) as file:
        if path.suffix == ".safetensors":
            file.write(safetensors.torch.save(content, metadata={"format": "pt"}))
        else:
            torch.save(content, file)


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a file onto the CPU, without executing anything in it.

    Damage is found by the checksums of torch's zip format; older files and .safetensors have none.

    Raises:
        CheckpointError: missing, or not to be read.
        DamagedCheckpointError: damaged, or holding more than plain containers and tensors.
    """
    try:
        if not Path(path).is_file():
            raise CheckpointError(f"{path}: no such checkpoint")
        if Path(path).suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        # torch.load does not look at the checksums: a flipped bit would load in silence.
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
            if damaged:
                raise DamagedCheckpointError(f"{path}: damaged ({damaged} fails its checksum)")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old formats, and of what is refused below
            content = torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error
    except Exception as error:  # what torch's unpickler raises on foreign bytes has no common type
        raise DamagedCheckpointError(f"{path}: not a readable checkpoint of plain containers and tensors") from error
    if not isinstance(content, dict):
        raise DamagedCheckpointError(f"{path}: holds a {type(content).__name__}, not a state dict")
    return content
