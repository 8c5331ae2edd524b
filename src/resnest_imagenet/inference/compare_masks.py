"""Compares networks of segmentation on the same images: where their masks differ."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike

import numpy as np
from PIL import Image
from tqdm import tqdm

from resnest_imagenet.data.examine import split_unreadable
from resnest_imagenet.data.folder import ImageFolder
from resnest_imagenet.errors import ConfigError, DataError, printable
from resnest_imagenet.evaluation.cells import guard
from resnest_imagenet.evaluation.overlays import encode_index_png
from resnest_imagenet.inference.compare import distinguish, require_same_classes
from resnest_imagenet.inference.images import Images, list_images
from resnest_imagenet.inference.options import check_arguments
from resnest_imagenet.inference.segment import SegmentedImages
from resnest_imagenet.inference.segmenter import Segmenter, take_segmenter


@dataclass(frozen=True)
class MaskComparison:
    """The masks of M networks for N images, compared.

    Attributes:
        names: of the networks, all different.
        images: the N images.
        classes: K names, in the order of the class indices, the same for all networks.
        palette: uint8 (K, 3), the first network's.
        differing: (N,) float64, the share of each image's pixels that do not have the same class in all masks.
        pixels: (M, K) int64, how many pixels of all images each network gives each class.
        shared: (K,) int64, how many pixels all networks give this class.
        covered: (K,) int64, how many pixels at least one network gives this class.
        disagreements: for each image, the classes (one per network) that most of its differing pixels have, and the
            share of the image that these pixels are; None if the masks are equal.
        masks: for each image a PNG file per network: a photograph's masks are kilobytes as files, megabytes as arrays.
        protocols: how each network sees an image.
        skipped: a line for each image that cannot be used; these are not among the N.
    """

    names: tuple[str, ...]
    images: ImageFolder
    classes: tuple[str, ...]
    palette: np.ndarray
    differing: np.ndarray
    pixels: np.ndarray
    shared: np.ndarray
    covered: np.ndarray
    disagreements: tuple[tuple[tuple[str, ...], float] | None, ...]
    masks: tuple[tuple[bytes, ...], ...]
    protocols: tuple[str, ...]
    skipped: tuple[str, ...] = ()

    @property
    def order(self) -> np.ndarray:
        """The images whose masks differ, those that differ most first."""
        return np.argsort(-self.differing, kind="stable")[: np.count_nonzero(self.differing)]

    @property
    def overlap(self) -> np.ndarray:
        """Shared over covered pixels of each class in percent, (K,) float64: for two networks, their IoU."""
        return 100 * self.shared / np.maximum(self.covered, 1)

    def read_masks(self, index: int) -> np.ndarray:
        """Return the masks of one image, uint8 (M, H, W): class indices."""
        return np.stack([np.asarray(Image.open(io.BytesIO(encoded))) for encoded in self.masks[index]])


def compare_masks(
    networks: Sequence[Segmenter | str | PathLike[str]], images: Images, *, precision: str = "fp32"
) -> MaskComparison:
    """Compare networks of segmentation on the same images; images that cannot be used are skipped.

    Args:
        networks: two or more, each of `open_segmenter`, or a source that it takes; with the same classes.
        images: files, folders or patterns such as "photos/**/*.jpg", one or several.
        precision: fp32, bf16 or fp16.

    Raises:
        DataError: no image can be used.
        ConfigError: there are fewer than two networks, or their classes differ.
        UserError: another user's error, in one line.
    """
    arguments = check_arguments(precision=precision)
    if isinstance(networks, str | PathLike | Segmenter) or len(networks) < 2:
        raise ConfigError("networks: give two networks or more")
    listed = list_images(images)
    segmenters = [take_segmenter(network) for network in networks]
    require_same_classes(segmenters)
    usable, skipped = split_unreadable(listed)
    if not len(usable):
        raise DataError(skipped[0])
    count = _Count(segmenters)
    segmented = [SegmentedImages(segmenter, usable, (), arguments.precision) for segmenter in segmenters]
    rows = tqdm(
        zip(*segmented, strict=True), total=len(usable), unit="image", disable=None, dynamic_ncols=True, leave=False
    )
    for row in rows:
        count.add(np.stack([image.mask for image in row]))
    return MaskComparison(
        distinguish(segmenters),
        usable,
        segmenters[0].classes,
        segmenters[0].palette,
        np.array(count.differing),
        count.pixels,
        count.shared,
        count.covered,
        tuple(count.disagreements),
        tuple(count.masks),
        tuple(images.protocol.text for images in segmented),
        tuple(skipped),
    )


class _Count:
    """Counts image by image; the attributes are those of `MaskComparison`."""

    def __init__(self, segmenters: Sequence[Segmenter]) -> None:
        self._classes, self._palette = segmenters[0].classes, segmenters[0].palette
        num_classes = len(self._classes)
        self.differing: list[float] = []
        self.pixels = np.zeros((len(segmenters), num_classes), np.int64)
        self.shared, self.covered = np.zeros((2, num_classes), np.int64)
        self.disagreements: list[tuple[tuple[str, ...], float] | None] = []
        self.masks: list[tuple[bytes, ...]] = []

    def add(self, masks: np.ndarray) -> None:
        """Add the masks of the next image, uint8 (M, H, W)."""
        num_classes, flat = len(self._classes), masks.reshape(len(masks), -1)
        is_same = (flat == flat[0]).all(0)
        shared = np.bincount(flat[0, is_same], minlength=num_classes)
        differing = flat[:, ~is_same]
        self.pixels += np.stack([np.bincount(mask, minlength=num_classes) for mask in flat])
        self.shared += shared
        self.covered += shared + _count_covered(differing, num_classes)
        self.differing.append(differing.shape[1] / flat.shape[1])
        self.disagreements.append(self._find_largest(differing, flat.shape[1]))
        self.masks.append(tuple(encode_index_png(mask, self._palette) for mask in masks))

    def _find_largest(self, differing: np.ndarray, total: int) -> tuple[tuple[str, ...], float] | None:
        if not differing.shape[1]:
            return None
        combinations, counts = np.unique(differing, axis=1, return_counts=True)
        largest = int(counts.argmax())
        names = tuple(self._classes[label] for label in combinations[:, largest])
        return names, int(counts[largest]) / total


def _count_covered(labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Return the number of columns of labels, uint8 (M, n), in which each class occurs, int64 (num_classes,)."""
    ordered = np.sort(labels, axis=0)
    is_first = np.ones(ordered.shape, bool)
    is_first[1:] = ordered[1:] != ordered[:-1]
    return np.bincount(ordered[is_first], minlength=num_classes)


