"""The DALI loader: the same plan, draws and windows as the torchvision loader, in a DALI graph.

Image sizes are known only inside the graph, which calls the rules of `transforms.py` with them.
"""

import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from nvidia.dali import Pipeline, fn, pipeline_def, types
from nvidia.dali.data_node import DataNode
from nvidia.dali.pipeline import do_not_convert
from torch import Tensor

from resnest_imagenet.data.dali_ops import apply_operations
from resnest_imagenet.data.decoding import BadImage, decode_by_pillow, is_ordinary
from resnest_imagenet.data.plan import BatchPlan
from resnest_imagenet.data.source import ImageSource
from resnest_imagenet.data.substitution import Substitution
from resnest_imagenet.data.transforms import (
    MEAN,
    STD,
    ERandomCrop,
    EvalTransform,
    RandomResizedCrop,
    TrainTransform,
    Window,
)
from resnest_imagenet.errors import ConfigError

PREFETCHED_BATCHES = 2  # decoded ahead of the consumer
READING_THREADS = 8  # of shards: they wait for the storage, rather than for the processor
# As Pillow and torchvision decode: EXIF orientation ignored, and on a GPU the same chroma upsampling as on a CPU.
DECODING: dict[str, Any] = {"adjust_orientation": False, "jpeg_fancy_upsampling": True}
INTERPOLATIONS = {"bilinear": types.INTERP_LINEAR, "bicubic": types.INTERP_CUBIC}

Source = Callable[[], tuple]
Vectors = tuple[Sequence[int], ...]
Rule = Callable[..., Vectors]  # of height, width and what was drawn


@do_not_convert  # as Python what is a rule's `if`, and not as a graph's
def _by_size(rule: Rule, num_vectors: int, encoded: DataNode, *drawn: DataNode) -> tuple[DataNode, ...]:
    """Let Python compute vectors of two for each image from its size, which the graph knows before it decodes.

    In one call per batch: a dozen of DALI's own operations on scalars take a tenth as long as the decoding.
    """

    def compute(shapes: list[np.ndarray], *draws: list[np.ndarray]) -> tuple[list[np.ndarray], ...]:
        lists = ([array.tolist() for array in arrays] for arrays in draws)
        results = [rule(*shape.tolist()[:2], *draw) for shape, *draw in zip(shapes, *lists, strict=True)]
        return tuple(map(list, np.array(results, np.int32).swapaxes(0, 1)))

    shapes = fn.peek_image_shape(encoded, adjust_orientation=False)
    found = fn.python_function(shapes, *drawn, function=compute, num_outputs=num_vectors, batch_processing=True)
    return cast("tuple[DataNode, ...]", found)


def _decode(encoded: DataNode, window: tuple[DataNode, ...], decoder: str) -> DataNode:
    """Decode a window (start, shape), also where it is the whole image.

    Not by `decoders.image`: it ends the process with a segmentation fault where a header cannot be read. This one waits
    for the window, and so for `peek_image_shape`, which raises. docs/dali-crash.md has more.
    """
    start, shape = window
    return fn.decoders.image_slice(encoded, start=start, shape=shape, axes=[0, 1], device=decoder, **DECODING)


def _split(window: Window) -> Vectors:
    top, left, *size = window
    return (top, left), size


def _find_window(cropping: RandomResizedCrop | ERandomCrop, height: int, width: int, draw: Sequence[float]) -> Vectors:
    return _split(cropping.window(height, width, draw))


def _find_all_and_window(
    cropping: RandomResizedCrop | ERandomCrop, height: int, width: int, draw: Sequence[float]
) -> Vectors:
    return (0, 0), (height, width), *_find_window(cropping, height, width, draw)


def _find_square(transform: EvalTransform, height: int, width: int) -> Vectors:
    return _split(transform.square(height, width))


def _find_centre(transform: EvalTransform, height: int, width: int) -> Vectors:
    """Return what is resized, its size then, and where the centre of that begins."""
    start, shape = _split(transform.source(height, width))
    size = transform.resized(*shape)
    return start, shape, size, transform.window(*size)[:2]


