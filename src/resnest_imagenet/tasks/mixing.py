"""Mixup, CutMix, random erasing and label smoothing for a batch that is on the device."""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Box = tuple[int, int, int, int]  # top, left, bottom, right, in pixels


@dataclass(frozen=True)
class Mixing:
    """Which images of a batch are mixed, and how much.

    Attributes:
        weight: share of the image itself, its partner has the rest; one number for the batch, or float32 (B,).
        partner: int64 (B,), the index of each image's partner; None: its counterpart in the reversed batch.
        box: the part that comes from the partner in CutMix (Yun et al. 2019); None: mixup of all pixels (Zhang et al.
            2018).
    """

    weight: float | Tensor
    partner: Tensor | None
    box: Box | None = None

    def mix_images(self, images: Tensor) -> Tensor:
        """Mix normalised images, (B, 3, H, W); CutMix works in place."""
        if self.box is None:
            return self.mix_targets(images)
        top, left, bottom, right = self.box
        rectangle = images[:, :, top:bottom, left:right]
        rectangle.copy_(self._partners_of(rectangle))
        return images

    def mix_targets(self, targets: Tensor) -> Tensor:
        """Mix class probabilities, (B, K)."""
        weight = self.weight
        if isinstance(weight, Tensor):
            weight = weight.view(-1, *[1] * (targets.ndim - 1))
        return self._partners_of(targets).lerp_(targets, weight)  # the partners are the only copy

    def _partners_of(self, values: Tensor) -> Tensor:
        return values.flip(0) if self.partner is None else values[self.partner]


def draw_mixup(
    alpha: float, per_sample: bool, partner: str, batch: int, rng: np.random.Generator, device: torch.device
) -> Mixing:
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
    weight = _send(drawn.astype(np.float32), device) if per_sample else float(drawn)
    return Mixing(weight, _draw_partner(partner, batch, rng, device))


def draw_cutmix(
    alpha: float, partner: str, batch: int, size: int, rng: np.random.Generator, device: torch.device
) -> Mixing:
    """Draw a rectangle that covers a share of 1 - w of the image, w from Beta(alpha, alpha), and partners.

    Its centre is uniform. It is clipped to the image, and the weight is the share of the image outside it.

    Args:
        alpha: greater than 0.
        partner: "reversed" or "permuted".
        batch: number of images B.
        size: their side in pixels.
        rng: of this batch.
        device: of the images.
    """
    half = math.sqrt(1 - rng.beta(alpha, alpha)) / 2
    centre = rng.random(2)
    top, left = (max(0, round(size * (place - half))) for place in centre.tolist())
    bottom, right = (min(size, round(size * (place + half))) for place in centre.tolist())
    weight = 1 - (bottom - top) * (right - left) / size**2
    return Mixing(weight, _draw_partner(partner, batch, rng, device), (top, left, bottom, right))


def _draw_partner(kind: str, batch: int, rng: np.random.Generator, device: torch.device) -> Tensor | None:
    return _send(rng.permutation(batch), device) if kind == "permuted" else None


def _send(values: np.ndarray, device: torch.device) -> Tensor:
    """Copy to a device. From memory that is not pinned, the host would wait until the GPU has finished its work."""
    tensor = torch.from_numpy(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def erase_rectangles(images: Tensor, probability: float, rng: np.random.Generator) -> None:
    """Set a random rectangle of some images to zero, the mean colour, in place (random erasing, Zhong et al. 2020).

    Its share of the image is uniform in .02 to .33, and height / width is uniform in its logarithm in .3 to 3.3. The
    first of 10 attempts that fits is used.

    Args:
        images: (B, 3, H, W), normalised.
        probability: that an image has a rectangle.
        rng: of this batch.
    """
    batch, _, height, width = images.shape
    is_chosen = rng.random(batch) < probability
    area = rng.uniform(0.02, 0.33, (batch, 10)) * height * width
    aspect = np.exp(rng.uniform(math.log(0.3), math.log(3.3), (batch, 10)))
    heights, widths = np.round(np.sqrt(area * aspect)), np.round(np.sqrt(area / aspect))
    places = rng.random((2, batch))
    fits = (heights < height) & (widths < width)
    first = fits.argmax(1)
    h, w = heights[range(batch), first], widths[range(batch), first]
    top, left = np.floor(places[0] * (height - h + 1)), np.floor(places[1] * (width - w + 1))
    bounds = np.stack([top, top + h, left, left + w]) * (is_chosen & fits.any(1))
    top, bottom, left, right = _send(bounds, images.device).view(4, batch, 1)
    rows = torch.arange(height, device=images.device)
    columns = torch.arange(width, device=images.device)
    in_rows, in_columns = (rows >= top) & (rows < bottom), (columns >= left) & (columns < right)
    images.masked_fill_((in_rows[:, :, None] & in_columns[:, None, :])[:, None], 0.0)


def one_hot(labels: Tensor, num_classes: int) -> Tensor:
    """Turn labels (B,) into float32 class probabilities (B, num_classes)."""
    return torch.zeros(len(labels), num_classes, device=labels.device).scatter_(1, labels[:, None], 1.0)


def smoothed_cross_entropy(
    logits: Tensor, targets: Tensor, smoothing: float, class_weights: Tensor | None = None
) -> Tensor:
    """Return the mean over the batch of the cross entropy against smoothed targets (Szegedy et al. 2016, section 7).

    Args:
        logits: (B, K).
        targets: labels (B,), or class probabilities (B, K).
        smoothing: e: a target t becomes t (1 - e) + e / K.
        class_weights: float32 (K,): a target's share of a class counts so often, before it is smoothed. The sum is over
            B as without weights, so that batches and ranks add up.
    """
    if class_weights is None:
        return F.cross_entropy(logits.float(), targets, label_smoothing=smoothing)
    shares = targets if targets.ndim > 1 else one_hot(targets, logits.shape[1])
    weighted = shares * class_weights
    smoothed = weighted * (1 - smoothing) + weighted.mean(1, keepdim=True) * smoothing
    return F.cross_entropy(logits.float(), smoothed)


def balance_classes(labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Return a weight for each class, the inverse of its number of images: all classes count alike, float32 (K,).

    The mean over the images is 1. A class without images has weight 0.

    Args:
        labels: int64 (N,), of the training set.
        num_classes: K.
    """
    counts = np.bincount(labels, minlength=num_classes)
    weights = len(labels) / (max((counts > 0).sum(), 1) * np.maximum(counts, 1))
    return np.where(counts > 0, weights, 0).astype(np.float32)
