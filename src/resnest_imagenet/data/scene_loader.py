"""The loader of scenes: worker processes decode and crop, the device normalises."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from resnest_imagenet.data.geometry import SceneTransform
from resnest_imagenet.data.loader import choose_workers
from resnest_imagenet.data.plan import BatchPlan
from resnest_imagenet.data.scenes import Scenes
from resnest_imagenet.data.substitution import Substitution
from resnest_imagenet.data.transforms import MEAN, STD
from resnest_imagenet.data.workers import Samples, WorkerLoader


class _SceneSamples(Samples):
    """Images uint8 (H, W, 3) with their masks uint8 (H, W): crops in training, whole scenes in evaluation."""

    def __init__(self, scenes: Scenes, transform: SceneTransform | None, substitution: Substitution) -> None:
        super().__init__(substitution)
        self.scenes = scenes
        self.rule = transform

    def read(self, index: int) -> Any:
        return self.scenes.read(index)

    def transform(self, content: Any, epoch: int, index: int, used: int) -> tuple[Tensor, Tensor]:
        picture, mask = content
        if self.rule is None:
            image, mask = np.array(picture), mask.copy()  # torch warns about read-only arrays
        else:
            image, mask = self.rule.apply(picture, mask, epoch, index)
        return torch.from_numpy(image), torch.from_numpy(mask)


class SceneLoader:
    """Implements `data.loader.Loader` for scenes.

    In training, `batches` yields normalised images float32 (B, 3, crop, crop), channels_last in memory, and masks int64
    (B, crop, crop). In evaluation, each batch is one scene at its own size, not normalised: images uint8 (1, 3, H, W)
    and masks uint8 (1, H, W). Masks have class indices and `scenes.VOID`.
    """

    def __init__(
        self,
        scenes: Scenes,
        plan: BatchPlan,
        transform: SceneTransform | None,
        device: torch.device,
        workers: int | None = None,
        max_errors: int = 0,
    ) -> None:
        """Prepare to load.

        Args:
            scenes: the source of the scenes.
            plan: their order; in evaluation with one scene per batch.
            transform: of training; None for evaluation.
            device: of the batches.
            workers: number of processes; None: see `choose_workers`.
            max_errors: how many scenes that cannot be used may be replaced, see `Substitution`; with 0 the first one
                raises a DataError.
        """
        assert transform is not None or plan.batch_size == 1, "scenes differ in size"
        self.plan = plan
        self.substitution = Substitution(scenes.images, max_errors, scenes.name_fault)
        samples = _SceneSamples(scenes, transform, self.substitution)
        self._loader = WorkerLoader(samples, plan, device, choose_workers(workers))
        self._device = device
        self._is_training = transform is not None
        self._mean = torch.tensor(MEAN, device=device)
        self._std = torch.tensor(STD, device=device)

    def batches(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        for pixels, labels in self._loader.batches(epoch, start):
            images = pixels.to(self._device, non_blocking=True)
            masks = labels.to(self._device, non_blocking=True)
            if self._is_training:
                images, masks = self._normalise(images), masks.long()
            yield images.permute(0, 3, 1, 2), masks  # the permuted images are channels_last

    def _normalise(self, images: Tensor) -> Tensor:
        """Return images (B, H, W, 3) as float32, normalised by rows: a CPU is slow on an inner axis of three."""
        width = images.shape[2]
        mean, std = self._mean.repeat(width), self._std.repeat(width)
        return images.flatten(2).float().sub_(mean).div_(std).view(images.shape)
