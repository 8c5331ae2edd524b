"""The torchvision loader: worker processes decode and crop, the device normalises."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from resnest_imagenet.data.decoding import decode
from resnest_imagenet.data.pillow_ops import apply_operations
from resnest_imagenet.data.plan import BatchPlan
from resnest_imagenet.data.source import ImageSource
from resnest_imagenet.data.substitution import Substitution
from resnest_imagenet.data.transforms import EvalTransform, TrainTransform
from resnest_imagenet.data.workers import Samples, WorkerLoader
from resnest_imagenet.torchvision_import import importing_torchvision

with importing_torchvision():
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.v2 import functional as F


class _Samples(Samples):
    """Cropped images as uint8 (3, crop, crop), with their colour offsets (3,) and labels."""

    def __init__(
        self, images: ImageSource, transform: TrainTransform | EvalTransform, substitution: Substitution
    ) -> None:
        super().__init__(substitution)
        self.images = images
        self.rule = transform

    def read(self, index: int) -> Tensor:
        return decode(self.images.read(index))

    def transform(self, content: Any, epoch: int, index: int, used: int) -> tuple[Tensor, np.ndarray, int]:
        if isinstance(self.rule, TrainTransform):
            crop, offset = _train_crop(content, self.rule, epoch, index)
        else:
            crop, offset = _eval_crop(content, self.rule), np.zeros(3, np.float32)
        return crop, offset, int(self.images.labels[used])


def _train_crop(image: Tensor, transform: TrainTransform, epoch: int, index: int) -> tuple[Tensor, np.ndarray]:
    """Return the crop and its colour offset."""
    ((is_mirrored, is_upside_down),), (draw,) = transform.draw_crops(epoch, [index])
    appearance = transform.draw_appearance(epoch, [index])
    image = _apply(appearance.before[0], image)
    height, width = image.shape[-2:]
    window = transform.cropping.window(height, width, draw.tolist())
    interpolation = InterpolationMode(transform.interpolation)
    crop = F.resized_crop(image, *window, [transform.crop] * 2, interpolation, antialias=transform.antialias)
    if is_mirrored:
        crop = F.horizontal_flip(crop)
    if is_upside_down:
        crop = F.vertical_flip(crop)
    return _apply(appearance.after[0], crop), appearance.offset[0]


def _apply(operations: np.ndarray, image: Tensor) -> Tensor:
    """Apply operations to a uint8 image (3, H, W) by Pillow."""
    if not operations[:, 0].any():
        return image
    picture = apply_operations(Image.fromarray(image.permute(1, 2, 0).numpy()), operations)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def _eval_crop(image: Tensor, transform: EvalTransform) -> Tensor:
    interpolation = InterpolationMode(transform.resolved_interpolation)
    if transform.order == "crop_resize":
        window = transform.square(*image.shape[-2:])
        return F.resized_crop(image, *window, [transform.crop] * 2, interpolation, antialias=transform.antialias)
    image = F.crop(image, *transform.source(*image.shape[-2:]))
    height, width = transform.resized(*image.shape[-2:])
    image = F.resize(image, [height, width], interpolation, antialias=transform.antialias)
    return F.crop(image, *transform.window(height, width))


class TorchvisionLoader:
    """Implements `data.loader.Loader` with torchvision's decoder and torch's DataLoader."""

    def __init__(
        self,
        images: ImageSource,
        plan: BatchPlan,
        transform: TrainTransform | EvalTransform,
        device: torch.device,
        workers: int,
        max_errors: int,
    ) -> None:
        self.plan = plan
        self.substitution = Substitution(images, max_errors)
        self._loader = WorkerLoader(_Samples(images, transform, self.substitution), plan, device, workers)
        self._device = device
        self._mean = torch.tensor(transform.mean, device=device).view(1, 3, 1, 1)
        self._std = torch.tensor(transform.std, device=device).view(1, 3, 1, 1)

    def batches(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        for crops, offsets, labels in self._loader.batches(epoch, start):
            images = crops.to(self._device, non_blocking=True, memory_format=torch.channels_last)
            mean = self._mean - offsets.to(self._device, non_blocking=True).view(-1, 3, 1, 1)
            yield images.float().sub_(mean).div_(self._std), labels.to(self._device, non_blocking=True)
