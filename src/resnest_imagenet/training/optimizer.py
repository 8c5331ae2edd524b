"""The optimiser and what decays in it."""

import torch
from torch import nn

from resnest_imagenet.config import RecipeOptions


def group_parameters(model: nn.Module, weight_decay: float, decay_all: bool = False) -> list[dict]:
    """Split parameters: convolution and fc weights decay, biases and BN weights only with `decay_all` (section 4.2).

    Biases and BN weights are exactly the vectors: a rule by name misses some of them.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": weight_decay if decay_all else 0.0},
    ]


def build_optimizer(model: nn.Module, recipe: RecipeOptions) -> torch.optim.Optimizer:
    """Build SGD over the model's parameter groups; the loop sets the learning rate before each step."""
    groups = group_parameters(model, recipe.weight_decay, recipe.decay_all)
    return torch.optim.SGD(groups, lr=0.0, momentum=recipe.momentum, nesterov=recipe.nesterov)