def _normalise(images: DataNode, mirror: DataNode | int = 0, mean: DataNode | list[float] = MEAN) -> DataNode:
    # Height and width stay in front of the channels: that is channels_last, seen as NCHW by a permutation.
    return fn.crop_mirror_normalize(images, mirror=mirror, mean=mean, std=STD, dtype=types.FLOAT, output_layout="HWC")


@pipeline_def(enable_conditionals=True)
def _train_pipeline(source: Source, transform: TrainTransform, decoder: str) -> tuple[DataNode, DataNode]:
    before, after = transform.augmentation.slots_before, transform.augmentation.slots_after
    # The operations only where there are some: DALI warns of an input without a use.
    num_outputs = 6 if before or after else 5
    encoded, labels, draw, mirror, mean, *drawn = fn.external_source(source, num_outputs=num_outputs)
    if before:
        rule = partial(_find_all_and_window, transform.cropping)
        *whole, start, shape = _by_size(rule, 4, encoded, draw)
        images = apply_operations(_decode(encoded, tuple(whole), decoder), drawn[0], before)
        images = fn.slice(images, start=start, shape=shape, axes=[0, 1])
    else:
        images = _decode(encoded, _by_size(partial(_find_window, transform.cropping), 2, encoded, draw), decoder)
    resampling = {"interp_type": INTERPOLATIONS[transform.interpolation], "antialias": transform.antialias}
    images = fn.resize(images, size=[transform.crop] * 2, **resampling)
    if after:
        images = apply_operations(images, drawn[0][len(before) :], after)
    return _normalise(images, mirror, mean), labels


@pipeline_def
def _eval_pipeline(source: Source, transform: EvalTransform, decoder: str) -> tuple[DataNode, DataNode]:
    encoded, labels = fn.external_source(source, num_outputs=2)
    crop = transform.crop
    resampling = {"interp_type": INTERPOLATIONS[transform.resolved_interpolation], "antialias": transform.antialias}
    if transform.order == "crop_resize":
        images = _decode(encoded, _by_size(partial(_find_square, transform), 2, encoded), decoder)
        images = fn.resize(images, size=[crop, crop], **resampling)
    else:
        *window, size, corner = _by_size(partial(_find_centre, transform), 4, encoded)
        images = _decode(encoded, tuple(window), decoder)
        images = fn.resize(images, size=fn.cast(size, dtype=types.FLOAT), **resampling)
        images = fn.slice(images, start=corner, shape=[crop, crop], axes=[0, 1])
    return _normalise(images), labels


@pipeline_def
def _decoding_pipeline(decoder: str) -> DataNode:
    encoded = fn.external_source(name="encoded")
    return _decode(encoded, _by_size(lambda height, width: ((0, 0), (height, width)), 2, encoded), decoder)


