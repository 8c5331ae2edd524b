"""Mixup and label smoothing: pure functions on a batch that is already on the device."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def draw_mixup_weight(alpha: float, rng: np.random.Generator) -> float:
    """Draw the share of the first image, Beta(alpha, alpha)."""
    return float(rng.beta(alpha, alpha))


def mix_with_reversed(values: Tensor, weight: float) -> Tensor:
    """Mix each entry with its partner in the reversed batch (mixup, Zhang et al. 2018; the pairing of Gluon's recipe).

    Args:
        values: (B, ...): normalised images, or class probabilities.
        weight: share of the entry itself; the partner has 1 - weight.
    """
    return torch.lerp(values.flip(0), values, weight)


def one_hot(labels: Tensor, num_classes: int) -> Tensor:
    """Turn labels (B,) into float32 class probabilities (B, num_classes)."""
    return F.one_hot(labels, num_classes).float()


def smoothed_cross_entropy(logits: Tensor, targets: Tensor, smoothing: float) -> Tensor:
    """Return the mean over the batch of the cross entropy against smoothed targets (Szegedy et al. 2016, section 7).

    Args:
        logits: (B, K).
        targets: labels (B,), or class probabilities (B, K).
        smoothing: e: a target t becomes t (1 - e) + e / K.
    """
    return F.cross_entropy(logits.float(), targets, label_smoothing=smoothing)
