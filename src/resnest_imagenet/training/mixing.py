"""Mixup and label smoothing: pure functions on a batch that is already on the device."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Mixup:
    """Who is mixed with whom in one batch, and how much (mixup, Zhang et al. 2018).

    Attributes:
        weight: share of the image itself, its partner has the rest: one for the batch, or float32 (B,).
        partner: int64 (B,), the index of each image's partner; None: its counterpart in the reversed batch.
    """

    weight: float | Tensor
    partner: Tensor | None

    def __call__(self, values: Tensor) -> Tensor:
        """Mix normalised images or class probabilities, (B, ...)."""
        partners = values.flip(0) if self.partner is None else values[self.partner]
        weight = self.weight
        if isinstance(weight, Tensor):
            weight = weight.view(-1, *[1] * (values.ndim - 1))
        return torch.lerp(partners, values, weight)


def draw_mixup(
    alpha: float, per_sample: bool, partner: str, batch: int, rng: np.random.Generator, device: torch.device
) -> Mixup:
    """Draw weights from Beta(alpha, alpha), and partners.

    Args:
        alpha: greater than 0.
        per_sample: a weight for each image (the paper, section 4.2), or one for the batch (Gluon's recipe).
        partner: "reversed" (Gluon's recipe) or "permuted" (the released PyTorch code).
        batch: number of images B.
        rng: of this batch.
        device: of the values that will be mixed.
    """
    drawn = rng.beta(alpha, alpha, batch if per_sample else None)
    weight = torch.from_numpy(drawn).float().to(device) if per_sample else float(drawn)
    order = torch.from_numpy(rng.permutation(batch)).to(device) if partner == "permuted" else None
    return Mixup(weight, order)


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
