"""A classifier's mistakes: confusions, precision and recall of each class, and calibration."""

from dataclasses import dataclass

import numpy as np

from resnest_imagenet.evaluation.accuracy import Evaluation


@dataclass(frozen=True)
class ClassFigures:
    """Precision, recall and F1 of each of K classes, in percent.

    A class without images has no figures: they are NaN, and the means skip it. The precision of a class that was never
    predicted is 0 by convention. If no class has images, the means are NaN.

    Attributes:
        precision: (K,) float64, of the images predicted as the class, how many belong to it.
        recall: (K,) float64, of the images of the class, how many were predicted as it: the class's accuracy.
        f1: (K,) float64, the harmonic mean of both.
        images: (K,) int64, number of images of the class.
        predicted: (K,) int64, number of images predicted as the class.
    """

    precision: np.ndarray
    recall: np.ndarray
    f1: np.ndarray
    images: np.ndarray
    predicted: np.ndarray

    @property
    def is_absent(self) -> np.ndarray:
        """Whether a class has no images, (K,) bool."""
        return self.images == 0

    @property
    def is_never_predicted(self) -> np.ndarray:
        """Whether a class has images, but was never predicted, (K,) bool."""
        return (self.images > 0) & (self.predicted == 0)

    @property
    def macro_precision(self) -> float:
        """Mean precision of the classes with images, in percent."""
        return _average(self.precision)

    @property
    def macro_recall(self) -> float:
        """Mean recall of the classes with images, in percent: the balanced accuracy."""
        return _average(self.recall)

    @property
    def macro_f1(self) -> float:
        """Mean F1 of the classes with images, in percent; not the F1 of the mean precision and recall."""
        return _average(self.f1)


def measure_classes(confusions: np.ndarray) -> ClassFigures:
    """Return precision, recall and F1 of each class.

    Args:
        confusions: (K, K) int64, images of each true class (rows) predicted as each class (columns), as of
            `count_confusions` without cells.
    """
    right, images, predicted = confusions.diagonal(), confusions.sum(1), confusions.sum(0)
    share = np.where(images > 0, 100.0, np.nan)  # NaN in all figures of a class without images
    precision = share * right / np.maximum(predicted, 1)
    recall = share * right / np.maximum(images, 1)
    f1 = share * 2 * right / np.maximum(images + predicted, 1)
    return ClassFigures(precision, recall, f1, images, predicted)


def _average(figures: np.ndarray) -> float:
    """Return the mean of the figures (K,) that are not NaN; NaN if all are."""
    known = figures[~np.isnan(figures)]
    return float(known.mean()) if len(known) else float("nan")


def count_confusions(evaluation: Evaluation, num_classes: int, cells: int | None = None) -> np.ndarray:
    """Return how many images of each true class (rows) were predicted as each class (columns), (K, K) int64.

    Args:
        evaluation: of the images.
        num_classes: K.
        cells: number of rows and columns, if it should be below K: neighbouring classes then share them.
    """
    size = cells or num_classes
    rows, columns = (labels * size // num_classes for labels in (evaluation.labels, evaluation.predicted))
    return np.bincount(rows * size + columns, minlength=size**2).reshape(size, size)


def rank_confusions(confusions: np.ndarray, count: int) -> list[tuple[int, int, int]]:
    """Return the most frequent confusions as (true class, predicted class, images), at most `count`."""
    wrong = confusions * ~np.eye(len(confusions), dtype=bool)
    order = np.argsort(-wrong, axis=None, kind="stable")[:count]
    pairs = np.stack(np.unravel_index(order, wrong.shape), axis=1).tolist()
    return [(true, predicted, int(wrong[true, predicted])) for true, predicted in pairs if wrong[true, predicted]]


def calibrate(evaluation: Evaluation, bins: int = 15) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sort images into bins of equal width by confidence (Guo et al. 2017, section 2).

    Returns:
        Mean confidence, accuracy (both between 0 and 1) and number of images of each bin that is not empty.
    """
    position = np.minimum((evaluation.confidence * bins).astype(int), bins - 1)
    counts = np.bincount(position, minlength=bins)
    sums = [np.bincount(position, weights, bins) for weights in (evaluation.confidence, evaluation.is_right)]
    filled = counts > 0
    confidence, accuracy = (total[filled] / counts[filled] for total in sums)
    return confidence, accuracy, counts[filled]


def calibration_error(evaluation: Evaluation, bins: int = 15) -> float:
    """Return the expected calibration error (Guo et al. 2017, equation 3), between 0 and 1."""
    confidence, accuracy, counts = calibrate(evaluation, bins)
    return float((abs(confidence - accuracy) * counts).sum() / counts.sum())
