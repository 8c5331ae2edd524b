"""Statistics of batch norms, averaged over many batches of training in place of the last ones' moving average.

As detectron2 has them before an evaluation (detectron2/engine/hooks.py, PreciseBN; fvcore/nn/precise_bn.py): the plain
mean over the batches of their means and unbiased variances. Here they are averaged over the ranks too, so that all
evaluate the same network.
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
    """Replace the statistics of a network's batch norms that are trained; return the number of batches.

    Args:
        network: changed in place, and left in training mode.
        batches: of training, one or more.
        run: a forward pass in training mode on one of them.
        average: the mean over the ranks of what each has, float64 (n,).
    """
    network.train()
    norms = [module for module in network.modules() if isinstance(module, _BatchNorm) and module.training]
    if not norms:
        return 0
    momenta = [norm.momentum for norm in norms]
    sums, number = torch.zeros(_pack(norms).shape, dtype=torch.float64, device=_pack(norms).device), 0
    for norm in norms:
        norm.momentum = 1.0  # the statistics are then those of the batch
    try:
        for batch in batches:
            run(batch)
            sums += _pack(norms)
            number += 1
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
    _unpack(average(sums / max(number, 1)), norms)
    return number


def _list_statistics(norms: list[Any]) -> list[Tensor]:
    return [values for norm in norms for values in (norm.running_mean, norm.running_var)]


def _pack(norms: list[Any]) -> Tensor:
    return torch.cat([values.double() for values in _list_statistics(norms)])


def _unpack(values: Tensor, norms: list[Any]) -> None:
    start = 0
    for statistics in _list_statistics(norms):
        statistics.copy_(values[start : start + len(statistics)])
        start += len(statistics)
