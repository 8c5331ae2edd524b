"""The DALI loader: the same plan, draws and windows as the torchvision loader, in a DALI graph.

Image sizes are known only inside the graph, so the graph calls the rules of `transforms.py`.
"""

import itertools
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from importlib.util import cache_from_source
from pathlib import Path

import numpy as np
import torch
from nvidia.dali import Pipeline, fn, pipeline_def, types
from nvidia.dali.data_node import DataNode
from torch import Tensor

from resnest_imagenet.data.augment import PIXELWISE
from resnest_imagenet.data.dali_decoding import DecodingTrial, Vectors, compute_by_size, decode_window, find_device_id
from resnest_imagenet.data.dali_ops import apply_operations
from resnest_imagenet.data.decoders import Decoder, choose_decoder
from resnest_imagenet.data.decoding import BadImage, decode_by_pillow, is_ordinary
from resnest_imagenet.data.plan import BatchPlan
from resnest_imagenet.data.source import ImageSource
from resnest_imagenet.data.substitution import Substitution
from resnest_imagenet.data.transforms import (
    Colour,
    ERandomCrop,
    EvalTransform,
    RandomResizedCrop,
    TrainTransform,
    Window,
)
from resnest_imagenet.errors import ConfigError

PREFETCHED_BATCHES = 2  # decoded ahead of the consumer
READING_THREADS = 8  # for shards: they wait for the storage rather than for the processor
INTERPOLATIONS = {"bilinear": types.INTERP_LINEAR, "bicubic": types.INTERP_CUBIC}

Source = Callable[[], tuple]


def _split(window: Window) -> Vectors:
    top, left, *size = window
    return (top, left), size


def _find_window(cropping: RandomResizedCrop | ERandomCrop, height: int, width: int, draw: Sequence[float]) -> Vectors:
    return _split(cropping.window(height, width, draw))


def _find_decoded_and_window(
    cropping: RandomResizedCrop | ERandomCrop,
    height: int,
    width: int,
    draw: Sequence[float],
    operations: Sequence[Sequence[float]],
) -> Vectors:
    """Return the window to decode, and the window of the crop in it; operations: those before the crop."""
    start, shape = _find_window(cropping, height, width, draw)
    if all(op in PIXELWISE for op, *_ in operations):
        return start, shape, (0, 0), shape
    return (0, 0), (height, width), start, shape


def _find_square(transform: EvalTransform, height: int, width: int) -> Vectors:
    return _split(transform.square(height, width))


def _find_centre(transform: EvalTransform, height: int, width: int) -> Vectors:
    """Return the window to resize (start, shape), its size after that, and the start of the centre crop in it."""
    start, shape = _split(transform.source(height, width))
    size = transform.resized(*shape)
    return start, shape, size, transform.window(*size)[:2]


def _normalise(images: DataNode, mean: DataNode | Colour, std: Colour, mirror: DataNode | int = 0) -> DataNode:
    # The channels stay last: permuted to NCHW, that is channels_last.
    return fn.crop_mirror_normalize(images, mirror=mirror, mean=mean, std=std, dtype=types.FLOAT, output_layout="HWC")


@pipeline_def(enable_conditionals=True)
def _train_pipeline(source: Source, transform: TrainTransform, decoder: Decoder) -> tuple[DataNode, DataNode]:
    before, after = transform.augmentation.slots_before, transform.augmentation.slots_after
    # Ask for the operations and vertical flips only if there are some: DALI warns about an unused input.
    num_outputs = 5 + bool(before or after) + bool(transform.vertical_flip)
    encoded, labels, draw, mirror, mean, *drawn = fn.external_source(source, num_outputs=num_outputs)
    if before:
        rule = partial(_find_decoded_and_window, transform.cropping)
        *decoded, start, shape = compute_by_size(rule, 4, encoded, draw, drawn[0][: len(before)])
        images = apply_operations(decode_window(encoded, tuple(decoded), decoder), drawn[0], before)
        images = fn.slice(images, start=start, shape=shape, axes=[0, 1])
    else:
        images = decode_window(
            encoded, compute_by_size(partial(_find_window, transform.cropping), 2, encoded, draw), decoder
        )
    resampling = {"interp_type": INTERPOLATIONS[transform.interpolation], "antialias": transform.antialias}
    images = fn.resize(images, size=[transform.crop] * 2, **resampling)
    if after:
        images = apply_operations(images, drawn[0][len(before) :], after)
    if transform.vertical_flip:
        images = fn.flip(images, horizontal=0, vertical=drawn[-1])
    return _normalise(images, mean, transform.std, mirror), labels


