"""The torchvision loader: worker processes decode and crop, the device normalises."""

import gc
import io
from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from resnest_imagenet.data.pillow_ops import apply_operations
from resnest_imagenet.data.plan import BatchPlan
from resnest_imagenet.data.source import UNREADABLE, ImageSource, name_unreadable
from resnest_imagenet.data.transforms import MEAN, STD, EvalTransform, TrainTransform
from resnest_imagenet.errors import DataError


class _Samples(Dataset[tuple[Tensor, np.ndarray, int]]):
    """Cropped images as uint8 (3, crop, crop), offsets of their colours (3,) and labels, by (epoch, index)."""

    def __init__(self, images: ImageSource, transform: TrainTransform | EvalTransform) -> None:
        self.images = images
        self.transform = transform

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, np.ndarray, int]:
        epoch, index = key
        image = decode(self.images.read(index))
        if isinstance(self.transform, TrainTransform):
            crop, offset = _train_crop(image, self.transform, epoch, index)
        else:
            crop, offset = _eval_crop(image, self.transform), np.zeros(3, np.float32)
        return crop, offset, int(self.images.labels[index])


def decode(encoded: bytes) -> Tensor:
    """Decode an image as DALI does: uint8 RGB (3, H, W), EXIF orientation and transparency ignored.

    Raises:
        UNREADABLE: not an image, or damaged.
    """
    if encoded.startswith(b"GIF8"):
        raise OSError("a GIF image, which DALI does not decode")
    try:
        image = decode_image(torch.frombuffer(bytearray(encoded), dtype=torch.uint8), ImageReadMode.RGB)
    except (RuntimeError, ValueError):
        # JPEGs without an end marker, BMP and TIFF images: Pillow and DALI read them, and agree.
        with Image.open(io.BytesIO(encoded)) as picture:
            image = torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)
    if image.dtype == torch.uint16:  # of 16-bit PNGs
        image = ((image.to(torch.int32) + 128) // 257).to(torch.uint8)
    return image


def _train_crop(image: Tensor, transform: TrainTransform, epoch: int, index: int) -> tuple[Tensor, np.ndarray]:
    """Return the crop and the offset of its colours."""
    draw = transform.draw_crop(epoch, index)
    look = transform.draw_look(epoch, index)
    image = _apply(look.before, image)
    height, width = image.shape[-2:]
    window = transform.cropping.window(height, width, draw[1:])
    interpolation = InterpolationMode(transform.interpolation)
    crop = F.resized_crop(image, *window, [transform.crop] * 2, interpolation, antialias=transform.antialias)
    if draw[0]:
        crop = F.horizontal_flip(crop)
    return _apply(look.after, crop), look.offset


def _apply(operations: np.ndarray, image: Tensor) -> Tensor:
    """Apply operations to a uint8 image (3, H, W), through Pillow."""
    if not operations[:, 0].any():
        return image
    picture = apply_operations(Image.fromarray(image.permute(1, 2, 0).numpy()), operations)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def _eval_crop(image: Tensor, transform: EvalTransform) -> Tensor:
    interpolation = InterpolationMode(transform.resolved_interpolation)
    if transform.order == "crop_resize":
        window = transform.square(*image.shape[-2:])
        return F.resized_crop(image, *window, [transform.crop] * 2, interpolation, antialias=transform.antialias)
    height, width = transform.resized(*image.shape[-2:])
    image = F.resize(image, [height, width], interpolation, antialias=transform.antialias)
    return F.crop(image, *transform.window(height, width))


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
        images: ImageSource,
        plan: BatchPlan,
        transform: TrainTransform | EvalTransform,
        device: torch.device,
        workers: int,
    ) -> None:
        self.plan = plan
        self._images = images
        self._device = device
        self._keys = _Keys(plan)
        self._loader = DataLoader(
            _Samples(images, transform),
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
                images, offsets, labels = next(batches)
            except (RuntimeError, *UNREADABLE) as error:
                raise self._explain(indices, error) from error
            images = images.to(self._device, non_blocking=True, memory_format=torch.channels_last)
            mean = self._mean - offsets.to(self._device, non_blocking=True).view(-1, 3, 1, 1)
            yield images.float().sub_(mean).div_(self._std), labels.to(self._device, non_blocking=True)

    def _explain(self, indices: np.ndarray, error: Exception) -> Exception:
        """Name the file behind a failed batch; any other failure stays what it is."""
        unreadable = name_unreadable(self._images, indices.tolist())
        return DataError(unreadable) if unreadable else error
