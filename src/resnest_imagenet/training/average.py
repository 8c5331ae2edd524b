"""The moving average of a network."""

from copy import deepcopy

import torch
from torch import Tensor, nn


class MovingAverage:
    """Exponential moving average of weights and BN statistics.

    torch's AveragedModel reads from the device before each update whether it is the first one, so the host waits.

    Attributes:
        module: the averaged network.
        updates: number of updates, an int64 scalar on the device.
    """

    def __init__(self, model: nn.Module, decay: float, warms_up: bool = False) -> None:
        """Begin with the network's current weights.

        Args:
            model: its weights are averaged; its tensors must stay the same objects.
            decay: share of the average that an update keeps, 0 to 1; the first update keeps nothing.
            warms_up: keep at most (1 + n) / (10 + n) after n updates, as TensorFlow's ExponentialMovingAverage with
                num_updates: a short run's average would else be that of its beginning.
        """
        self.module = deepcopy(model)
        self.updates = torch.zeros((), dtype=torch.int64, device=next(model.parameters()).device)
        self._new_share = 1 - decay
        self._warms_up = warms_up
        pairs = list(zip(_tensors_of(self.module), _tensors_of(model), strict=True))
        self._averaged = [pair for pair in pairs if pair[0].is_floating_point()]
        self._counted = [pair for pair in pairs if not pair[0].is_floating_point()]

    @torch.no_grad()
    def update(self, applied: Tensor) -> None:
        """Blend in the current weights, which are finite, unless `applied`, a bool scalar on the device, is false."""
        share: float | Tensor = self._new_share
        if self._warms_up:
            share = (9 / (10 + self.updates)).clamp(min=share)
        weight = torch.where(self.updates == 0, 1.0, share) * applied
        averages, values = map(list, zip(*self._averaged, strict=True))
        # One tensor per weight: a Python number would make the host wait.
        torch._foreach_lerp_(averages, values, [weight] * len(averages))
        for count, current in self._counted:  # batches that a BN has seen
            count.copy_(current)
        self.updates += applied


def _tensors_of(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]
