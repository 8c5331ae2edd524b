"""The loader of images with objects: worker processes decode and resize, the device normalises and pads."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from resnest_imagenet.data.coco import Instances
from resnest_imagenet.data.instance_geometry import InstanceTransform
from resnest_imagenet.data.loader import choose_workers
from resnest_imagenet.data.plan import BatchPlan
from resnest_imagenet.data.substitution import Substitution
from resnest_imagenet.data.workers import Samples, WorkerLoader
from resnest_imagenet.instances import STRIDE, Pixels, Target


class _InstanceSamples(Samples):
    """Images uint8 (H, W, 3) with their targets; a batch is a list of each."""

    def __init__(self, instances: Instances, transform: InstanceTransform, substitution: Substitution) -> None:
        super().__init__(substitution)
        self.instances = instances
        self.rule = transform

    def read(self, index: int) -> Any:
        return self.instances.read(index)

    def transform(self, content: Any, epoch: int, index: int, used: int) -> tuple[Tensor, Target]:
        pixels, target = self.rule.apply(content, *self.instances.objects(used), epoch, index, used)
        return torch.from_numpy(pixels), target

    def collate(self, contents: list[Any]) -> tuple[list[Tensor], list[Target]]:
        images, targets = zip(*contents, strict=True)
        return list(images), list(targets)


class InstanceLoader:
    """Implements `data.loader.Loader` for images with objects.

    `batches` yields images float32 (B, 3, H, W), normalised, channels_last in memory, and B targets with their tensors
    on the device, masks on the host. Each image lies in the top left corner, 0 around it; H and W are the least
    multiples of STRIDE that hold all images. The target of a substitute has the substitute's index.
    """

    def __init__(
        self,
        instances: Instances,
        plan: BatchPlan,
        transform: InstanceTransform,
        device: torch.device,
        pixels: Pixels,
        workers: int | None = None,
        max_errors: int = 0,
    ) -> None:
        """Prepare to load.

        Args:
            instances: the images and their objects.
            plan: their order; in training with `instances.groups`.
            transform: of training, or of evaluation: one size and no flip.
            device: where the batches are wanted.
            pixels: how they are normalised; see `find_pixels`.
            workers: processes; None: see `choose_workers`.
            max_errors: how many unusable images may be replaced, see `Substitution`; with 0 the first one raises a
                DataError.
        """
        self.plan = plan
        self.pixels = pixels
        self.substitution = Substitution(instances.images, max_errors, instances.name_fault)
        samples = _InstanceSamples(instances, transform, self.substitution)
        self._loader = WorkerLoader(samples, plan, device, choose_workers(workers))
        self._device = device

    def batches(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, list[Target]]]:
        for images, targets in self._loader.batches(epoch, start):
            yield pad_images(images, self.pixels, self._device), [target.to(self._device) for target in targets]


def restore_pixels(images: Tensor, pixels: Pixels) -> np.ndarray:
    """Undo the normalisation of images (B, 3, H, W): uint8 RGB (B, H, W, 3), with the mean in the padding."""
    values = images.float().permute(0, 2, 3, 1).cpu().numpy() * np.array(pixels.std, np.float32)
    values = (values + np.array(pixels.mean, np.float32)).round().clip(0, 255).astype(np.uint8)
    return values[..., ::-1] if pixels.is_bgr else values


def pad_images(images: list[Tensor], pixels: Pixels, device: torch.device) -> Tensor:
    """Normalise images and put them into one batch, with 0 around them.

    Args:
        images: uint8 (H, W, 3), RGB, of any sizes.
        pixels: how they are normalised.
        device: where the batch is wanted.

    Returns:
        float32 (B, 3, H, W), channels_last in memory, H and W multiples of STRIDE.
    """
    height, width = (-(-max(image.shape[side] for image in images) // STRIDE) * STRIDE for side in (0, 1))
    batch = torch.zeros(len(images), height, width, 3, device=device)
    mean, std = (torch.tensor(values, device=device) for values in (pixels.mean, pixels.std))
    for place, image in zip(batch, images, strict=True):
        part = image.to(device, non_blocking=True)
        rows, columns = part.shape[:2]
        values = (part.flip(2) if pixels.is_bgr else part).reshape(rows, columns * 3).float()
        # By whole rows: on a CPU an inner axis of 3 is slow.
        values.sub_(mean.repeat(columns)).div_(std.repeat(columns))
        place[:rows, :columns] = values.view(rows, columns, 3)
    return batch.permute(0, 3, 1, 2)
