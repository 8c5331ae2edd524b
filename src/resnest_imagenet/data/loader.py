"""The contract of a loader, and the choice of one and of its source."""

import importlib.util
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from resnest_imagenet import extensions
from resnest_imagenet.data.examine import count_cores
from resnest_imagenet.data.folder import read_image_folder
from resnest_imagenet.data.plan import BatchPlan
from resnest_imagenet.data.source import ImageSource
from resnest_imagenet.data.substitution import Substitution
from resnest_imagenet.data.transforms import MEAN, STD, EvalTransform, TrainTransform
from resnest_imagenet.data.webdataset import read_shards
from resnest_imagenet.errors import ConfigError, name_extra, suggest


class Loader(Protocol):
    """Batches of one rank.

    What a loader yields is a function of the plan, the epoch and the first batch, so a run resumes by asking for the
    batches that it has not seen. The bad images that were counted so far are its only state.
    """

    plan: BatchPlan
    substitution: Substitution

    def batches(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Any]]:
        """Yield (images, labels) from the rank's `start`-th batch of the epoch on.

        images: float32 (B, 3, crop, crop), normalised, channels_last in memory; labels: int64 (B,); both on the
        loader's device.

        Raises:
            DataError: for an image that cannot be decoded and may not be replaced, with its path.
        """
        ...


_KINDS = {"folder": read_image_folder, "webdataset": read_shards}
extensions.sources.reserve(_KINDS)


def to_pixels(images: Tensor) -> np.ndarray:
    """Return what a loader yields, normalised (B, 3, H, W), as it was before: uint8 (B, H, W, 3)."""
    values = images.float().permute(0, 2, 3, 1).cpu().numpy() * np.array(STD, np.float32) + np.array(MEAN, np.float32)
    return values.round().clip(0, 255).astype(np.uint8)


def open_source(kind: str, root: str, name: str, option: str) -> ImageSource:
    """List the images of one part of a data set.

    Args:
        kind: "folder", "webdataset" or a registered one (`extensions.register_source`).
        root: the data set's folder.
        name: the part's folder within it, e.g. "train".
        option: the option that names this part, for the error message.

    Raises:
        DataError: nothing there, or nothing that can be used.
        ConfigError: an unknown kind, or a registered one that fails.
    """
    outside = extensions.sources.find(kind)
    if outside is None and kind in _KINDS:
        return _KINDS[kind](root, name, option)
    if outside is None:
        valid = [*_KINDS, *extensions.sources.read()]
        raise ConfigError(f"unknown data.kind={kind}{suggest(kind, valid)} ({', '.join(valid)})")
    who = f"data.kind={kind} of {outside.origin}"
    with extensions.naming(who):
        images = outside.open(root, name, option)
    if not isinstance(images, ImageSource):
        raise ConfigError(f"{who}: it returned a {type(images).__name__}, not an ImageSource")
    return images


def choose_loader(name: str) -> str:
    """Resolve "auto" to "dali" where DALI is installed, else "torchvision".

    Raises:
        ConfigError: for "dali" where it is not installed.
    """
    if name == "torchvision":
        return name
    installed = importlib.util.find_spec("nvidia") is not None and importlib.util.find_spec("nvidia.dali") is not None
    if name == "dali" and not installed:
        raise ConfigError(f"loader=dali: DALI is not installed: set loader=auto, or add {name_extra('dali')}")
    return "dali" if installed else "torchvision"


def choose_workers(workers: int | None) -> int:
    """Resolve None to the cores that this process may use, at most 8."""
    return min(8, count_cores()) if workers is None else workers


def build_loader(
    name: str,
    images: ImageSource,
    plan: BatchPlan,
    transform: TrainTransform | EvalTransform,
    device: torch.device,
    workers: int | None = None,
    max_errors: int = 0,
) -> Loader:
    """Build a loader.

    Args:
        name: auto, dali or torchvision.
        images: where they are.
        plan: their order.
        transform: what is done to each.
        device: where the batches are wanted; DALI decodes there too.
        workers: DALI's threads or torchvision's processes; None: see `choose_workers`.
        max_errors: how many images that cannot be decoded may be replaced, see `Substitution`; with 0 the first is a
            DataError.

    Raises:
        ConfigError: for "dali" where it is not installed.
    """
    workers = choose_workers(workers)
    if choose_loader(name) == "dali":
        from resnest_imagenet.data.dali import DaliLoader

        return DaliLoader(images, plan, transform, device, workers, max_errors)
    from resnest_imagenet.data.torchvision import TorchvisionLoader

    return TorchvisionLoader(images, plan, transform, device, workers, max_errors)
