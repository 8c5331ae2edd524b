"""The errors of a detector by kind, and the AP50 that each kind costs.

Source: Bolya et al., TIDE: A General Toolbox for Identifying Object Detection Errors (ECCV 2020), section 2.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from resnest_imagenet.evaluation.detections import DetectionTable, Kind
from resnest_imagenet.evaluation.ground_truth import GroundTruth
from resnest_imagenet.evaluation.masks import import_masks

MATCHING = 0.5  # lowest IoU at which a detection finds an object
TOUCHING = 0.1  # highest IoU at which a detection and an object have nothing to do with each other
MOST = 100  # largest number of detections of an image and class


class Outcome(IntEnum):
    """The result of a detection; the first one that applies counts."""

    CORRECT = 0  # the first of its class to find its object
    IGNORED = 1  # it finds a crowd, or MOST detections of its class have higher scores
    LOCALISATION = 2  # overlaps an object of its class, but not enough
    CLASS = 3  # finds an object of another class
    DUPLICATE = 4  # its object was found with a higher score
    BACKGROUND = 5  # overlaps no object
    BOTH = 6  # overlaps an object of another class, but not enough


ERRORS = tuple(outcome for outcome in Outcome if outcome > Outcome.IGNORED)
MISSED = "missed"


@dataclass(frozen=True, eq=False)
class DetectionErrors:
    """The outcomes of D detections and of G objects, at an IoU of .5.

    Attributes:
        kind: whether boxes or masks were compared.
        outcomes: (D,) int64, of `Outcome`.
        objects: (D,) int64, the object that a detection finds or overlaps most; -1: none.
        is_found: (G,) bool, whether a detection of the object is correct.
        is_missed: (G,) bool: not a crowd, not found, and without an error of localisation or class.
        ap50: in percent.
        gains: by kind of error, the points that AP50 would gain without it. Detections with a wrong place or class: for
            each object that is not found, the most certain of them is corrected and the others are removed. Detections
            of the other kinds are all removed. Missed objects are removed from the truth, and classes that then have
            none from the mean.
    """

    kind: Kind
    outcomes: np.ndarray
    objects: np.ndarray
    is_found: np.ndarray
    is_missed: np.ndarray
    ap50: float
    gains: dict[str, float]

    def count(self, table: DetectionTable, truth: GroundTruth) -> dict[str, np.ndarray]:
        """Count the detections of each class by outcome, without IGNORED, and the missed objects, by name."""
        num_classes = len(truth.classes)
        names = [Outcome.CORRECT, *ERRORS]
        counts = {
            name.name.lower(): np.bincount(table.labels[self.outcomes == name], minlength=num_classes) for name in names
        }
        return counts | {MISSED: np.bincount(truth.labels[self.is_missed], minlength=num_classes)}


def find_errors(table: DetectionTable, truth: GroundTruth, kind: Kind) -> DetectionErrors:
    """Return the errors of detections.

    Args:
        table: the detections; with masks if these are compared.
        truth: the objects; with masks likewise.
        kind: whether to compare boxes or masks.

    Raises:
        ConfigError: pycocotools is not installed.
    """
    outcomes = np.full(len(table), Outcome.BACKGROUND, np.int64)
    objects = np.full(len(table), -1, np.int64)
    for detections, nearby in _list_images(table, truth):
        overlaps = _measure_overlaps(table, truth, kind, detections, nearby)
        outcomes[detections], places = _judge(
            overlaps, table.labels[detections], truth.labels[nearby], truth.crowds[nearby], table.scores[detections]
        )
        objects[detections] = np.where(places >= 0, nearby[places] if len(nearby) else -1, -1)
    is_found, is_known = (np.zeros(len(truth), bool) for _ in range(2))
    is_found[objects[outcomes == Outcome.CORRECT]] = True
    is_known[objects[np.isin(outcomes, (Outcome.LOCALISATION, Outcome.CLASS))]] = True
    is_missed = ~(is_found | is_known | truth.crowds)
    ap50, gains = _weigh(table, truth, outcomes, objects, is_found, is_missed)
    return DetectionErrors(kind, outcomes, objects, is_found, is_missed, ap50, gains)


def _list_images(table: DetectionTable, truth: GroundTruth) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the rows of the detections and of the objects of each image that has detections."""
    order = np.argsort(truth.images, kind="stable")
    images = np.arange(len(truth.image_ids) + 1)
    detections, objects = np.searchsorted(table.images, images), np.searchsorted(truth.images[order], images)
    for image in np.flatnonzero(np.diff(detections)):
        rows = np.arange(detections[image], detections[image + 1])
        yield rows, order[objects[image] : objects[image + 1]]


def _measure_overlaps(
    table: DetectionTable, truth: GroundTruth, kind: Kind, detections: np.ndarray, objects: np.ndarray
) -> np.ndarray:
    """Return the IoUs of n detections with m objects, float64 (n, m); for crowds the share of the detection in them."""
    if len(objects) == 0:
        return np.zeros((len(detections), 0))
    crowds = truth.crowds[objects].astype(np.uint8)
    if kind == "box":
        return import_masks().iou(table.boxes[detections], truth.boxes[objects], crowds)
    assert table.masks is not None and truth.masks is not None
    size = list(truth.size(int(truth.images[objects[0]])))
    codes = [
        [{"size": size, "counts": masks[row]} for row in rows.tolist()]
        for masks, rows in ((table.masks, detections), (truth.masks, objects))
    ]
    return import_masks().iou(*codes, crowds)


