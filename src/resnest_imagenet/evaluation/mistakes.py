"""A classifier's mistakes: confusions and calibration."""

import numpy as np

from resnest_imagenet.evaluation.accuracy import Evaluation


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
