"""All that the future of a run depends on."""

from typing import Any

import torch
from torch import nn

from resnest_imagenet.config import Recipe
from resnest_imagenet.distributed import Ranks, gather_objects
from resnest_imagenet.training.average import MovingAverage
from resnest_imagenet.training.optimizer import build_optimizer, complete_state


class TrainingState:
    """Model, optimiser, loss scaler, moving average and counters.

    Attributes:
        model: the bare network: its state dict has plain keys, whatever wraps it for training.
        optimizer: SGD with momentum.
        scaler: of the fp16 loss; inert for other precisions.
        ema: exponential moving average of weights and BN statistics, or None.
        step: optimiser steps done.
        epoch: epochs done, with their evaluation.
        best_top1: best accuracy of an evaluation so far, in percent.
        skipped: steps that were not applied because a loss or gradient was not finite, as far as that was read.
        loss_sum: of this rank's steps since the last report, on the device: reading it waits for the device.
        steps_summed: how many these are; those among them that were skipped count until that is read.
        history: for each time the run was extended {"epochs": how many it had before, "until_step": when that was}.
    """

    def __init__(self, model: nn.Module, recipe: Recipe) -> None:
        device = next(model.parameters()).device
        self.model = model
        self.optimizer = build_optimizer(model, recipe)
        self.scaler = torch.amp.GradScaler(device.type, enabled=recipe.precision == "fp16")
        self.ema = None if recipe.ema_decay is None else MovingAverage(model, recipe.ema_decay)
        self.step = 0
        self.epoch = 0
        self.best_top1 = -1.0
        self.skipped = 0
        self.loss_sum = torch.zeros((), device=device)
        self.steps_summed = 0
        self.history: list[dict[str, int]] = []

    @property
    def evaluated_model(self) -> nn.Module:
        """The network that is evaluated: the moving average where there is one."""
        return self.model if self.ema is None else self.ema.module

    def state_dict(self, ranks: Ranks) -> dict[str, Any]:
        """Return plain containers and tensors, the same on all ranks; `model` and `ema` are plain state dicts."""
        return {
            "model": self.model.state_dict(),
            "ema": None if self.ema is None else self.ema.module.state_dict(),
            "ema_updates": 0 if self.ema is None else int(self.ema.updates),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "step": self.step,
            "epoch": self.epoch,
            "best_top1": self.best_top1,
            "skipped": self.skipped,
            "loss_sums": gather_objects(float(self.loss_sum), ranks),
            "steps_summed": self.steps_summed,
            "history": self.history,
        }

    def load_state_dict(self, state: dict[str, Any], ranks: Ranks) -> None:
        """Restore what `state_dict` returned for the same configuration; the number of ranks may be another."""
        self.model.load_state_dict(state["model"])
        if self.ema is not None:
            self.ema.module.load_state_dict(state["ema"])
            self.ema.updates.fill_(state["ema_updates"])
        self.optimizer.load_state_dict(state["optimizer"])
        complete_state(self.optimizer)
        self.scaler.load_state_dict(state["scaler"])
        self.step = state["step"]
        self.epoch = state["epoch"]
        self.best_top1 = state["best_top1"]
        self.skipped = state["skipped"]
        self.steps_summed = state["steps_summed"]
        self.history = list(state.get("history", []))  # an older version has none
        sums = state["loss_sums"]
        same_ranks = len(sums) == ranks.world_size
        self.loss_sum.fill_(sums[ranks.rank] if same_ranks else sum(sums) / len(sums))
