"""Statistics of batch norms, averaged over many training batches instead of a moving average over the last ones.

As in fvcore/nn/precise_bn.py: the plain mean over the batches of their means and unbiased variances. Here they are
also averaged over the ranks, so that all evaluate the same network.

detectron2 does this after every TEST.EVAL_PERIOD iterations and after the last one, before it evaluates and saves
(engine/hooks.py, PreciseBN; engine/defaults.py, build_hooks). A run here does it before each evaluation: the network
that is evaluated is the one that is saved. Training continues from these statistics; its own steps do not read them.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


@torch.no_grad()
def estimate_norms(
    network: nn.Module,
    batches: Iterable[Any],
    run: Callable[[Any], object],
    average: Callable[[Tensor], Tensor] = lambda values: values,
) -> int:
    """Replace the statistics of a network's trained batch norms; return the number of batches.

    Norms that stay in evaluation mode are frozen and keep their statistics. The norms' counts of batches stay too: they
    belong to the training, and a repeated evaluation must leave the same network. After an error nothing has changed.

    Args:
        network: changed in place, and left in training mode.
        batches: training batches, one or more, the same number on every rank.
        run: makes a forward pass in training mode on a batch.
        average: returns the mean over the ranks of a float64 (n,).
    """
    network.train()
    norms = [module for module in network.modules() if isinstance(module, _BatchNorm) and module.training]
    if not norms:
        return 0
    statistics: list[Any] = [values for norm in norms for values in (norm.running_mean, norm.running_var)]
    buffers = [buffer for norm in norms for buffer in norm.buffers()]
    before, momenta = [buffer.clone() for buffer in buffers], [norm.momentum for norm in norms]
    sums, number = torch.zeros_like(_pack(statistics)), 0
    for norm in norms:
        norm.momentum = 1.0  # the running statistics are then the batch's
    try:
        for batch in batches:
            run(batch)
            sums += _pack(statistics)
            number += 1
        assert number, "statistics of no batches"
        means = average(sums / number)
    finally:
        for buffer, values in zip(buffers, before, strict=True):
            buffer.copy_(values)
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
    for buffer, values in zip(statistics, means.split([len(buffer) for buffer in statistics]), strict=True):
        buffer.copy_(values)
    return number


def _pack(statistics: list[Tensor]) -> Tensor:
    return torch.cat([values.double() for values in statistics])