def _judge(
    overlaps: np.ndarray, labels: np.ndarray, true_labels: np.ndarray, crowds: np.ndarray, scores: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the outcome of each of n detections in an image, and the place of its object, or -1.

    Args:
        overlaps: (n, m), see `_measure_overlaps`.
        labels: (n,), of the detections.
        true_labels: (m,), of the objects.
        crowds: (m,) bool, of the objects.
        scores: (n,), of the detections.
    """
    count, num_objects = overlaps.shape
    outcomes, places = np.full(count, Outcome.BACKGROUND, np.int64), np.full(count, -1, np.int64)
    order = np.argsort(-scores, kind="stable")
    surplus = _find_surplus(labels, order)
    outcomes[surplus] = Outcome.IGNORED
    if num_objects == 0:
        return outcomes, places
    is_same = labels[:, None] == true_labels
    same = np.where(is_same & ~crowds, overlaps, 0)
    other = np.where(~is_same & ~crowds, overlaps, 0)
    for outcome, values, chosen in (
        # The last one that applies counts.
        (Outcome.BOTH, other, other.max(1) > TOUCHING),
        (Outcome.DUPLICATE, same, same.max(1) >= MATCHING),
        (Outcome.CLASS, other, other.max(1) >= MATCHING),
        (Outcome.LOCALISATION, same, (same.max(1) >= TOUCHING) & (same.max(1) < MATCHING)),
    ):
        chosen = chosen & ~surplus  # noqa: PLW2901
        outcomes[chosen], places[chosen] = outcome, values.argmax(1)[chosen]
    _match(overlaps, is_same, crowds, [row for row in order.tolist() if not surplus[row]], outcomes, places)
    return outcomes, places


def _find_surplus(labels: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Return the detections beyond the best `MOST` of their class in an image, bool (n,).

    Args:
        labels: (n,).
        order: (n,), the places of the detections, the most certain first.
    """
    surplus = np.zeros(len(labels), bool)
    if len(labels) > MOST:
        for label in np.unique(labels):
            surplus[order[labels[order] == label][MOST:]] = True
    return surplus


def _match(
    overlaps: np.ndarray,
    is_same: np.ndarray,
    crowds: np.ndarray,
    order: list[int],
    outcomes: np.ndarray,
    places: np.ndarray,
) -> None:
    """Set the outcomes of detections that are correct or find a crowd, by COCO's rule, the most certain first."""
    fits = np.where(is_same, overlaps, 0)
    fits[fits < MATCHING] = 0
    has_match = set(np.flatnonzero((fits > 0).any(axis=1)).tolist())
    for row in filter(has_match.__contains__, order):
        for is_crowd in (False, True):
            values = np.where(crowds == is_crowd, fits[row], 0)
            if values.any():
                # Of several with the same overlap the last one, as in COCO's tool.
                place = len(values) - 1 - int(values[::-1].argmax())
                outcomes[row], places[row] = (Outcome.IGNORED if is_crowd else Outcome.CORRECT), place
                if not is_crowd:
                    fits[:, place] = 0
                break


def _weigh(
    table: DetectionTable,
    truth: GroundTruth,
    outcomes: np.ndarray,
    objects: np.ndarray,
    is_found: np.ndarray,
    is_missed: np.ndarray,
) -> tuple[float, dict[str, float]]:
    """Return AP50, and its gain without each kind of error; see `DetectionErrors`."""
    counts = truth.count_objects()
    # Equal scores are ordered by the file's image numbers, and in an image by the order of the detections.
    order = np.lexsort((truth.image_ids[table.images], -table.scores))
    order = order[outcomes[order] != Outcome.IGNORED]
    is_correct = outcomes == Outcome.CORRECT
    ap50 = _average_precision(table.labels[order], is_correct[order], counts)
    # The most certain detection with a wrong place or class of each object that is not found.
    is_close = np.isin(outcomes, (Outcome.LOCALISATION, Outcome.CLASS))
    rows = order[is_close[order] & ~is_found[objects[order]]]
    _, first = np.unique(objects[rows], return_index=True)
    is_best = np.zeros(len(table), bool)
    is_best[rows[first]] = True
    gains = {}
    for error in ERRORS:
        is_wrong: np.ndarray = np.equal(outcomes, error)
        fixed: np.ndarray = np.logical_and(is_wrong, is_best)
        labels = np.where(fixed, truth.labels[objects], table.labels)
        kept = order[~is_wrong[order] | fixed[order]]
        better = _average_precision(labels[kept], (is_correct | fixed)[kept], counts)
        gains[error.name.lower()] = max(better - ap50, 0.0)
    without = counts - np.bincount(truth.labels[is_missed], minlength=len(counts))
    better = _average_precision(table.labels[order], is_correct[order], without)
    gains[MISSED] = max(better - ap50, 0.0)
    return ap50, gains


def _average_precision(labels: np.ndarray, is_correct: np.ndarray, counts: np.ndarray) -> float:
    """Return the average precision in percent, averaged over the classes with objects.

    Args:
        labels: (D,), of detections, the most certain first.
        is_correct: (D,) bool.
        counts: (K,), objects of each class.
    """
    values = []
    for label in np.flatnonzero(counts).tolist():
        hits = np.cumsum(is_correct[labels == label])
        if len(hits) == 0:
            values.append(0.0)
            continue
        precision = np.maximum.accumulate((hits / np.arange(1, len(hits) + 1))[::-1])[::-1]
        places = np.searchsorted(hits / counts[label], np.linspace(0, 1, 101))
        values.append(float(np.append(precision, 0)[places].mean()))
    return 100 * sum(values) / len(values) if values else 0.0
