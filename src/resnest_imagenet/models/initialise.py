"""Initial weights of a network; the recipe chooses them."""

from typing import Literal

from torch import nn


def initialise(model: nn.Module, mode: Literal["fan_in", "fan_out"]) -> None:
    """Draw the weights of a new network from N(0, 2 / fan) (He et al. 2015); BN weights and biases do not change.

    Args:
        model: any of the zoo's networks.
        mode: "fan_in" (equation 10; Gluon's recipe): convolutions and fc, with biases 0; fan is the inputs of a group.
            "fan_out" (torchvision, timm, the released PyTorch code): convolutions only; fan is the outputs of all
            groups.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear) and module.weight.is_meta:
            continue  # there is nothing to draw, and torch would still take its time
        if isinstance(module, nn.Conv2d) or (isinstance(module, nn.Linear) and mode == "fan_in"):
            nn.init.kaiming_normal_(module.weight, mode=mode, nonlinearity="relu")
            if module.bias is not None and mode == "fan_in":
                nn.init.zeros_(module.bias)
