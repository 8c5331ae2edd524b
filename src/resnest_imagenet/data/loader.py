"""The contract of a loader, and the choice of a loader and its source."""

import importlib.util
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from resnest_imagenet import extensions
from resnest_imagenet.data.augment import NO_AUGMENTATION, Augmentation
from resnest_imagenet.data.examine import count_cores
from resnest_imagenet.data.folder import read_image_folder
from resnest_imagenet.data.plan import BatchPlan
from resnest_imagenet.data.source import ImageSource
from resnest_imagenet.data.substitution import Substitution
from resnest_imagenet.data.transforms import MEAN, STD, Colour, EvalTransform, TrainTransform
from resnest_imagenet.data.webdataset import read_shards
from resnest_imagenet.errors import ConfigError, name_extra, suggest


class Loader(Protocol):
    """Batches of one rank.

    The batches are a function of the plan, the epoch and the first batch's number, so a run resumes by asking for the
    batches that it has not seen. A loader's only state is the number of bad images so far.
    """

    plan: BatchPlan
    substitution: Substitution

    def batches(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Any]]:
        """Yield (images, labels) from the rank's `start`-th batch of the epoch on.

        images: float32 (B, 3, crop, crop), normalised, channels_last in memory; labels: int64 (B,); both on the
        loader's device.

        Raises:
            DataError: an image cannot be decoded and must not be replaced; names its path.
        """
        ...


_KINDS = {"folder": read_image_folder, "webdataset": read_shards}
extensions.sources.reserve(_KINDS)


def to_pixels(images: Tensor, mean: Colour = MEAN, std: Colour = STD) -> np.ndarray:
    """Return a loader's images, normalised (B, 3, H, W), as they were before: uint8 (B, H, W, 3)."""
    values = images.float().permute(0, 2, 3, 1).cpu().numpy() * np.array(std, np.float32) + np.array(mean, np.float32)
    return values.round().clip(0, 255).astype(np.uint8)


def open_source(kind: str, root: str, name: str, option: str) -> ImageSource:
    """List the images of one part of a data set.

    Args:
        kind: "folder", "webdataset" or a registered one (`extensions.register_source`).
        root: the data set's folder.
        name: the part's folder within it, e.g. "train".
        option: the option that names this part, for the error message.

    Raises:
        DataError: there is no data, or none that can be used.
        ConfigError: the kind is unknown, or a registered one fails.
    """
    outside = extensions.sources.find(kind)
    if outside is None and kind in _KINDS:
        return _KINDS[kind](root, name, option)
    if outside is None:
        valid = [*_KINDS, *extensions.sources.read()]
        raise ConfigError(f"unknown data.kind={kind}{suggest(kind, valid)} ({', '.join(valid)})")
    label = f"data.kind={kind} of {outside.origin}"
    with extensions.naming(label):
        images = outside.open(root, name, option)
    if not isinstance(images, ImageSource):
        raise ConfigError(f"{label}: it returned a {type(images).__name__}, not an ImageSource")
    return images


def choose_loader(name: str, augmentation: Augmentation = NO_AUGMENTATION, device: torch.device | None = None) -> str:
    """Resolve "auto" to the faster of "dali" and "torchvision", as docs/data.md measured them.

    That is DALI if it is installed, but not for operations on whole images on a CPU.

    Args:
        name: auto, dali or torchvision.
        augmentation: of the images.
        device: of the batches; None: one that suits DALI.

    Raises:
        ConfigError: for "dali" if it is not installed.
    """
    on_cpu = device is not None and device.type != "cuda"  # DALI works there, or on CUDA devices
    if name == "torchvision" or (name == "auto" and on_cpu and augmentation.slots_before):
        return "torchvision"
    installed = importlib.util.find_spec("nvidia") is not None and importlib.util.find_spec("nvidia.dali") is not None
    if name == "dali" and not installed:
        raise ConfigError(f"loader=dali: DALI is not installed: set loader=auto, or add {name_extra('dali')}")
    return "dali" if installed else "torchvision"


def choose_workers(workers: int | None) -> int:
    """Resolve None to the number of cores that this process may use, at most 8."""
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
        name: auto, dali or torchvision, see `choose_loader`.
        images: the source of the images.
        plan: their order.
        transform: applied to each image.
        device: of the batches; DALI decodes there too.
        workers: number of DALI's threads or torchvision's processes; None: see `choose_workers`.
        max_errors: how many images that cannot be decoded may be replaced, see `Substitution`; with 0 the first one
            raises a DataError.

    Raises:
        ConfigError: for "dali" if it is not installed.
    """
    workers = choose_workers(workers)
    augmentation = transform.augmentation if isinstance(transform, TrainTransform) else NO_AUGMENTATION
    if choose_loader(name, augmentation, device) == "dali":
        from resnest_imagenet.data.dali import DaliLoader

        return DaliLoader(images, plan, transform, device, workers, max_errors)
    from resnest_imagenet.data.torchvision import TorchvisionLoader

    return TorchvisionLoader(images, plan, transform, device, workers, max_errors)