def format_masks(comparison: MaskComparison) -> str:
    """Return tables for people: the classes by their overlap, and the images that differ most."""
    names = tuple(map(printable, comparison.names))
    widths = [max(len(name), 10) for name in names]
    total = max(int(comparison.pixels[0].sum()), 1)
    heads = "  ".join(f"{name:>{width}}" for name, width in zip(names, widths, strict=True))
    lines = [f"{'overlap %':>9}  {heads}  class (% of the pixels)"]
    for label in list_classes_by_overlap(comparison):
        cells = "  ".join(
            f"{100 * pixels / total:>{width}.2f}"
            for pixels, width in zip(comparison.pixels[:, label], widths, strict=True)
        )
        lines.append(f"{comparison.overlap[label]:>9.2f}  {cells}  {printable(comparison.classes[label])}")
    lines += [printable(describe_difference(comparison))]
    for index in comparison.order[:10].tolist():
        lines.append(f"{100 * comparison.differing[index]:>8.2f} %  {printable(comparison.images.name(index))}")
    protocols = zip(comparison.names, comparison.protocols, strict=True)
    return "\n".join([*lines, *(printable(f"{name}: {protocol}") for name, protocol in protocols)])


def list_classes_by_overlap(comparison: MaskComparison) -> list[int]:
    """Return the class indices that occur in masks, the highest overlap first."""
    order = np.argsort(-comparison.overlap, kind="stable")
    return [label for label in order.tolist() if comparison.covered[label]]


def describe_difference(comparison: MaskComparison) -> str:
    """Return a line about how much the masks differ."""
    differing = comparison.differing
    return (
        f"on average {100 * differing.mean():.2f} % of an image differs; "
        f"{np.count_nonzero(differing):,} of {len(differing):,} images differ"
    )


def encode_mask_csv(comparison: MaskComparison) -> str:
    """Return a row for each image: the share of its pixels that differ, and its largest disagreement.

    That is the class of each network in most of the differing pixels, and the share of the image that these pixels are.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["file", "differing", "largest", *map(guard, comparison.names)])
    for index, disagreement in enumerate(comparison.disagreements):
        classes, share = disagreement or (("",) * len(comparison.names), 0.0)
        row = [f"{comparison.differing[index]:.6f}", f"{share:.6f}", *map(guard, classes)]
        writer.writerow([guard(comparison.images.name(index)), *row])
    return text.getvalue()
