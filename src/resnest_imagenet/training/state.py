"""The whole state of a run, as a checkpoint saves it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from resnest_imagenet.distributed import Ranks
from resnest_imagenet.recipe import Recipe
from resnest_imagenet.training.average import MovingAverage
from resnest_imagenet.training.losses import LossMeter
from resnest_imagenet.training.optimizer import build_optimizer, complete_state


class TrainingState:
    """Model, optimiser, loss scaler, moving average and counters.

    Attributes:
        model: the bare network: its state dict has plain keys, without those of the wrappers of training.
        optimizer: the recipe's.
        scaler: of the fp16 loss; disabled for other precisions.
        ema: exponential moving average of weights and BN statistics, or None.
        step: optimiser steps done.
        epoch: epochs done, with their evaluation.
        best: highest value of the task's metric in an evaluation so far, in percent; -1 before the first.
        patience: `stale` at which the run ends, or None.
        stale: evaluations in a row, the newest ones, without a better best.
        skipped: steps that were not applied because a loss or gradient was not finite, among the verdicts read so far.
        losses: of this rank's steps since the last report.
        history: for each time the run was extended {"epochs" or "steps": its length before, "until_step": the step of
            the extension}.
    """

    def __init__(self, model: nn.Module, recipe: Recipe, head: Sequence[str] = ()) -> None:
        """Begin a run.

        Args:
            model: on its device.
            recipe: of the training.
            head: names of the modules that are trained at `train.head_lr_factor` times the rate.
        """
        device = next(model.parameters()).device
        self.model = model
        self.optimizer = build_optimizer(model, recipe, head)
        self.scaler = torch.amp.GradScaler(device.type, enabled=recipe.precision == "fp16")
        self.ema = None
        if recipe.ema_decay is not None:
            self.ema = MovingAverage(model, recipe.ema_decay, recipe.ema_warmup)
        self.step = 0
        self.epoch = 0
        self.best = -1.0
        self.patience = recipe.patience
        self.stale = 0
        self.skipped = 0
        self.losses = LossMeter(device)
        self.history: list[dict[str, int]] = []

    @property
    def evaluated_model(self) -> nn.Module:
        """The network that is evaluated: the moving average if there is one."""
        return self.model if self.ema is None else self.ema.module

    @property
    def has_stalled(self) -> bool:
        """Whether the run ends here, because its last evaluations were no better."""
        return has_stalled(self.stale, self.patience)

    def end_epoch(self, value: float | None) -> bool:
        """Count an epoch, and return whether its evaluation is the best so far.

        Args:
            value: of the task's metric; None: the epoch was not evaluated.
        """
        self.epoch += 1
        if value is None:
            return False
        is_best = value > self.best
        self.best = max(self.best, value)
        self.stale = 0 if is_best else self.stale + 1
        return is_best

    def describe_progress(self) -> dict[str, int | float]:
        """Return the counters by name: epochs and steps done, and the best value so far."""
        return {"epoch": self.epoch, "step": self.step, "best": self.best}

    def state_dict(self, ranks: Ranks) -> dict[str, Any]:
        """Return plain containers and tensors, the same on all ranks; `model` and `ema` are plain state dicts."""
        return {
            "model": self.model.state_dict(),
            "ema": None if self.ema is None else self.ema.module.state_dict(),
            "ema_updates": 0 if self.ema is None else int(self.ema.updates),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            **self.describe_progress(),
            "stale": self.stale,
            "skipped": self.skipped,
            **self.losses.state_dict(ranks),
            "history": self.history,
        }

    def load_state_dict(self, state: dict[str, Any], ranks: Ranks) -> None:
        """Restore the result of `state_dict` for the same configuration; the number of ranks may have changed."""
        self.model.load_state_dict(state["model"])
        if self.ema is not None:
            self.ema.module.load_state_dict(state["ema"])
            self.ema.updates.fill_(state["ema_updates"])
        self.optimizer.load_state_dict(state["optimizer"])
        complete_state(self.optimizer)
        self.scaler.load_state_dict(state["scaler"])
        self.step = state["step"]
        self.epoch = state["epoch"]
        self.best = state["best"]
        self.stale = state.get("stale", 0)  # checkpoints of earlier versions lack it
        self.skipped = state["skipped"]
        self.losses.load_state_dict(state, ranks)
        self.history = list(state["history"])


def has_stalled(stale: int, patience: int | None) -> bool:
    """Return whether so many evaluations without a better best end a run."""
    return patience is not None and stale >= patience
