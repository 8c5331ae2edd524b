"""The DALI loader: the same plan, draws and windows as the torchvision loader, in a DALI graph.

Image sizes are known only inside the graph (`peek_image_shape`), so the windows of `transforms.py`
stand here a second time as DALI arithmetic; the tests hold the two forms together.
"""

import itertools
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import torch
from nvidia.dali import Pipeline, fn, math, pipeline_def, types
from nvidia.dali.data_node import DataNode
from torch import Tensor

from resnest_imagenet.data.dali_ops import apply_operations
from resnest_imagenet.data.folder import ImageFolder
from resnest_imagenet.data.plan import BatchPlan
from resnest_imagenet.data.source import ImageSource
from resnest_imagenet.data.substitution import Substitution
from resnest_imagenet.data.transforms import MEAN, STD, ERandomCrop, EvalTransform, RandomResizedCrop, TrainTransform
from resnest_imagenet.errors import ConfigError

PREFETCHED_BATCHES = 2  # decoded ahead of the consumer
READING_THREADS = 8  # of sources that are not files: they wait for the storage, not for the processor
# As Pillow and torchvision decode: EXIF orientation ignored, and on a GPU the same chroma upsampling as on a CPU.
DECODING: dict[str, Any] = {"adjust_orientation": False, "jpeg_fancy_upsampling": True}
INTERPOLATIONS = {"bilinear": types.INTERP_LINEAR, "bicubic": types.INTERP_CUBIC}

Source = Callable[[], tuple]


def _image_size(encoded: DataNode) -> tuple[DataNode, DataNode]:
    shape = fn.cast(fn.peek_image_shape(encoded, adjust_orientation=False), dtype=types.FLOAT64)
    return shape[0], shape[1]


def _integers(vertical: DataNode, horizontal: DataNode) -> DataNode:
    """Join two scalars to the vector that DALI's slices take."""
    return fn.cast(fn.stack(vertical, horizontal), dtype=types.INT32)


def _train_window(
    height: DataNode, width: DataNode, draw: DataNode, cropping: RandomResizedCrop | ERandomCrop
) -> tuple[DataNode, DataNode]:
    """`cropping.window` as (top, left) and (height, width); the attempts stand side by side, as vectors."""
    tries = cropping.attempts
    one, other = draw[2 : 2 + tries], draw[2 + tries :]
    if isinstance(cropping, RandomResizedCrop):
        scale = math.sqrt(height * width)
        heights, widths = math.floor(scale * one + 0.5), math.floor(scale * other + 0.5)
        fits = (heights >= 1) & (heights <= height) & (widths >= 1) & (widths <= width)
        centre_height = math.min(height, math.floor(width * cropping.max_aspect + 0.5))
        centre_width = math.min(width, math.floor(height * cropping.max_aspect + 0.5))
        centre_top, centre_left = math.floor((height - centre_height) / 2), math.floor((width - centre_width) / 2)
    else:
        area, min_area = height * width, _float64(cropping.min_area) * height * width
        largest = math.min(_round_half_even(math.sqrt(area / other)), height)
        largest = math.min(largest, math.floor(width / other))
        smallest = math.min(_round_half_even(math.sqrt(min_area / other)), largest)
        heights = _round_half_even(smallest + one * (largest - smallest))
        widths = _round_half_even(heights * other)
        fits = (heights * widths >= min_area) & (heights * widths <= area) & (widths <= width)
        centre_top, centre_left, centre_height, centre_width = _square(height, width, cropping.centre)
    # The first attempt that fits has the highest rank; 0: none does. Reductions take no float64, but the integers
    # here are exact in float32 too.
    ranks = fn.cast(fits, dtype=types.INT32) * types.Constant(list(range(tries, 0, -1)), device="cpu")
    best = fn.reductions.max(ranks)
    chosen = fn.cast(ranks == best, dtype=types.FLOAT)
    crop_height = fn.reductions.sum(fn.cast(heights, dtype=types.FLOAT) * chosen)
    crop_width = fn.reductions.sum(fn.cast(widths, dtype=types.FLOAT) * chosen)
    is_found = best > 0
    if isinstance(cropping, ERandomCrop):
        is_found = is_found & ((crop_height < height) | (crop_width < width))
    found = fn.cast(is_found, dtype=types.FLOAT64)
    none = 1 - found
    top = found * math.floor(draw[0] * (height - crop_height + 1)) + none * centre_top
    left = found * math.floor(draw[1] * (width - crop_width + 1)) + none * centre_left
    crop_height, crop_width = found * crop_height + none * centre_height, found * crop_width + none * centre_width
    return _integers(top, left), _integers(crop_height, crop_width)


