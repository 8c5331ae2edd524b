"""The DALI loader: the same plan, draws and windows as the torchvision loader, in a DALI graph.

Image sizes are known only inside the graph, which calls the rules of `transforms.py` with them.
"""

import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from nvidia.dali import Pipeline, fn, pipeline_def, types
from nvidia.dali.data_node import DataNode
from nvidia.dali.pipeline import do_not_convert
from torch import Tensor

from resnest_imagenet.data.dali_ops import apply_operations
from resnest_imagenet.data.decoding import BadImage
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
Vectors = tuple[Sequence[int], Sequence[int]]
Rule = Callable[..., Vectors]  # of height, width and what was drawn


@do_not_convert  # as Python what is a rule's `if`, and not as a graph's
def _by_size(rule: Rule, encoded: DataNode, *drawn: DataNode) -> tuple[DataNode, DataNode]:
    """Let Python compute two vectors for each image from its size, which the graph knows before it decodes.

    In one call per batch: a dozen of DALI's own operations on scalars take a tenth as long as the decoding.
    """

    def compute(shapes: list[np.ndarray], *draws: list[np.ndarray]) -> tuple[list[np.ndarray], list[np.ndarray]]:
        lists = ([array.tolist() for array in arrays] for arrays in draws)
        results = [rule(*shape.tolist()[:2], *draw) for shape, *draw in zip(shapes, *lists, strict=True)]
        one, other = np.array(results, np.int32).swapaxes(0, 1)
        return list(one), list(other)

    shapes = fn.peek_image_shape(encoded, adjust_orientation=False)
    found = fn.python_function(shapes, *drawn, function=compute, num_outputs=2, batch_processing=True)
    return cast("tuple[DataNode, DataNode]", found)


def _find_window(cropping: RandomResizedCrop | ERandomCrop, height: int, width: int, draw: Sequence[float]) -> Vectors:
    top, left, *size = cropping.window(height, width, draw)
    return (top, left), size


def _find_square(transform: EvalTransform, height: int, width: int) -> Vectors:
    top, left, *size = transform.square(height, width)
    return (top, left), size


def _find_centre(transform: EvalTransform, height: int, width: int) -> Vectors:
    """Return the size of the resized image, and where its centre begins."""
    size = transform.resized(height, width)
    return size, transform.window(*size)[:2]


def _normalise(images: DataNode, mirror: DataNode | int = 0, mean: DataNode | list[float] = MEAN) -> DataNode:
    # Height and width stay in front of the channels: that is channels_last, seen as NCHW by a permutation.
    return fn.crop_mirror_normalize(images, mirror=mirror, mean=mean, std=STD, dtype=types.FLOAT, output_layout="HWC")


@pipeline_def(enable_conditionals=True)
def _train_pipeline(
    source: Source, in_files: bool, transform: TrainTransform, decoder: str, whole: bool
) -> tuple[DataNode, DataNode]:
    before, after = transform.augmentation.slots_before, transform.augmentation.slots_after
    # The operations only where there are some: DALI warns of an input without a use.
    num_outputs = 6 if before or after else 5
    images, labels, draw, mirror, mean, *drawn = fn.external_source(source, num_outputs=num_outputs)
    encoded = fn.io.file.read(images) if in_files else images
    start, size = _by_size(partial(_find_window, transform.cropping), encoded, draw)
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
    return _normalise(images, mirror, mean), labels


@pipeline_def
def _eval_pipeline(source: Source, in_files: bool, transform: EvalTransform, decoder: str) -> tuple[DataNode, DataNode]:
    images, labels = fn.external_source(source, num_outputs=2)
    encoded = fn.io.file.read(images) if in_files else images
    crop = transform.crop
    resampling = {"interp_type": INTERPOLATIONS[transform.resolved_interpolation], "antialias": transform.antialias}
    if transform.order == "crop_resize":
        start, size = _by_size(partial(_find_square, transform), encoded)
        images = fn.decoders.image_slice(encoded, start=start, shape=size, axes=[0, 1], device=decoder, **DECODING)
        images = fn.resize(images, size=[crop, crop], **resampling)
    else:
        size, start = _by_size(partial(_find_centre, transform), encoded)
        images = fn.decoders.image(encoded, device=decoder, **DECODING)
        images = fn.resize(images, size=fn.cast(size, dtype=types.FLOAT), **resampling)
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
        except (BadImage, RuntimeError):
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
        mirrors, crops = self.transform.draw_crops(self._epoch, indices.tolist())
        looks = self.transform.draw_looks(self._epoch, indices.tolist())
        operations = np.concatenate([looks.before, looks.after], axis=1)
        drawn = [operations] if operations.size else []
        return images, labels, crops, mirrors, np.array(MEAN, np.float32) - looks.offset, *drawn


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
            interpolation, option = transform.resolved_interpolation, "protocol.antialias"
        else:
            interpolation, option = transform.interpolation, "train.antialias"
        if interpolation == "bicubic" and not transform.antialias:
            # Keys' a is -1/2 in DALI, and -3/4 in OpenCV and torchvision.
            raise ConfigError(f"{option}=false: DALI's bicubic is not OpenCV's then: set loader=torchvision")
        self.plan = plan
        self._inputs = _Inputs(images, plan, transform)
        self._max_errors = max_errors
        self.substitution = Substitution(images, max_errors)
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
            if self._device.type == "cuda":
                # A copy of DALI's memory, pinned: from other memory the host would wait for all that the GPU has to do.
                label = label.pin_memory()
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
            used = next(filter(decodes, self.substitution.candidates(index)), None)
            self.substitution.record(index, used)
            assert used is not None  # or it had raised
            inputs.stand_ins[index] = used
        return bool(bad)