@pipeline_def
def _eval_pipeline(source: Source, transform: EvalTransform, decoder: Decoder) -> tuple[DataNode, DataNode]:
    encoded, labels = fn.external_source(source, num_outputs=2)
    crop = transform.crop
    resampling = {"interp_type": INTERPOLATIONS[transform.resolved_interpolation], "antialias": transform.antialias}
    if transform.order == "crop_resize":
        images = decode_window(encoded, compute_by_size(partial(_find_square, transform), 2, encoded), decoder)
        images = fn.resize(images, size=[crop, crop], **resampling)
    else:
        *window, size, corner = compute_by_size(partial(_find_centre, transform), 4, encoded)
        images = decode_window(encoded, tuple(window), decoder)
        images = fn.resize(images, size=fn.cast(size, dtype=types.FLOAT), **resampling)
        images = fn.slice(images, start=corner, shape=[crop, crop], axes=[0, 1])
    return _normalise(images, transform.mean, transform.std), labels


def _to_decodable(encoded: bytes, by_pillow: bool = False) -> bytes:
    """Return an image in a form that DALI decodes: as it is if it is ordinary, else a PPM with Pillow's pixels.

    Raises:
        BadImage: it cannot be used.
    """
    if is_ordinary(encoded) and not by_pillow:
        return encoded
    pixels = decode_by_pillow(encoded)
    return b"P6 %d %d 255\n" % pixels.shape[1::-1] + pixels.tobytes()


_Read = tuple[bytes, int | None]  # an image, encoded, and its index; None if none can be used
# A batch that threads read: its indices, the images by shares, and the draws.
_Batch = tuple[list[int], list[Future[list[_Read]]], Future[tuple[np.ndarray, ...]]]


class _Inputs:
    """The inputs of DALI's external source: the next batch's images, labels and, in training, draws.

    Python reads and checks the images, so that DALI gets only images that can be decoded. Threads do that for the next
    batch while the training thread computes: it only collects what they return.

    This object is separate from the loader, so that loader and pipeline do not reference each other: a pipeline must be
    freed with its loader. The garbage collector might free it in a forked process, which lacks DALI's threads.
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
        self.recent: deque[list[int]] = deque(maxlen=PREFETCHED_BATCHES + 2)  # indices of the images used
        self.by_pillow: set[int] = set()  # indices of images that DALI cannot decode: Pillow decodes them
        self._images = images
        self._substitution = substitution
        self._num_threads = READING_THREADS if images.shard_sizes else workers
        self._epoch = 0
        self._pending: Iterator[np.ndarray] = iter(())
        self._next: _Batch | None = None

    def start(self, epoch: int, start: int) -> None:
        """Start a pass at the rank's `start`-th batch."""
        self._epoch = epoch
        self.recent.clear()
        self._pending = self.plan.batches(epoch, start)
        self._next = self._begin_batch()

    def __call__(self) -> tuple:
        """Return one batch; StopIteration ends the pass.

        Raises:
            DataError: an image cannot be used and must not be replaced.
            OSError: the storage fails.
        """
        if self._next is None:
            raise StopIteration
        indices, shares, drawn = self._next
        read = list(itertools.chain.from_iterable(share.result() for share in shares))
        draws = drawn.result()
        self._next = self._begin_batch()
        used: list[int] = []
        for index, (_, used_index) in zip(indices, read, strict=True):
            self._substitution.record(index, used_index)  # raises if it is None
            used += [] if used_index is None else [used_index]
        self.recent.append(used)
        images = [np.frombuffer(encoded, dtype=np.uint8) for encoded, _ in read]
        return images, self._images.labels[used], *draws

    def _begin_batch(self) -> _Batch | None:
        """Begin to read the pass's next batch; None if there is none.

        The threads end with it, so that none is there when workers are forked after a pass, or long after its loader.
        """
        batch = next(self._pending, None)
        if batch is None:
            return None
        indices = batch.tolist()
        threads = ThreadPoolExecutor(self._num_threads + 1)
        drawn = threads.submit(self._draw, self._epoch, indices)
        shares = [
            threads.submit(self._read_share, share.tolist()) for share in np.array_split(batch, self._num_threads)
        ]
        threads.shutdown(wait=False)
        return indices, shares, drawn

    def _draw(self, epoch: int, indices: list[int]) -> tuple[np.ndarray, ...]:
        """Return the inputs behind images and labels."""
        if isinstance(self.transform, EvalTransform):
            return ()
        mirrors, crops = self.transform.draw_crops(epoch, indices)
        horizontal, vertical = mirrors.T
        appearance = self.transform.draw_appearance(epoch, indices)
        operations = np.concatenate([appearance.before, appearance.after], axis=1)
        drawn = [operations] if operations.size else []
        drawn += [vertical] if self.transform.vertical_flip else []
        mean = np.array(self.transform.mean, np.float32) - appearance.offset
        return crops, horizontal, mean, *drawn

    def read(self, index: int) -> bytes:
        """Return an image in a form that DALI decodes.

        Raises:
            BadImage: it cannot be used.
        """
        return _to_decodable(self._images.read(index), index in self.by_pillow)

    def _read_share(self, indices: list[int]) -> list[_Read]:
        return [self._read_or_replace(index) for index in indices]

    def _read_or_replace(self, index: int) -> _Read:
        """Return an image or its replacement, and the index of the image returned; None if none can be used."""
        for used in self._substitution.candidates(index):
            with suppress(BadImage):
                return self.read(used), used
        return b"", None


