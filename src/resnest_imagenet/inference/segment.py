"""Predicts the class of each pixel of images."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from os import PathLike

import numpy as np
import torch
from torch import Tensor

from resnest_imagenet.data.decoding import BadImage, decode_by_pillow
from resnest_imagenet.data.examine import split_unreadable
from resnest_imagenet.data.source import ImageSource
from resnest_imagenet.errors import DataError, printable
from resnest_imagenet.evaluation.accuracy import require_finite
from resnest_imagenet.evaluation.operators import choose_for_inference
from resnest_imagenet.evaluation.regions import RegionProtocol, score_pixels
from resnest_imagenet.inference.images import Images, list_images
from resnest_imagenet.inference.options import check_arguments
from resnest_imagenet.inference.segmenter import USUAL_SIDE, Segmenter, take_segmenter


@dataclass(frozen=True)
class SegmentedImage:
    """One image and its predicted mask.

    Attributes:
        file: the image's.
        pixels: of the image, uint8 (H, W, 3).
        mask: uint8 (H, W), the class index of each pixel.
    """

    file: str
    pixels: np.ndarray
    mask: np.ndarray

    def share_classes(self, num_classes: int) -> np.ndarray:
        """Return each class's share of the pixels, float64 (num_classes,): they add up to 1."""
        return np.bincount(self.mask.ravel(), minlength=num_classes) / self.mask.size


@dataclass(frozen=True)
class SegmentedImages:
    """N images with their predicted masks, in order; a mask is computed when the iteration reaches it.

    Attributes:
        segmenter: the network.
        images: the N images.
        skipped: a line for each image that cannot be used; these are not among the N.
        precision: fp32, bf16 or fp16.
    """

    segmenter: Segmenter
    images: ImageSource
    skipped: tuple[str, ...]
    precision: str

    def __len__(self) -> int:
        return len(self.images)

    @property
    def files(self) -> list[str]:
        """The paths of the N images."""
        return [self.images.name(index) for index in range(len(self))]

    @property
    def protocol(self) -> RegionProtocol:
        """How the network sees the images."""
        return cover_pixels(self.segmenter.protocol)

    def __iter__(self) -> Iterator[SegmentedImage]:
        for index, file in enumerate(self.files):
            try:
                pixels = decode_by_pillow(self.images.read(index))
            except BadImage as error:  # the file has changed since it was checked
                raise DataError(f"{file}: {error}") from error
            yield SegmentedImage(file, pixels, self._classify(file, pixels))

    def _classify(self, file: str, pixels: np.ndarray) -> np.ndarray:
        """Return the class index of each pixel, uint8 (H, W)."""
        images = torch.from_numpy(pixels).to(self.segmenter.device).permute(2, 0, 1)[None]
        scores: Tensor = score_pixels(self.segmenter.module, images, self.protocol, self.precision)
        require_finite(np.array([bool(scores.isfinite().all())]), lambda index: file, self.precision)
        return scores.argmax(1)[0].to(torch.uint8).cpu().numpy()


def cover_pixels(protocol: RegionProtocol) -> RegionProtocol:
    """Return a protocol that covers every pixel: "centre" does not, so it becomes "whole"."""
    return replace(protocol, name="whole", crop=None) if protocol.name == "centre" else protocol


def segment(network: Segmenter | str | PathLike[str], images: Images, *, precision: str = "fp32") -> SegmentedImages:
    """Find the class of each pixel of images; images that cannot be used are skipped.

    Args:
        network: of `open_segmenter`, or a source that it takes.
        images: files, folders or patterns such as "photos/**/*.jpg", one or several.
        precision: fp32, bf16 or fp16.

    Returns:
        The images with their masks, as an iterable, and a line for each image that was skipped.

    Raises:
        UserError: a user's error, in one line; during the iteration if it is about an image.
    """
    arguments = check_arguments(precision=precision)
    listed = list_images(images)
    segmenter = take_segmenter(network)
    usable, skipped = split_unreadable(listed)
    side = segmenter.protocol.crop or USUAL_SIDE
    choose_for_inference(segmenter.module, (1, side, side), precision)
    return SegmentedImages(segmenter, usable, tuple(skipped), arguments.precision)


def format_shares(image: SegmentedImage, classes: Sequence[str], top: int) -> str:
    """Return lines for people: an image, and its largest classes by their share of the pixels.

    Args:
        image: of `SegmentedImages`.
        classes: names, in the order of the indices.
        top: the largest number of classes.
    """
    shares = image.share_classes(len(classes))
    largest = [label for label in np.argsort(-shares, kind="stable")[:top].tolist() if shares[label]]
    lines = [f"  {100 * shares[label]:>6.2f} %  {printable(classes[label])}" for label in largest]
    return "\n".join([printable(image.file), *lines])
