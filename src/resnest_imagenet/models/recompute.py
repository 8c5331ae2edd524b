"""Blocks whose activations are recomputed in the backward pass instead of being kept (arXiv 1604.06174)."""

from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint


def run_recomputed(block: nn.Module, x: Tensor) -> Tensor:
    """Return block(x) and keep only x. Without training, or without a trained parameter, just return block(x).

    The gradients and the batch norms' statistics are bit for bit those of block(x) on a device that is deterministic.
    """
    is_trained = any(parameter.requires_grad for parameter in block.parameters())
    if not (block.training and is_trained and torch.is_grad_enabled()):
        return block(x)

    return checkpoint(block, x, use_reentrant=False, context_fn=lambda: (nullcontext(), _KeptStatistics(block)))


class _KeptStatistics:
    """While a block is recomputed, its batch norms update copies of their statistics: they were updated before."""

    def __init__(self, block: nn.Module) -> None:
        norms = [module for module in block.modules() if isinstance(module, _BatchNorm) and module.training]
        self._own = [(norm, name, buffer) for norm in norms for name, buffer in norm.named_buffers()]

    def __enter__(self) -> None:
        for norm, name, buffer in self._own:
            setattr(norm, name, buffer.clone())

    def __exit__(self, *error: object) -> None:
        for norm, name, buffer in self._own:
            setattr(norm, name, buffer)
