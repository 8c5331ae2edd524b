"""The optimiser, its steps, and what decays in it."""

import torch
from torch import Tensor, nn

from resnest_imagenet.config import Recipe


def group_parameters(model: nn.Module, weight_decay: float, decay_all: bool = False) -> list[dict]:
    """Split parameters: convolution and fc weights decay, biases and BN weights only with `decay_all` (section 4.2).

    Biases and BN weights are exactly the vectors: a rule by name misses some of them.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": weight_decay if decay_all else 0.0},
    ]


def build_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """Build SGD over the model's parameter groups; `take_step` sets the learning rate."""
    groups = group_parameters(model, recipe.weight_decay, recipe.decay_all)
    optimizer = torch.optim.SGD(groups, lr=0.0, momentum=recipe.momentum, nesterov=recipe.nesterov, fused=True)
    complete_state(optimizer)
    return optimizer


def complete_state(optimizer: torch.optim.Optimizer) -> None:
    """Make the optimiser ready to have any step left out on the device, which only the fused kernel can.

    The momentum is there before the first step, which would leave it undefined where it is left out, and in the memory
    layout of its parameter, which the kernel takes for granted on a CPU.
    """
    for group in optimizer.param_groups:
        group["fused"] = True  # not so in checkpoints of earlier versions
        for parameter in group["params"] if group["momentum"] else []:
            saved = optimizer.state[parameter].get("momentum_buffer")
            momentum = torch.zeros_like(parameter)
            optimizer.state[parameter]["momentum_buffer"] = momentum if saved is None else momentum.copy_(saved)


def take_step(optimizer: torch.optim.Optimizer, lr: float, left_out: Tensor) -> None:
    """Take one step, and forget the gradients.

    Args:
        optimizer: of `build_optimizer`.
        lr: learning rate.
        left_out: float32 scalar on the device: 1 leaves weights and momentum as they are, whatever the gradients.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr
    # What a GradScaler sets for such an optimiser; it is not asked to, because it knows of gradients only.
    optimizer.grad_scale, optimizer.found_inf = None, left_out  # type: ignore[attr-defined]
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
