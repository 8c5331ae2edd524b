"""A task with faults: what happens at single batches of a run is data, and the rest is the real task's."""

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from resnest_imagenet.config import TrainConfig
from resnest_imagenet.randomness import Draws
from resnest_imagenet.tasks.choice import open_task
from resnest_imagenet.tasks.task import Batch, Task
from resnest_imagenet.training import train


@dataclass(frozen=True)
class Fault:
    """What happens at a batch.

    Attributes:
        epoch: counted from 0; None: any.
        number: of the batch in the epoch, over all ranks, so that it is on one rank only; None: any.
        act: what is done before its loss is computed.
        loss_factor: what its loss is multiplied by.
        gradient_factor: what the gradient of its loss is multiplied by, while the loss stays.
        part: the loss, by its name, that the factors are for; None: all.
    """

    epoch: int | None = None
    number: int | None = None
    act: Callable[[], object] | None = None
    loss_factor: float | None = None
    gradient_factor: float | None = None
    part: str | None = None

    def is_at(self, draws: Draws) -> bool:
        """Return whether this is its batch."""
        return self.epoch in (None, draws.epoch) and self.number in (None, draws.number)


class FaultyTask:
    """Wraps a task: its losses have faults. Implements `tasks.task.Task`."""

    def __init__(self, task: Task, faults: Iterable[Fault]) -> None:
        self._task = task
        self._faults = tuple(faults)
        self._blank: Batch = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._task, name)

    def __copy__(self) -> "FaultyTask":
        return FaultyTask(copy.copy(self._task), self._faults)

    @property
    def config(self) -> TrainConfig:
        """The task's, which a copy of it may have with another batch size."""
        return self._task.config

    @config.setter
    def config(self, config: TrainConfig) -> None:
        self._task.config = config

    def blank_batch(self, device: torch.device) -> Batch:
        """Remember what is no batch of the run: it is computed before the first step, with the first batch's draws."""
        self._blank = self._task.blank_batch(device)
        return self._blank

    def loss(self, network: nn.Module, batch: Batch, draws: Draws) -> Mapping[str, Tensor]:
        """Return the task's losses, with the faults of the batch."""
        faults = [] if batch is self._blank else [fault for fault in self._faults if fault.is_at(draws)]
        for fault in faults:
            if fault.act is not None:
                fault.act()
        losses = self._task.loss(network, batch, draws)
        for fault in faults:
            losses = {
                name: _spoil(loss, fault) if fault.part in (None, name) else loss for name, loss in losses.items()
            }
        return losses


def _spoil(loss: Tensor, fault: Fault) -> Tensor:
    if fault.loss_factor is not None:
        loss = loss * fault.loss_factor
    if fault.gradient_factor is not None:
        factor = fault.gradient_factor
        loss = loss.view_as(loss)  # a hook of this fault only
        loss.register_hook(lambda gradient: gradient * factor)
    return loss


def open_with(*faults: Fault, real: Callable[[TrainConfig], Task] = open_task) -> Callable[[TrainConfig], Task]:
    """Return what opens the task of a recipe with faults: put it in the place of `training.train.open_task`."""
    return lambda config: FaultyTask(real(config), faults)


def put_into_runs(*faults: Fault) -> None:
    """Give all runs of this process the faults, besides those that they have."""
    train.open_task = open_with(*faults, real=train.open_task)
