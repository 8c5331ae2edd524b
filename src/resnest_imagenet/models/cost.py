"""What a network costs: parameters and multiply-adds, counted, not timed."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from resnest_imagenet.models.zoo import build_model


def count_cost(name: str, crop: int) -> tuple[int, int]:
    """Return the parameters of a network, and its multiply-adds for one image (the paper's "FLOPs").

    Convolutions and fc, and one multiply-add for each activation that a BN scales and shifts. Nothing is allocated.

    Args:
        name: one of `list_models()`, with 1000 classes.
        crop: side of the image in pixels.
    """
    with torch.device("meta"):
        model = build_model(name).eval()
        images = torch.empty(1, 3, crop, crop)
    normalised = 0

    def count_activations(module: nn.Module, inputs: tuple[Tensor], output: Any) -> None:
        nonlocal normalised
        normalised += inputs[0].numel()

    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_hook(count_activations)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(images)
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops() // 2 + normalised
