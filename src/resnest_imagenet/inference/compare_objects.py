"""Compares the objects that several detectors find in the same images."""

import csv
import io
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from os import PathLike

import numpy as np
from tqdm import tqdm

from resnest_imagenet.data.examine import split_unreadable
from resnest_imagenet.data.folder import ImageFolder
from resnest_imagenet.errors import ConfigError, DataError, printable
from resnest_imagenet.evaluation.cells import guard
from resnest_imagenet.inference.compare import distinguish, require_same_classes
from resnest_imagenet.inference.detect import SCORE, DetectedImage, DetectedImages, open_above
from resnest_imagenet.inference.detector import Detector
from resnest_imagenet.inference.images import Images, list_images
from resnest_imagenet.inference.options import check_arguments

MATCHING = 0.5  # lowest IoU of the boxes at which two detections of a class match


@dataclass(frozen=True, eq=False)
class ObjectComparison:
    """The detections of M networks in N images.

    Two detections match if they have the same class and their boxes have an IoU of .5 or more. Each matches at most one
    detection of another network; pairs with the highest IoU match first.

    Attributes:
        names: of the networks, all different.
        images: the N images.
        classes: K names, in the order of the class indices, the same for all networks.
        score: all detections have a higher one.
        objects: the detections of each network in each image, without its pixels.
        shared: for each image and network, bool (n,): whether a detection matches one of every other network.
        differing: (N,) float64, the share of the detections that do not match, over all pairs of networks; 0 if nothing
            is found.
        num_detections: (M, K) int64, by network and class, in all images.
        agreement: (K,) float64, the share of a class's detections that match, in percent, over all pairs of networks;
            NaN if the class is not found.
        skipped: a line for each image that cannot be used; the N do not include it.
        protocols: how images are shown to each network, in words.
    """

    names: tuple[str, ...]
    images: ImageFolder
    classes: tuple[str, ...]
    score: float
    objects: tuple[tuple[DetectedImage, ...], ...]
    shared: tuple[tuple[np.ndarray, ...], ...]
    differing: np.ndarray
    num_detections: np.ndarray
    agreement: np.ndarray
    protocols: tuple[str, ...]
    skipped: tuple[str, ...] = ()

    @property
    def num_alone(self) -> np.ndarray:
        """Detections of each network in each image that not all others have, int64 (N, M)."""
        counts = [[np.count_nonzero(~is_shared) for is_shared in row] for row in self.shared]
        return np.array(counts, np.int64).reshape(len(self.shared), len(self.names))

    @property
    def order(self) -> np.ndarray:
        """The images with detections that do not match, the largest shares first, then the most detections."""
        ranked = np.lexsort((-self.num_alone.sum(1), -self.differing))
        return ranked[: np.count_nonzero(self.differing)]


def compare_objects(
    networks: Sequence[Detector | str | PathLike[str]], images: Images, *, score: float = SCORE, precision: str = "fp32"
) -> ObjectComparison:
    """Compare detectors on the same images; images that cannot be used are skipped.

    Args:
        networks: two or more, each of `open_detector`, or a source that it takes; their classes are the same.
        images: files, folders or patterns such as "photos/**/*.jpg", one or several.
        score: detections have a higher one, 0 to below 1; see `detect`.
        precision: fp32, bf16 or fp16.

    Raises:
        DataError: no image can be used.
        ConfigError: fewer than two networks, or their classes differ.
        UserError: for other errors that a user can cause, as one line.
    """
    arguments = check_arguments(score=score, precision=precision)
    if isinstance(networks, str | PathLike | Detector) or len(networks) < 2:
        raise ConfigError("networks: give two networks or more")
    listed = list_images(images)
    detectors = [open_above(network, arguments.score) for network in networks]
    require_same_classes(detectors)
    usable, skipped = split_unreadable(listed)
    if not len(usable):
        raise DataError(skipped[0])
    count = _Count(len(detectors), len(detectors[0].classes))
    detected = [DetectedImages(detector, usable, (), arguments.score, arguments.precision) for detector in detectors]
    rows = tqdm(
        zip(*detected, strict=True), total=len(usable), unit="image", disable=None, dynamic_ncols=True, leave=False
    )
    for row in rows:
        count.add(row)
    return ObjectComparison(
        distinguish(detectors),
        usable,
        detectors[0].classes,
        arguments.score,
        tuple(count.objects),
        tuple(count.shared),
        np.array(count.differing),
        count.num_detections,
        count.agreement,
        tuple(detector.protocol.text for detector in detectors),
        tuple(skipped),
    )


