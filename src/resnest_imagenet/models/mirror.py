"""Test-time augmentation: the mean of a classifier's probabilities for an image and for its mirror image."""

import math

import torch
from torch import Tensor, nn

FLIP = "flip"  # tta=flip


class MirrorAverage(nn.Module):
    """A classifier whose softmax is the mean of another's for an image and its mirror image.

    Each image is averaged alone, so neither the batch nor the number of ranks matters.

    Args:
        network: maps images (B, 3, H, W) to logits (B, K).
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        """Map normalised images (B, 3, H, W) to logarithms of the mean probabilities, float32 (B, K)."""
        # In logarithms: a probability that is 0 in float32 has a finite one. Logits that are not finite become NaN.
        straight, mirrored = (self.network(view).float().log_softmax(1) for view in (images, images.flip(3)))
        return torch.logaddexp(straight, mirrored) - math.log(2)


def average_views(network: nn.Module, tta: str | None) -> nn.Module:
    """Return a classifier with the test-time augmentation of this name; None: the classifier itself."""
    return network if tta is None else MirrorAverage(network)


def name_protocol(protocol: str, tta: str | None) -> str:
    """Return the name under which an accuracy is listed: the protocol in words, and the test-time augmentation."""
    return protocol if tta is None else f"{protocol}, mean with the mirror image"
