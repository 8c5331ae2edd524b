"""Finds the objects in images."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import overload

import numpy as np
import torch
from PIL import Image

from resnest_imagenet.compute import autocast
from resnest_imagenet.data.decoding import BadImage, decode_upright
from resnest_imagenet.data.examine import split_unreadable
from resnest_imagenet.data.instance_geometry import View, resize_picture, scale_short_side
from resnest_imagenet.data.instance_loader import pad_images
from resnest_imagenet.data.source import ImageSource
from resnest_imagenet.errors import ConfigError, DataError, printable
from resnest_imagenet.evaluation.accuracy import require_finite
from resnest_imagenet.evaluation.detections import bring_back, is_finite
from resnest_imagenet.evaluation.masks import decode_mask, encode_masks
from resnest_imagenet.evaluation.operators import choose_for_inference
from resnest_imagenet.inference.detector import Detector, open_detector, take_detector
from resnest_imagenet.inference.images import Images, list_images
from resnest_imagenet.inference.options import check_arguments
from resnest_imagenet.instances import Detections
from resnest_imagenet.models.zoo import find_pixels

SCORE = 0.5  # objects have a higher one, unless another threshold is given


@dataclass(frozen=True, eq=False)
class _DecodedMasks(Sequence[np.ndarray]):
    """Masks as pixels, decoded from their run-length codes on access."""

    codes: tuple[bytes, ...]
    size: tuple[int, int]

    def __len__(self) -> int:
        return len(self.codes)

    @overload
    def __getitem__(self, index: int) -> np.ndarray: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[np.ndarray]: ...

    def __getitem__(self, index: int | slice) -> np.ndarray | Sequence[np.ndarray]:
        if isinstance(index, slice):
            return _DecodedMasks(self.codes[index], self.size)
        return decode_mask(self.codes[index], self.size)


@dataclass(frozen=True, eq=False)
class DetectedImage:
    """The n objects that a network finds in one image, the most certain first.

    Attributes:
        file: of the image.
        pixels: of the image, upright by its EXIF orientation, uint8 (H, W, 3).
        boxes: float64 (n, 4), x1 y1 x2 y2 in pixels of the image.
        scores: float64 (n,), 0..1, descending.
        labels: int64 (n,), class indices.
        masks: n compressed run-length codes of the whole image, in pycocotools' form; None: boxes only.
    """

    file: str
    pixels: np.ndarray
    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    masks: tuple[bytes, ...] | None = None

    def __len__(self) -> int:
        return len(self.boxes)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the image in pixels."""
        height, width = self.pixels.shape[:2]
        return height, width

    @property
    def decoded_masks(self) -> Sequence[np.ndarray] | None:
        """The n masks, bool (H, W), decoded one by one on access: together they may take more memory than the image."""
        return None if self.masks is None else _DecodedMasks(self.masks, self.size)


@dataclass(frozen=True)
class DetectedImages:
    """The objects that a network finds in N images, in order; the iteration computes them one by one.

    Attributes:
        detector: the network.
        images: the N images.
        skipped: a line for each image that cannot be used; the N do not include it.
        score: all objects have a higher one.
        precision: fp32, bf16 or fp16.
    """

    detector: Detector
    images: ImageSource
    skipped: tuple[str, ...]
    score: float
    precision: str

    def __len__(self) -> int:
        return len(self.images)

    @property
    def files(self) -> list[str]:
        """The paths of the N images."""
        return [self.images.name(index) for index in range(len(self))]

    def __iter__(self) -> Iterator[DetectedImage]:
        for index, file in enumerate(self.files):
            try:
                picture = decode_upright(self.images.read(index))
            except BadImage as error:  # the file has changed since it was checked
                raise DataError(f"{file}: {error}") from error
            yield self._describe(file, picture, self._find(file, picture))

    @torch.inference_mode()
    def _find(self, file: str, picture: Image.Image) -> Detections:
        """Return the detections in an image, in its own pixels."""
        detector, protocol = self.detector, self.detector.protocol
        original = (picture.height, picture.width)
        size = scale_short_side(*original, protocol.short_side, protocol.longest)
        shown = torch.from_numpy(resize_picture(picture, View(*size, is_mirrored=False)))
        batch = pad_images([shown], find_pixels(detector.name), detector.device)
        with autocast(detector.device, self.precision):
            (detections,) = detector.module(batch, [size])
        require_finite(np.array([is_finite(detections)]), lambda index: file, self.precision)
        return bring_back(detections, size, original)

    def _describe(self, file: str, picture: Image.Image, detections: Detections) -> DetectedImage:
        scores = detections.scores.double()
        is_above = scores > self.score
        boxes, labels = detections.boxes[is_above], detections.labels[is_above]
        masks = None
        if detections.masks is not None:
            masks = tuple(encode_masks(detections.masks[is_above], boxes, (picture.height, picture.width)))
        columns = (boxes.double().numpy(), scores[is_above].numpy(), labels.numpy())
        return DetectedImage(file, np.array(picture), *columns, masks)


def detect(
    network: Detector | str | PathLike[str], images: Images, *, score: float = SCORE, precision: str = "fp32"
) -> DetectedImages:
    """Find the objects in images; images that cannot be used are skipped.

    Args:
        network: of `open_detector`, or a source that it takes.
        images: files, folders or patterns such as "photos/**/*.jpg", one or several.
        score: objects have a higher one, 0 to below 1. A network given as a source is opened with this `min_score`; one
            that is open already finds nothing below its own.
        precision: fp32, bf16 or fp16.

    Returns:
        The images with their objects, to iterate over, and a line for each image that was skipped.

    Raises:
        UserError: for what a user can cause, as one line; for a fault of an image when the iteration reaches it.
    """
    arguments = check_arguments(score=score, precision=precision)
    listed = list_images(images)
    detector = open_above(network, arguments.score)
    usable, skipped = split_unreadable(listed)
    size = (detector.protocol.short_side, detector.protocol.longest)
    choose_for_inference(detector.module, (1, *size), arguments.precision)
    return DetectedImages(detector, usable, tuple(skipped), arguments.score, arguments.precision)


def open_above(network: Detector | str | PathLike[str], score: float) -> Detector:
    """Return a detector that finds all objects above a score; a source is opened with that score.

    Raises:
        ConfigError: the detector was opened with a higher `min_score`.
        UserError: see `open_detector`.
    """
    if isinstance(network, str | PathLike):
        return open_detector(network, protocol={"min_score": score})
    detector = take_detector(network)
    least = detector.protocol.min_score
    if score < least:
        raise ConfigError(
            f"score={score:g} is below min_score={least:g}, with which {detector.source} was opened: open it with "
            f'open_detector(..., protocol={{"min_score": {score:g}}})'
        )
    return detector


def format_objects(image: DetectedImage, classes: Sequence[str], top: int) -> str:
    """Return lines for people: an image, and its most certain objects with their boxes in pixels.

    Args:
        image: of `DetectedImages`.
        classes: names, in the order of the indices.
        top: largest number of objects; a last line counts the others.
    """
    names = [printable(classes[label]) for label in image.labels[:top].tolist()]
    width = max(map(len, names), default=0)
    rows = zip(image.scores.tolist(), names, image.boxes.round().astype(int).tolist(), strict=False)
    lines = [
        f"  {score:.2f}  {name:<{width}}  x {x1} to {x2}, y {y1} to {y2}" for score, name, (x1, y1, x2, y2) in rows
    ]
    if len(image) > top:
        lines.append(f"  and {len(image) - top} more: top={len(image)} lists them")
    return "\n".join([printable(image.file), *(lines or ["  no objects"])])
