"""The moving average of a network."""

from copy import deepcopy

import torch
from torch import Tensor, nn


class MovingAverage:
    """Exponential moving average of weights and BN statistics.

    torch's AveragedModel asks the device before each update whether it is the first one, and the host waits.

    Attributes:
        module: the averaged network.
        updates: how many there were, an int64 scalar on the device.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        """Begin with the network as it is.

        Args:
            model: what is averaged; its tensors stay where they are.
            decay: share that an update leaves of what was there, 0 to 1; the first one leaves nothing.
        """
        self.module = deepcopy(model)
        self.updates = torch.zeros((), dtype=torch.int64, device=next(model.parameters()).device)
        self._new_share = 1 - decay
        pairs = list(zip(_tensors_of(self.module), _tensors_of(model), strict=True))
        self._averaged = [pair for pair in pairs if pair[0].is_floating_point()]
        self._counted = [pair for pair in pairs if not pair[0].is_floating_point()]

    @torch.no_grad()
    def update(self, is_wanted: Tensor) -> None:
        """Take in what the network is now, all finite, unless `is_wanted`, a bool scalar on the device, is false."""
        weight = torch.where(self.updates == 0, 1.0, self._new_share) * is_wanted
        averages, values = map(list, zip(*self._averaged, strict=True))
        # Not one number for all, which would have to be known to the host.
        torch._foreach_lerp_(averages, values, [weight] * len(averages))
        for count, current in self._counted:  # batches that a BN has seen
            count.copy_(current)
        self.updates += is_wanted


def _tensors_of(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]
