"""Stochastic depth (Huang et al. 2016, arXiv 1603.09382): a training image skips some residual blocks."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from resnest_imagenet.errors import ConfigError


def drop_path(x: Tensor, probability: float) -> Tensor:
    """Zero the residual branch of some images, and scale the others up.

    Args:
        x: (B, C, H, W), the branch before the shortcut is added.
        probability: that an image loses the branch, 0 to below 1; independent of other images.

    Returns:
        x * keep / (1 - probability), in x's type and memory format.
    """
    keep = torch.rand(len(x), 1, 1, 1, device=x.device) >= probability
    # The scale is a factor of its own: a mask in a lower precision would round it.
    return (x * keep).mul_(1 / (1 - probability))


def add_drop_path(model: nn.Module, probability: float) -> None:
    """Let each residual block of a network drop its branch in training.

    The probability rises linearly with depth: 0 in the first block, `probability` in the last (section 3 of the paper,
    from 0 on as in timm). It is a forward hook on the branch's last module, so the state dict does not change. Blocks
    in evaluation mode, frozen ones too, drop nothing. Draws are torch's, so a batch's seed determines them.

    Raises:
        ConfigError: for a network without such blocks.
    """
    ends = list(_find_ends(model))
    for number, end in enumerate(ends):
        rate = probability * number / max(len(ends) - 1, 1)
        if rate > 0:
            end.register_forward_hook(partial(_drop, rate))


def _drop(rate: float, end: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return drop_path(output, rate) if end.training else output


def _find_ends(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the last module of each block's branch, in order of depth."""
    for layer in ("layer1", "layer2", "layer3", "layer4"):
        blocks = getattr(model, layer, None)
        if blocks is None:
            raise ConfigError(f"train.drop_path: a {type(model).__name__} has no {layer}: set train.drop_path=0")
        for number, block in enumerate(blocks.children()):
            # SENets gate the branch after its last norm; selective kernels have that norm inside the convolution.
            names = ("se", "bn3", "conv3")
            end = next((unit for name in names if (unit := getattr(block, name, None)) is not None), None)
            if end is None:
                where = f"{layer}.{number} of a {type(model).__name__}"
                raise ConfigError(f"train.drop_path: {where} has no bn3: set train.drop_path=0")
            yield end