def _eval_size(height: DataNode, width: DataNode, transform: EvalTransform) -> tuple[DataNode, DataNode]:
    """`EvalTransform.resized`."""
    short = math.min(height, width)
    return math.floor(transform.short_side * height / short), math.floor(transform.short_side * width / short)


def _square(height: DataNode, width: DataNode, transform: EvalTransform) -> tuple[DataNode, ...]:
    """`EvalTransform.square`."""
    side = _float64(transform.resolved_ratio) * math.min(height, width)
    top, left = _round_half_even((height - side) / 2), _round_half_even((width - side) / 2)
    bottom, right = _round_half_even(top + side), _round_half_even(left + side)
    return top, left, math.max(bottom - top, 1), math.max(right - left, 1)


def _float64(value: float) -> DataNode:
    """Make a constant. DALI's own are float32, whatever type is asked for; three of them hold a float64's 53 bits."""
    high = float(np.float32(value))
    middle = float(np.float32(value - high))
    constant = types.Constant(high, dtype=types.FLOAT, shape=[], device="cpu")
    return fn.cast(constant, dtype=types.FLOAT64) + middle + (value - high - middle)


def _round_half_even(value: DataNode) -> DataNode:
    """Round as Python's `round` does, values >= 0: every sum here is exact where it decides."""
    return math.ceil(value / 2 - 0.25) + math.floor(value / 2 + 0.25)


def _normalise(images: DataNode, mirror: DataNode | int = 0, mean: DataNode | list[float] = MEAN) -> DataNode:
    # Height and width stay in front of the channels: that is channels_last, seen as NCHW by a permutation.
    return fn.crop_mirror_normalize(images, mirror=mirror, mean=mean, std=STD, dtype=types.FLOAT, output_layout="HWC")


@pipeline_def(enable_conditionals=True)
def _train_pipeline(
    source: Source, in_files: bool, transform: TrainTransform, decoder: str, whole: bool
) -> tuple[DataNode, DataNode]:
    before, after = transform.augmentation.slots_before, transform.augmentation.slots_after
    # The operations only where there are some: DALI warns of an input without a use.
    images, labels, draw, mean, *drawn = fn.external_source(source, num_outputs=5 if before or after else 4)
    encoded = fn.io.file.read(images) if in_files else images
    start, size = _train_window(*_image_size(encoded), draw[1:], transform.cropping)
    if whole or before:
        images = fn.decoders.image(encoded, device=decoder, **DECODING)
        images = apply_operations(images, drawn[0], before) if before else images
        images = fn.slice(images, start=start, shape=size, axes=[0, 1])
    else:
        images = fn.decoders.image_slice(encoded, start=start, shape=size, axes=[0, 1], device=decoder, **DECODING)
    resampling = {"interp_type": INTERPOLATIONS[transform.interpolation], "antialias": transform.antialias}
    images = fn.resize(images, size=[transform.crop] * 2, **resampling)
    if after:
        images = apply_operations(images, drawn[0][len(before) :], after)
    return _normalise(images, fn.cast(draw[0], dtype=types.INT32), mean), labels


