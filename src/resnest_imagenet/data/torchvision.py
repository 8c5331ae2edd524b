"""The torchvision loader: worker processes decode and crop, the device normalises."""

import gc
import os
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from resnest_imagenet.data.folder import ImageFolder, name_unreadable
from resnest_imagenet.data.plan import BatchPlan
from resnest_imagenet.data.transforms import MEAN, STD, EvalTransform, TrainTransform
from resnest_imagenet.errors import DataError


class _Samples(Dataset[tuple[Tensor, int]]):
    """Cropped images as uint8 (3, crop, crop) with their labels, by (epoch, index)."""

    def __init__(self, folder: ImageFolder, transform: TrainTransform | EvalTransform) -> None:
        self.folder = folder
        self.transform = transform

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        epoch, index = key
        image = decode_image(os.fsdecode(self.folder.path(index)), ImageReadMode.RGB)
        if isinstance(self.transform, TrainTransform):
            crop = _train_crop(image, self.transform, epoch, index)
        else:
            crop = _eval_crop(image, self.transform)
        return crop, int(self.folder.labels[index])


def _train_crop(image: Tensor, transform: TrainTransform, epoch: int, index: int) -> Tensor:
    draw = transform.draw(epoch, index)
    height, width = image.shape[-2:]
    window = transform.window(height, width, draw)
    # Without antialiasing, as in the Gluon recipe.
    crop = F.resized_crop(image, *window, size=[transform.crop] * 2, antialias=False)
    return F.horizontal_flip(crop) if draw[0] else crop


def _eval_crop(image: Tensor, transform: EvalTransform) -> Tensor:
    if transform.order == "crop_resize":
        image = F.crop(image, *transform.square(*image.shape[-2:]))
        return _resize(image, transform.crop, transform.crop, transform)
    height, width = transform.resized(*image.shape[-2:])
    return F.crop(_resize(image, height, width, transform), *transform.window(height, width))


def _resize(image: Tensor, height: int, width: int, transform: EvalTransform) -> Tensor:
    """Resize uint8 (3, H, W), in the filters that DALI has too."""
    if transform.filter == "bilinear" or transform.antialias:
        mode = InterpolationMode(transform.filter)
        return F.resize(image, [height, width], mode, antialias=transform.antialias)
    # Without antialiasing torch's bicubic is another kernel than with it (a = -3/4, not -1/2), and than DALI's.
    rows, columns = _cubic_weights(image.shape[-2], height), _cubic_weights(image.shape[-1], width)
    return (rows @ image.float() @ columns.T).round_().clamp_(0, 255).to(torch.uint8)


def _cubic_weights(size: int, resized: int) -> Tensor:
    """Return what each input pixel gives to each output pixel: float32 (resized, size).

    Keys' cubic convolution (1981) with a = -1/2; beyond the edges the last pixel is repeated.
    """
    centres = (torch.arange(resized)[:, None] + 0.5) * size / resized - 0.5
    pixels = centres.floor() + torch.arange(-1, 3)
    d = (centres - pixels).abs()
    weights = torch.where(d < 1, (1.5 * d - 2.5) * d**2 + 1, ((2.5 - 0.5 * d) * d - 4) * d + 2)
    return torch.zeros(resized, size).scatter_add_(1, pixels.long().clamp_(0, size - 1), weights)


class _Keys:
    """The batch sampler: an epoch's batches of (epoch, index), set before each pass."""

    def __init__(self, plan: BatchPlan) -> None:
        self.plan = plan
        self.epoch = 0
        self.start = 0

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for indices in self.plan.batches(self.epoch, self.start):
            yield [(self.epoch, index) for index in indices.tolist()]


class TorchvisionLoader:
    """Implements `data.loader.Loader` with torchvision's decoder and torch's DataLoader."""

    def __init__(
        self,
        folder: ImageFolder,
        plan: BatchPlan,
        transform: TrainTransform | EvalTransform,
        device: torch.device,
        workers: int,
    ) -> None:
        self.plan = plan
        self._folder = folder
        self._device = device
        self._keys = _Keys(plan)
        self._loader = DataLoader(
            _Samples(folder, transform),
            batch_sampler=self._keys,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=device.type == "cuda",
        )
        self._mean = torch.tensor(MEAN, device=device).view(1, 3, 1, 1)
        self._std = torch.tensor(STD, device=device).view(1, 3, 1, 1)

    def batches(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        self._keys.epoch, self._keys.start = epoch, start
        # Frozen objects are not collected: a forked worker that collected the parent's garbage would run destructors
        # there, and one that waits for a thread, as DALI's do, would wait for ever.
        gc.freeze()
        batches = iter(self._loader)
        gc.unfreeze()
        for indices in self.plan.batches(epoch, start):
            try:
                images, labels = next(batches)
            except RuntimeError as error:
                raise self._explain(indices, error) from error
            images = images.to(self._device, non_blocking=True, memory_format=torch.channels_last)
            yield images.float().sub_(self._mean).div_(self._std), labels.to(self._device, non_blocking=True)

    def _explain(self, indices: np.ndarray, error: RuntimeError) -> Exception:
        """Name the file behind a failed batch; any other failure stays what it is."""
        unreadable = name_unreadable(self._folder.path(index) for index in indices)
        return DataError(unreadable) if unreadable else error