class _Count:
    """Counts image by image; the attributes are those of `ObjectComparison`."""

    def __init__(self, num_networks: int, num_classes: int) -> None:
        self.objects: list[tuple[DetectedImage, ...]] = []
        self.shared: list[tuple[np.ndarray, ...]] = []
        self.differing: list[float] = []
        self.num_detections = np.zeros((num_networks, num_classes), np.int64)
        self._matched = np.zeros(num_classes, np.int64)  # pairs of detections

    def add(self, row: Sequence[DetectedImage]) -> None:
        """Add the next image, with the detections of each network."""
        shared = [np.ones(len(image), bool) for image in row]
        num_matched = 0
        for first, second in itertools.combinations(range(len(row)), 2):
            pairs = match_detections(row[first], row[second])
            for network, places in zip((first, second), pairs.T, strict=True):
                is_matched = np.zeros(len(row[network]), bool)
                is_matched[places] = True
                shared[network] &= is_matched
            num_matched += len(pairs)
            self._matched += np.bincount(row[first].labels[pairs[:, 0]], minlength=len(self._matched))
        self.num_detections += np.stack([np.bincount(image.labels, minlength=len(self._matched)) for image in row])
        # Each detection can match one of each other network.
        total = (len(row) - 1) * sum(map(len, row))
        self.differing.append(1 - 2 * num_matched / total if total else 0.0)
        self.shared.append(tuple(shared))
        # Drop the pixels: those of a whole folder are gigabytes.
        nothing = np.zeros((0, 0, 3), np.uint8)
        self.objects.append(tuple(replace(image, pixels=nothing) for image in row))

    @property
    def agreement(self) -> np.ndarray:
        total = (len(self.num_detections) - 1) * self.num_detections.sum(0)
        return np.where(total > 0, 200 * self._matched / np.maximum(total, 1), np.nan)


def match_detections(first: DetectedImage, second: DetectedImage) -> np.ndarray:
    """Return the matching pairs of detections of two networks, int64 (p, 2), the highest IoU first."""
    overlaps = measure_ious(first.boxes, second.boxes)
    overlaps[first.labels[:, None] != second.labels] = 0
    rows, columns = np.nonzero(overlaps >= MATCHING)
    order = np.argsort(-overlaps[rows, columns], kind="stable")
    is_free = [np.ones(len(image), bool) for image in (first, second)]
    pairs = []
    for row, column in zip(rows[order].tolist(), columns[order].tolist(), strict=True):
        if is_free[0][row] and is_free[1][column]:
            is_free[0][row] = is_free[1][column] = False
            pairs.append((row, column))
    return np.array(pairs, np.int64).reshape(-1, 2)


def measure_ious(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return the IoU of each of n boxes (n, 4) with each of m boxes (m, 4), x1 y1 x2 y2: float64 (n, m)."""
    low = np.maximum(first[:, None, :2], second[:, :2])
    high = np.minimum(first[:, None, 2:], second[:, 2:])
    common = (high - low).clip(0).prod(2)
    areas = [(boxes[:, 2:] - boxes[:, :2]).prod(1) for boxes in (first, second)]
    return common / np.maximum(areas[0][:, None] + areas[1] - common, np.finfo(np.float64).tiny)


def format_objects_compared(comparison: ObjectComparison) -> str:
    """Return tables for people: the classes by agreement, and the images whose detections differ most."""
    names = tuple(map(printable, comparison.names))
    widths = [max(len(name), 10) for name in names]
    heads = "  ".join(f"{name:>{width}}" for name, width in zip(names, widths, strict=True))
    lines = [f"{'agreement %':>11}  {heads}  class (detections)"]
    for label in list_classes_by_agreement(comparison):
        columns = zip(comparison.num_detections[:, label].tolist(), widths, strict=True)
        cells = "  ".join(f"{count:>{width},}" for count, width in columns)
        lines.append(f"{comparison.agreement[label]:>11.2f}  {cells}  {printable(comparison.classes[label])}")
    lines.append(printable(describe_objects(comparison)))
    alone = comparison.num_alone
    for index in comparison.order[:10].tolist():
        counts = ", ".join(f"{name} {count}" for name, count in zip(names, alone[index].tolist(), strict=True))
        share = f"{100 * comparison.differing[index]:>9.2f} %"
        lines.append(f"{share}  {printable(comparison.images.name(index))} (without a match: {counts})")
    protocols = zip(comparison.names, comparison.protocols, strict=True)
    return "\n".join([*lines, *(printable(f"{name}: {protocol}") for name, protocol in protocols)])


def list_classes_by_agreement(comparison: ObjectComparison) -> list[int]:
    """Return the indices of the classes that were found, the highest agreement first."""
    order = np.argsort(-comparison.agreement, kind="stable")
    return [label for label in order.tolist() if comparison.num_detections[:, label].any()]


def describe_objects(comparison: ObjectComparison) -> str:
    """Return one line: how much the detections differ."""
    differing = comparison.differing
    return (
        f"{100 * differing.mean():.2f} % of the detections above {comparison.score:g} do not match (same class, IoU "
        f"{MATCHING:g}) in the mean over {len(differing):,} images; {np.count_nonzero(differing):,} of them differ"
    )


def encode_object_csv(comparison: ObjectComparison) -> str:
    """Return a CSV row for each image: the share of detections that differ, and each network's numbers of them."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    heads = [f"{name} {what}" for name in comparison.names for what in ("detections", "without a match")]
    writer.writerow(["file", "differing", *map(guard, heads)])
    alone = comparison.num_alone
    for index, row in enumerate(comparison.objects):
        counts = zip(map(len, row), alone[index].tolist(), strict=True)
        cells = [count for pair in counts for count in pair]
        writer.writerow([guard(comparison.images.name(index)), f"{comparison.differing[index]:.6f}", *cells])
    return text.getvalue()