@pipeline_def
def _eval_pipeline(source: Source, in_files: bool, transform: EvalTransform, decoder: str) -> tuple[DataNode, DataNode]:
    images, labels = fn.external_source(source, num_outputs=2)
    encoded = fn.io.file.read(images) if in_files else images
    crop = transform.crop
    resampling = {"interp_type": INTERPOLATIONS[transform.resolved_interpolation], "antialias": transform.antialias}
    if transform.order == "crop_resize":
        top, left, square_height, square_width = _square(*_image_size(encoded), transform)
        start, size = _integers(top, left), _integers(square_height, square_width)
        images = fn.decoders.image_slice(encoded, start=start, shape=size, axes=[0, 1], device=decoder, **DECODING)
        images = fn.resize(images, size=[crop, crop], **resampling)
    else:
        height, width = (fn.cast(side, dtype=types.FLOAT) for side in _eval_size(*_image_size(encoded), transform))
        start = _integers(_round_half_even((height - crop) / 2), _round_half_even((width - crop) / 2))
        images = fn.decoders.image(encoded, device=decoder, **DECODING)
        images = fn.resize(images, resize_y=height, resize_x=width, **resampling)
        images = fn.slice(images, start=start, shape=[crop, crop], axes=[0, 1])
    return _normalise(images), labels


def _read_all(images: ImageSource, indices: list[int]) -> list[bytes]:
    """Read in threads of this call only: none is left to a fork, or by a loader that is gone."""

    def read_share(share: np.ndarray) -> list[bytes]:
        return [images.read(index) for index in share.tolist()]

    with ThreadPoolExecutor(READING_THREADS) as threads:
        return list(itertools.chain.from_iterable(threads.map(read_share, np.array_split(indices, READING_THREADS))))


@pipeline_def
def _decoding_pipeline(decoder: str) -> tuple[DataNode, DataNode]:
    encoded = fn.external_source(name="encoded")
    return fn.peek_image_shape(encoded), fn.decoders.image(encoded, device=decoder, **DECODING)


class _Trial:
    """Says whether DALI decodes an image: a pipeline that failed does not say which image it was."""

    def __init__(self, images: ImageSource, device: torch.device) -> None:
        self._images = images
        self._device = device
        self._pipeline: Pipeline | None = None

    def __call__(self, index: int) -> bool:
        try:
            encoded = np.frombuffer(self._images.read(index), dtype=np.uint8)
            pipeline = self._pipeline or self._build()
            self._pipeline = None  # of no more use if it fails
            pipeline.run(encoded=[encoded])
        except (OSError, RuntimeError):
            return False
        self._pipeline = pipeline
        return True

    def _build(self) -> Pipeline:
        decoder = "mixed" if self._device.type == "cuda" else "cpu"
        pipeline = _decoding_pipeline(
            decoder, batch_size=1, num_threads=1, device_id=self._device.index, prefetch_queue_depth=1
        )
        pipeline.build()
        return pipeline


class _Inputs:
    """What DALI's external source asks for: the next batch's images, labels and, in training, draws.

    Of files the paths, which DALI's threads read; of other sources the bytes.

    Apart from the loader, so that loader and pipeline do not hold each other: a pipeline is freed with its loader and
    not by the garbage collector, which may run in a forked process, where DALI's threads are not.
    """

    def __init__(self, images: ImageSource, plan: BatchPlan, transform: TrainTransform | EvalTransform) -> None:
        self.images = images
        self.plan = plan
        self.transform = transform
        self.recent: deque[np.ndarray] = deque(maxlen=PREFETCHED_BATCHES + 2)
        self.stand_ins: dict[int, int] = {}  # for images that DALI does not decode
        self._epoch = 0
        self._pending: Iterator[np.ndarray] = iter(())

    def start(self, epoch: int, start: int) -> None:
        """Begin a pass with the rank's `start`-th batch."""
        self._epoch = epoch
        self.recent.clear()
        self._pending = self.plan.batches(epoch, start)

    def __call__(self) -> tuple:
        """Return one batch; StopIteration ends the pass."""
        indices = next(self._pending)
        self.recent.append(indices)
        used = [self.stand_ins.get(index, index) for index in indices.tolist()]
        if isinstance(self.images, ImageFolder):
            inputs = [self.images.path(index) for index in used]
        else:
            inputs = _read_all(self.images, used)
        images = [np.frombuffer(each, dtype=np.uint8) for each in inputs]
        labels = self.images.labels[used]
        if isinstance(self.transform, EvalTransform):
            return images, labels
        crops = [self.transform.draw_crop(self._epoch, index) for index in indices.tolist()]
        looks = [self.transform.draw_look(self._epoch, index) for index in indices.tolist()]
        means = [np.array(MEAN, np.float32) - look.offset for look in looks]
        operations = [np.concatenate([look.before, look.after]) for look in looks]
        drawn = [np.stack(operations)] if len(operations[0]) else []
        return images, labels, np.stack(crops), np.stack(means), *drawn


