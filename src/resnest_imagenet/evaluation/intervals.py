"""How far a share of counted images may be from the truth."""

import math

import numpy as np

from resnest_imagenet.evaluation.accuracy import Evaluation

Z95 = 1.959964  # of a normal distribution: 95 % lie within so many standard deviations


def wilson_interval(right: float, count: int) -> tuple[float, float]:
    """Return the 95 % interval of a share, 0 to 1 (Wilson 1927): exact enough for few images, and never outside 0 to 1.

    Args:
        right: the share that was counted, 0 to 1.
        count: number of images, at least 1.
    """
    spread = Z95**2 / count
    centre = (right + spread / 2) / (1 + spread)
    half = math.sqrt(right * (1 - right) * spread + spread**2 / 4) / (1 + spread)
    return max(0.0, centre - half), min(1.0, centre + half)


def judge_confidence(evaluation: Evaluation) -> tuple[float, float]:
    """Return by how much a network is too sure (below 0: not sure enough), and the 95 % bound of that by chance.

    It is the mean of confidence minus rightness over the images: 0 if the network is as sure as it is right.
    """
    gap = evaluation.confidence - evaluation.is_right
    return float(gap.mean()), float(Z95 * np.sqrt(gap.var() / len(gap)))


def describe_confidence(evaluation: Evaluation) -> str:
    """Return a verdict on the calibration in words."""
    gap, chance = judge_confidence(evaluation)
    if abs(gap) <= max(chance, 0.005):
        return "as sure as right"
    return f"{'too sure' if gap > 0 else 'not sure enough'} by {abs(gap):.2f}"