class _Trial:
    """Says whether DALI decodes an image: a pipeline that failed does not say which image it was."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pipeline: Pipeline | None = None

    def __call__(self, encoded: bytes) -> bool:
        pipeline = self._pipeline or self._build()
        self._pipeline = None  # of no more use if it fails
        try:
            pipeline.run(encoded=[np.frombuffer(encoded, dtype=np.uint8)])
        except RuntimeError:
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


def _to_decodable(encoded: bytes, by_pillow: bool = False) -> bytes:
    """Return an image in a form that DALI decodes: itself if it is ordinary, else a PPM, decoded by Pillow.

    Raises:
        BadImage: it cannot be used.
    """
    if is_ordinary(encoded) and not by_pillow:
        return encoded
    pixels = decode_by_pillow(encoded)
    return b"P6 %d %d 255\n" % pixels.shape[1::-1] + pixels.tobytes()


class _Inputs:
    """What DALI's external source asks for: the next batch's images, labels and, in training, draws.

    Python reads the images and looks at them: what DALI gets can be decoded.

    Apart from the loader, so that loader and pipeline do not hold each other: a pipeline is freed with its loader and
    not by the garbage collector, which may run in a forked process, where DALI's threads are not.
    """

    def __init__(
        self,
        images: ImageSource,
        plan: BatchPlan,
        transform: TrainTransform | EvalTransform,
        substitution: Substitution,
        workers: int,
    ) -> None:
        self.plan = plan
        self.transform = transform
        self.recent: deque[list[int]] = deque(maxlen=PREFETCHED_BATCHES + 2)  # the images used
        self.by_pillow: set[int] = set()  # those that only DALI does not decode
        self._images = images
        self._substitution = substitution
        self._num_threads = READING_THREADS if images.shard_sizes else workers
        self._epoch = 0
        self._pending: Iterator[np.ndarray] = iter(())

    def start(self, epoch: int, start: int) -> None:
        """Begin a pass with the rank's `start`-th batch."""
        self._epoch = epoch
        self.recent.clear()
        self._pending = self.plan.batches(epoch, start)

    def __call__(self) -> tuple:
        """Return one batch; StopIteration ends the pass.

        Raises:
            DataError: an image that cannot be used and may not be replaced.
            OSError: the storage fails.
        """
        indices = next(self._pending).tolist()
        encoded, found = self._read_all(indices)
        for index, used_index in zip(indices, found, strict=True):
            self._substitution.record(index, used_index)  # which raises where there is none
        used = [index for index in found if index is not None]
        self.recent.append(used)
        images = [np.frombuffer(each, dtype=np.uint8) for each in encoded]
        labels = self._images.labels[used]
        if isinstance(self.transform, EvalTransform):
            return images, labels
        mirrors, crops = self.transform.draw_crops(self._epoch, indices)
        appearance = self.transform.draw_appearance(self._epoch, indices)
        operations = np.concatenate([appearance.before, appearance.after], axis=1)
        drawn = [operations] if operations.size else []
        return images, labels, crops, mirrors, np.array(MEAN, np.float32) - appearance.offset, *drawn

    def read(self, index: int) -> bytes:
        """Return an image as DALI decodes it.

        Raises:
            BadImage: it cannot be used.
        """
        return _to_decodable(self._images.read(index), index in self.by_pillow)

    def _read_all(self, indices: list[int]) -> tuple[list[bytes], list[int | None]]:
        """Read in threads of this call only: none is left to a fork, or by a loader that is gone."""

        def read_share(share: np.ndarray) -> list[tuple[bytes, int | None]]:
            return [self._read_or_replace(index) for index in share.tolist()]

        with ThreadPoolExecutor(self._num_threads) as threads:
            shares = threads.map(read_share, np.array_split(indices, self._num_threads))
            encoded, used = zip(*itertools.chain.from_iterable(shares), strict=True)
        return list(encoded), list(used)

    def _read_or_replace(self, index: int) -> tuple[bytes, int | None]:
        """Return an image or what stands in for it, and the index of the one it is; None: none of them can be used."""
        for used in self._substitution.candidates(index):
            with suppress(BadImage):
                return self.read(used), used
        return b"", None


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
        self.substitution = Substitution(images, max_errors)
        self._inputs = _Inputs(images, plan, transform, self.substitution, max(1, workers))
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
            except RuntimeError:
                # The pipeline is of no more use. Each further turn has found an image more: they end.
                if not self._find_refused():
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
        build = _train_pipeline if isinstance(self._inputs.transform, TrainTransform) else _eval_pipeline
        pipeline = build(
            self._inputs,
            self._inputs.transform,
            "mixed" if on_gpu else "cpu",
            batch_size=self.plan.batch_size,
            num_threads=self._workers,
            device_id=self._device.index if on_gpu else None,
            prefetch_queue_depth=PREFETCHED_BATCHES,
        )
        pipeline.build()
        return pipeline

    def _find_refused(self) -> bool:
        """Find images among those asked for last that DALI does not decode, for Pillow; say whether there are any.

        Where Pillow does not decode them either, they are bad like any other.
        """
        inputs = self._inputs
        # On a GPU both: a fault of the GPU is not the images'.
        trials = [_Trial(device) for device in {torch.device("cpu"), self._device}]

        def is_refused(index: int) -> bool:
            try:
                encoded = inputs.read(index)
            except BadImage:  # the file has changed since
                return True
            return not any(decodes(encoded) for decodes in trials)

        recent = {index for used in inputs.recent for index in used if index not in inputs.by_pillow}
        refused = set(filter(is_refused, recent))
        inputs.by_pillow |= refused
        return bool(refused)