class DaliLoader:
    """Implements `data.loader.Loader` with DALI: on a CPU, or decoding and cropping on a CUDA device."""

    def __init__(
        self,
        images: ImageSource,
        plan: BatchPlan,
        transform: TrainTransform | EvalTransform,
        device: torch.device,
        workers: int,
        max_errors: int,
    ) -> None:
        if isinstance(transform, EvalTransform):
            interpolation = transform.resolved_interpolation
        else:
            interpolation = transform.interpolation
        if interpolation == "bicubic" and not transform.antialias:
            # Keys' a is -1/2 in DALI, and -3/4 in OpenCV and torchvision.
            raise ConfigError("antialias=false: DALI's bicubic is not OpenCV's then: set loader=torchvision")
        self.plan = plan
        self._inputs = _Inputs(images, plan, transform)
        self._max_errors = max_errors
        self._substitution = Substitution(images, max_errors)
        self._device = device
        self._workers = max(1, workers)
        self._pipeline: Pipeline | None = None

    def batches(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        self._inputs.start(epoch, start)
        pipeline = self._pipeline or self._build()
        # Dropped until the pass is over: after a failure or an early exit its queue holds foreign batches.
        self._pipeline = None
        stream = torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None
        while True:
            try:
                images, labels = pipeline.run(stream)
            except StopIteration:
                break
            except (RuntimeError, OSError):
                # The pipeline is of no more use. Each further turn has found a bad image more: they end.
                if not self._replace_bad():
                    raise
                self._inputs.start(epoch, start)
                pipeline = self._build()
                continue
            start += 1
            nhwc = torch.from_dlpack(images.as_tensor())
            label = torch.from_dlpack(labels.as_tensor())
            yield nhwc.permute(0, 3, 1, 2), label.to(self._device, non_blocking=True)
        pipeline.reset()
        self._pipeline = pipeline

    def _build(self) -> Pipeline:
        on_gpu = self._device.type == "cuda"
        train = partial(_train_pipeline, whole=self._max_errors > 0)
        build = train if isinstance(self._inputs.transform, TrainTransform) else _eval_pipeline
        pipeline = build(
            self._inputs,
            isinstance(self._inputs.images, ImageFolder),
            self._inputs.transform,
            "mixed" if on_gpu else "cpu",
            batch_size=self.plan.batch_size,
            num_threads=self._workers,
            device_id=self._device.index if on_gpu else None,
            prefetch_queue_depth=PREFETCHED_BATCHES,
        )
        pipeline.build()
        return pipeline

    def _replace_bad(self) -> bool:
        """Find what stands in for the bad images among those asked for last; say whether there are new ones.

        Raises:
            DataError: more of them than may be replaced.
        """
        inputs = self._inputs
        # On a GPU both: a fault of the GPU is not the images'.
        trials = [_Trial(inputs.images, device) for device in {torch.device("cpu"), self._device}]

        def decodes(index: int) -> bool:
            return any(trial(index) for trial in trials)

        recent = [index for indices in inputs.recent for index in indices.tolist() if index not in inputs.stand_ins]
        bad = list(itertools.filterfalse(decodes, recent))
        for index in bad:
            used = next(filter(decodes, self._substitution.candidates(index)), None)
            self._substitution.record(index, used)
            assert used is not None  # or it had raised
            inputs.stand_ins[index] = used
        return bool(bad)
