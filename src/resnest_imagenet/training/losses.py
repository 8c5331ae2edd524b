"""The losses of the steps since the last report."""

from collections.abc import Mapping
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from resnest_imagenet.distributed import Ranks, gather_objects, sum_over_ranks

TOTAL = "loss"  # the name of the sum of all parts


def divide_loss(parts: Mapping[str, Tensor], accumulation: int) -> dict[str, Tensor]:
    """Return a batch's share of a step's loss: the sum as `TOTAL`, and the parts if there are several.

    Args:
        parts: scalars by name; no name is `TOTAL`.
        accumulation: batches in a step.
    """
    shares = {name: part / accumulation for name, part in parts.items()}
    total = reduce(torch.add, shares.values())
    assert TOTAL not in shares, f"a part of a loss must not be named {TOTAL}, which is the sum"
    return {TOTAL: total, **(shares if len(shares) > 1 else {})}


class LossMeter:
    """Sums losses by name, on the device: reading them waits for the device.

    A step's losses are added by `end_step`, unless the step is skipped.

    Attributes:
        num_steps: number of steps added; a skipped step counts until `take_back`.
    """

    def __init__(self, device: torch.device) -> None:
        self.num_steps = 0
        self._zero = torch.zeros((), device=device)
        self._sums: dict[str, Tensor] = {TOTAL: self._zero}
        self.start_step()

    def start_step(self) -> None:
        """Drop a step that was not ended."""
        self._with_step = dict(self._sums)

    def add(self, losses: Mapping[str, Tensor]) -> None:
        """Add one batch's share of the step's losses, scalars by name."""
        for name, loss in losses.items():
            self._with_step[name] = self._with_step.get(name, self._zero) + loss.detach()

    def is_finite(self) -> Tensor:
        """Return whether the total with this step's loss is finite: a bool scalar on the device."""
        return self._with_step[TOTAL].isfinite()

    def end_step(self, is_skipped: Tensor) -> None:
        """Add the step, unless `is_skipped`, a bool scalar on the device, is true."""
        self._sums = {
            name: torch.where(is_skipped, self._sums.get(name, self._zero), value)
            for name, value in self._with_step.items()
        }
        self.num_steps += 1

    def take_back(self) -> None:
        """Do not count a step that was skipped."""
        self.num_steps -= 1

    def read(self, ranks: Ranks) -> dict[str, float]:
        """Return the means over the steps and ranks, and restart; all ranks take part."""
        names = sorted(self._sums)  # the same order on all ranks
        sums = sum_over_ranks(torch.stack([self._sums[name] for name in names])).tolist()
        count = self.num_steps * ranks.world_size
        means = {name: value / count for name, value in zip(names, sums, strict=True)}
        self._sums = dict.fromkeys(self._sums, self._zero)
        self.num_steps = 0
        return means

    def state_dict(self, ranks: Ranks) -> dict[str, Any]:
        """Return plain containers, the same on all ranks."""
        sums = {name: float(value) for name, value in self._sums.items()}
        return {"loss_sums": gather_objects(sums, ranks), "steps_summed": self.num_steps}

    def load_state_dict(self, state: Mapping[str, Any], ranks: Ranks) -> None:
        """Restore the result of `state_dict`; the number of ranks may have changed."""
        sums = state["loss_sums"]
        if len(sums) == ranks.world_size:
            of_rank = sums[ranks.rank]
        else:
            of_rank = {name: sum(values[name] for values in sums) / len(sums) for name in sums[0]}
        self._sums = {name: self._zero + value for name, value in of_rank.items()}
        self.num_steps = state["steps_summed"]
        self.start_step()
