"""DropBlock (Ghiasi et al. 2018) as the Gluon recipe used it, for every network of the zoo."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resnest_imagenet.errors import ConfigError

BLOCK = 3  # side of a dropped block, in activations


def drop_blocks(x: Tensor, probability: Tensor) -> Tensor:
    """Zero blocks of activations, the same ones in every image, and scale the rest up.

    Args:
        x: (B, C, H, W); maps smaller than a block are returned as they are.
        probability: scalar p; block centres are Bernoulli(p HW / 9 / ((H - 2)(W - 2))), independent per channel.

    Returns:
        x * keep * CHW / sum(keep), in x's type and memory format.
    """
    _, channels, height, width = x.shape
    if min(height, width) < BLOCK:
        return x
    gamma = probability * (height * width / BLOCK**2 / ((height - BLOCK + 1) * (width - BLOCK + 1)))
    centres = (torch.rand(1, channels, height, width, device=x.device) < gamma).float()
    keep = 1 - F.max_pool2d(centres, BLOCK, stride=1, padding=BLOCK // 2)
    # The scale is a factor of its own, in float32: it is near 1, and a lower precision would round it to 1.
    return (x * keep.to(x.dtype)).mul_(keep.numel() / keep.sum().clamp(min=1))


class DropBlock:
    """Drops blocks in a network's layer3 and layer4 while it trains; units in evaluation mode (frozen BNs) drop none.

    A block has three places: after the first convolution's BN, after split attention (or the second convolution's BN,
    or the selective kernel), and after the last BN, before the shortcut is added. DropBlock is a forward hook, so the
    networks and their state dicts do not change. It may come before or after a ReLU: a ReLU commutes with factors that
    are not negative.

    Raises:
        ConfigError: for a network without such blocks.
    """

    def __init__(self, model: nn.Module) -> None:
        # A tensor: with a Python number, torch.compile would compile the network again for each new value.
        self._probability = torch.zeros((), device=next(model.parameters()).device)
        for unit in _find_units(model):
            unit.register_forward_hook(self._after)

    def set_probability(self, probability: float) -> None:
        """Set the probability for the coming steps."""
        self._probability.fill_(probability)

    def _after(self, unit: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return drop_blocks(output, self._probability) if unit.training else output


def _find_units(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules whose outputs DropBlock changes."""
    for layer in ("layer3", "layer4"):
        if not hasattr(model, layer):
            raise ConfigError(f"train.dropblock: a {type(model).__name__} has no {layer}: set train.dropblock=0")
        for number, block in enumerate(model.get_submodule(layer).children()):
            for place in (1, 2, 3):
                # Split attention and timm's selective kernels have their BN inside: the block has no bn2.
                unit = getattr(block, f"bn{place}", None) or getattr(block, f"conv{place}", None)
                if unit is None:
                    where = f"{layer}.{number} of a {type(model).__name__}"
                    raise ConfigError(f"train.dropblock: {where} has no conv{place}: set train.dropblock=0")
                yield unit
