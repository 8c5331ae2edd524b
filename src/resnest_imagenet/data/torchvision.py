"""The torchvision loader: worker processes decode and crop, the device normalises."""

import errno
import gc
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from multiprocessing import active_children
from multiprocessing.process import BaseProcess
from multiprocessing.util import Finalize
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from resnest_imagenet.data.decoding import BadImage, Fault, decode
from resnest_imagenet.data.pillow_ops import apply_operations
from resnest_imagenet.data.plan import BatchPlan
from resnest_imagenet.data.processes import end_with_parent
from resnest_imagenet.data.source import ImageSource
from resnest_imagenet.data.substitution import Substitution
from resnest_imagenet.data.transforms import MEAN, STD, EvalTransform, TrainTransform
from resnest_imagenet.errors import LoadingError, StorageError, explain_runtime


class _Samples(Dataset[tuple[Tensor, np.ndarray, int, int]]):
    """Cropped images as uint8 (3, crop, crop), by (epoch, index).

    With them the offsets of their colours (3,), their labels and the indices of the images used.
    """

    def __init__(
        self, images: ImageSource, transform: TrainTransform | EvalTransform, substitution: Substitution
    ) -> None:
        self.images = images
        self.transform = transform
        self.substitution = substitution

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, np.ndarray, int, int]:
        epoch, index = key
        image, used = self.load(index)
        if isinstance(self.transform, TrainTransform):
            crop, offset = _train_crop(image, self.transform, epoch, index)
        else:
            crop, offset = _eval_crop(image, self.transform), np.zeros(3, np.float32)
        return crop, offset, int(self.images.labels[used]), used

    def __getitems__(self, keys: list[tuple[int, int]]) -> list[Any] | BadImage | LoadingError:
        """Return the samples of a batch; an error as a value: torch would make another of its text."""
        try:
            return [self[key] for key in keys]
        except (BadImage, LoadingError) as error:
            return error

    def load(self, index: int) -> tuple[Tensor, int]:
        """Return an image or what stands in for it, and the index of the one it is.

        Raises:
            BadImage: none of them can be used.
            LoadingError: the storage fails.
        """
        fault: Exception | None = None
        for used in self.substitution.candidates(index):
            try:
                return decode(self.images.read(used)), used
            except BadImage as error:
                fault = error
        raise BadImage(Fault("damaged", f"image {index}: bad, and so is what may stand in for it")) from fault


def _train_crop(image: Tensor, transform: TrainTransform, epoch: int, index: int) -> tuple[Tensor, np.ndarray]:
    """Return the crop and the offset of its colours."""
    (is_mirrored,), (draw,) = transform.draw_crops(epoch, [index])
    appearance = transform.draw_appearance(epoch, [index])
    image = _apply(appearance.before[0], image)
    height, width = image.shape[-2:]
    window = transform.cropping.window(height, width, draw.tolist())
    interpolation = InterpolationMode(transform.interpolation)
    crop = F.resized_crop(image, *window, [transform.crop] * 2, interpolation, antialias=transform.antialias)
    if is_mirrored:
        crop = F.horizontal_flip(crop)
    return _apply(appearance.after[0], crop), appearance.offset[0]


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
    image = F.crop(image, *transform.source(*image.shape[-2:]))
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


def _collate(samples: list[Any] | BadImage | LoadingError) -> Any:
    return default_collate(samples) if isinstance(samples, list) else samples


def _set_up_worker(parent: int, worker: int) -> None:
    """Make a worker deaf to the signals by which schedulers, terminals and torchrun stop a whole group of processes.

    The parent decides: without its workers it could not finish the step that it stops after. With it they end.
    """
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    end_with_parent(parent)


def _kill(workers: list[BaseProcess]) -> None:
    """End workers before multiprocessing does at exit: it would ask them with SIGTERM, and wait."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would take their end for a failure
    for worker in workers:
        worker.kill()


def _explain_failure(error: Exception) -> LoadingError | None:
    """Explain why workers cannot be started, have died or cannot hand over a batch; None for any other failure."""
    text, number = str(error), error.errno if isinstance(error, OSError) else None
    # A batch is fetched from its worker's memory: that, too, tells that it is gone.
    is_gone = isinstance(error, EOFError | ConnectionError | FileNotFoundError)
    if is_gone or re.search(r"(DataLoader worker|Pin memory thread).* (exited unexpectedly|is killed by signal)", text):
        what = "a worker process of the loader has died (killed, or short of memory, /dev/shm or open files?)"
        return LoadingError(errno.ECHILD, f"{what}: lower loader.workers, --ipc=host, or loader.workers=0")
    if number in (errno.EAGAIN, errno.ENOMEM):
        return LoadingError(number, f"the loader's workers cannot be started ({text}): lower loader.workers")
    explained = explain_runtime(error)
    return LoadingError(number or errno.EIO, str(explained)) if isinstance(explained, StorageError) else None


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
        self._samples = _Samples(images, transform, self.substitution)
        self._device = device
        self._keys = _Keys(plan)
        self._loader = DataLoader(
            self._samples,
            batch_sampler=self._keys,
            num_workers=workers,
            # Forked workers see it when their parent is killed; those of a fork server would stay.
            multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
            persistent_workers=workers > 0,
            worker_init_fn=partial(_set_up_worker, os.getpid()),
            collate_fn=_collate,
            pin_memory=device.type == "cuda",
        )
        self._workers: list[BaseProcess] = []
        Finalize(None, _kill, [self._workers], exitpriority=0)
        self._mean = torch.tensor(MEAN, device=device).view(1, 3, 1, 1)
        self._std = torch.tensor(STD, device=device).view(1, 3, 1, 1)

    def batches(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        self._keys.epoch, self._keys.start = epoch, start
        # Frozen objects are not collected: a forked worker that collected the parent's garbage would run destructors
        # there, and one that waits for a thread, as DALI's do, would wait for ever.
        gc.freeze()
        others = active_children()
        handler = signal.getsignal(signal.SIGCHLD)
        try:
            batches = iter(self._loader)
        except OSError as error:
            raise (_explain_failure(error) or error) from error
        finally:
            gc.unfreeze()
        if threading.current_thread() is threading.main_thread():
            # torch's own would raise anywhere, in the middle of a step: `next` finds a dead worker, too.
            signal.signal(signal.SIGCHLD, handler or signal.SIG_DFL)
        self._workers += [child for child in active_children() if child not in others]
        for indices in self.plan.batches(epoch, start):
            try:
                batch = next(batches)
            except (RuntimeError, OSError, EOFError) as error:
                raise (_explain_failure(error) or error) from error
            if isinstance(batch, BadImage):
                self._explain(indices)
            if isinstance(batch, BadImage | LoadingError):
                raise batch
            images, offsets, labels, used = batch
            for index, used_index in zip(indices.tolist(), used.tolist(), strict=True):
                self.substitution.record(index, used_index)
            images = images.to(self._device, non_blocking=True, memory_format=torch.channels_last)
            mean = self._mean - offsets.to(self._device, non_blocking=True).view(-1, 3, 1, 1)
            yield images.float().sub_(mean).div_(self._std), labels.to(self._device, non_blocking=True)

    def _explain(self, indices: np.ndarray) -> None:
        """Raise a DataError with the image that cannot be used, nor what may stand in for it."""
        for index in indices.tolist():
            used: int | None = None
            with suppress(BadImage):
                _, used = self._samples.load(index)
            self.substitution.record(index, used)
