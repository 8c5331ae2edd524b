"""Decoding in DALI's graphs, and the comparison of the GPU's decoder with the CPU's."""

from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
import torch
from nvidia.dali import Pipeline, fn, pipeline_def
from nvidia.dali.data_node import DataNode
from nvidia.dali.pipeline import do_not_convert

from resnest_imagenet.data.decoders import Decoder
from resnest_imagenet.data.decoding import BadImage, is_ordinary
from resnest_imagenet.data.source import ImageSource
from resnest_imagenet.errors import first_line

# As Pillow and torchvision decode: EXIF orientation ignored, and on a GPU the same chroma upsampling as on a CPU.
DECODING: dict[str, Any] = {"adjust_orientation": False, "jpeg_fancy_upsampling": True}
# Of the differences between the decoders, in 1/255: mean and 99th percentile. They are the loaders' of docs/parity.md.
DECODER_BOUND = (0.25, 2.0)

_COMPARED = 4  # images
_TRIED = 64  # images, until so many JPEGs are found

Vectors = tuple[Sequence[int], ...]
Rule = Callable[..., Vectors]  # of height, width and draws


@do_not_convert  # an `if` of a rule is Python's: DALI must not turn it into a graph's conditional
def compute_by_size(rule: Rule, num_vectors: int, encoded: DataNode, *drawn: DataNode) -> tuple[DataNode, ...]:
    """Compute vectors of two for each image in Python, from its size, which the graph reads before it decodes.

    Python is called once per batch: a dozen of DALI's own scalar operations would take a tenth of the decoding time.
    """

    def compute(shapes: list[np.ndarray], *draws: list[np.ndarray]) -> tuple[list[np.ndarray], ...]:
        lists = ([array.tolist() for array in arrays] for arrays in draws)
        results = [rule(*shape.tolist()[:2], *draw) for shape, *draw in zip(shapes, *lists, strict=True)]
        return tuple(map(list, np.array(results, np.int32).swapaxes(0, 1)))

    shapes = fn.peek_image_shape(encoded, adjust_orientation=False)
    vectors = fn.python_function(shapes, *drawn, function=compute, num_outputs=num_vectors, batch_processing=True)
    return cast("tuple[DataNode, ...]", vectors)


@do_not_convert
def decode_window(encoded: DataNode, window: tuple[DataNode, ...], decoder: Decoder) -> DataNode:
    """Decode a window (start, shape), which may be the whole image.

    `decoders.image` is not used: it ends the process with a segmentation fault if a header cannot be read. This decoder
    waits for the window, and so for `peek_image_shape`, which raises an error first. See docs/dali-crash.md.
    """
    start, shape = window
    device = "mixed" if decoder == "mixed" else "cpu"
    images = fn.decoders.image_slice(encoded, start=start, shape=shape, axes=[0, 1], device=device, **DECODING)
    return images.gpu() if decoder == "copied" else images


def find_device_id(device: torch.device) -> int | None:
    """Return a GPU's number, the current one's for "cuda"; None for a CPU."""
    if device.type != "cuda":
        return None
    return torch.cuda.current_device() if device.index is None else device.index


@pipeline_def
def decoding_pipeline(decoder: Decoder) -> DataNode:
    """Decode whole images; feed them as the input "encoded"."""
    encoded = fn.external_source(name="encoded")
    whole = compute_by_size(lambda height, width: ((0, 0), (height, width)), 2, encoded)
    return decode_window(encoded, whole, decoder)


def build_decoding(decoder: Decoder, device: torch.device, batch_size: int = 1) -> Pipeline:
    """Build a `decoding_pipeline` for a device."""
    pipeline = decoding_pipeline(
        decoder, batch_size=batch_size, num_threads=1, device_id=find_device_id(device), prefetch_queue_depth=1
    )
    pipeline.build()
    return pipeline


class DecodingTrial:
    """Tries whether DALI decodes an image: the error of a failed pipeline does not name the image."""

    def __init__(self, decoder: Decoder, device: torch.device) -> None:
        self._decoder = decoder
        self._device = device
        self._pipeline: Pipeline | None = None

    def __call__(self, encoded: bytes) -> bool:
        """Return whether it decodes an image."""
        pipeline = self._pipeline or build_decoding(self._decoder, self._device)
        self._pipeline = None  # a pipeline that fails cannot be used again
        try:
            pipeline.run(encoded=[np.frombuffer(encoded, dtype=np.uint8)])
        except RuntimeError:
            return False
        self._pipeline = pipeline
        return True


def decode_by_dali(encoded: Sequence[bytes], decoder: Decoder, device: torch.device) -> list[np.ndarray]:
    """Decode whole images: uint8 RGB (H, W, 3) each.

    Raises:
        RuntimeError: DALI does not decode one.
    """
    pipeline = build_decoding(decoder, device, len(encoded))
    (images,) = pipeline.run(encoded=[np.frombuffer(image, dtype=np.uint8) for image in encoded])
    on_cpu = images.as_cpu()
    return [np.array(on_cpu.at(number)) for number in range(len(encoded))]


def find_jpegs(images: ImageSource, count: int = _COMPARED) -> list[bytes]:
    """Return up to `count` JPEGs of a set, spread over it: only these are decoded on a GPU."""
    jpegs: list[bytes] = []
    for index in np.unique(np.linspace(0, len(images) - 1, min(_TRIED, len(images))).astype(int)).tolist():
        try:
            encoded = images.read(index)
        except BadImage:
            continue
        if encoded.startswith(b"\xff\xd8") and is_ordinary(encoded):
            jpegs.append(encoded)
        if len(jpegs) == count:
            break
    return jpegs


def compare_decoders(jpegs: Sequence[bytes], device: torch.device) -> str | None:
    """Decode images by the GPU's decoder and by the CPU's.

    Returns:
        Why the GPU's decoder must not be used, for people; None if the pixels differ by no more than DECODER_BOUND.
    """
    if not jpegs:
        return None
    try:
        ours = decode_by_dali(jpegs, "mixed", device)
    except RuntimeError as error:
        return f"fails: {first_line(error)}"
    expected = decode_by_dali(jpegs, "cpu", torch.device("cpu"))
    if [image.shape for image in ours] != [image.shape for image in expected]:
        return "returns images of other sizes"
    pairs = zip(ours, expected, strict=True)
    difference = np.concatenate([np.abs(one.astype(np.int16) - other).ravel() for one, other in pairs])
    mean, high = float(difference.mean()), float(np.percentile(difference, 99))
    if mean <= DECODER_BOUND[0] and high <= DECODER_BOUND[1]:
        return None
    bounds = f"more than {DECODER_BOUND[0]:g} and {DECODER_BOUND[1]:g}"
    return f"differs from the CPU's: mean {mean:.2f}, 99th percentile {high:g} of 255, {bounds}"