def _delete_generated_files() -> None:
    """Delete the Python files that DALI makes of a graph with conditionals, in the folder of temporary files.

    It needs them no longer, and itself deletes them only where the process ends by itself.
    """
    for name, module in list(sys.modules.items()):
        if name.startswith("__autograph_generated_file") and module.__file__:
            Path(module.__file__).unlink(missing_ok=True)
            Path(cache_from_source(module.__file__)).unlink(missing_ok=True)


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
            # The parameter a of Keys' cubic is -1/2 in DALI, -3/4 in OpenCV and torchvision.
            raise ConfigError(f"{option}=false: DALI's bicubic then differs from OpenCV's: set loader=torchvision")
        self.plan = plan
        self.substitution = Substitution(images, max_errors)
        self._inputs = _Inputs(images, plan, transform, self.substitution, max(1, workers))
        self._device = device
        self._workers = max(1, workers)
        self._pipeline: Pipeline | None = None

    def batches(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        self._inputs.start(epoch, start)
        pipeline = self._pipeline or self._build()
        # Drop it until the pass is over: after a failure or an early exit its queue holds batches of this pass.
        self._pipeline = None
        stream = torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None
        while True:
            try:
                images, labels = pipeline.run(stream)
            except StopIteration:
                break
            except RuntimeError:
                # A failed pipeline cannot be reused. Every retry has found at least one more refused image, so this
                # loop ends.
                if not self._find_refused():
                    raise
                self._inputs.start(epoch, start)
                pipeline = self._build()
                continue
            start += 1
            nhwc = torch.from_dlpack(images.as_tensor())
            label = torch.from_dlpack(labels.as_tensor())
            if self._device.type == "cuda":
                # Copy the labels into pinned memory: a transfer from other memory would make the host wait for the GPU.
                label = label.pin_memory()
            yield nhwc.permute(0, 3, 1, 2), label.to(self._device, non_blocking=True)
        pipeline.reset()
        self._pipeline = pipeline

    def _build(self) -> Pipeline:
        build = _train_pipeline if isinstance(self._inputs.transform, TrainTransform) else _eval_pipeline
        pipeline = build(
            self._inputs,
            self._inputs.transform,
            choose_decoder(self._device),
            batch_size=self.plan.batch_size,
            num_threads=self._workers,
            device_id=find_device_id(self._device),
            prefetch_queue_depth=PREFETCHED_BATCHES,
        )
        pipeline.build()
        _delete_generated_files()
        return pipeline

    def _find_refused(self) -> bool:
        """Find the recent images that DALI does not decode and leave them to Pillow; return whether there are any.

        An image that Pillow does not decode either is then a bad image like any other.
        """
        inputs = self._inputs
        # On a GPU, try the CPU too: an error of the GPU is not the image's.
        cpu = torch.device("cpu")
        trials = [DecodingTrial(choose_decoder(device), device) for device in {cpu, self._device}]

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
