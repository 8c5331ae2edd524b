"""The contract of a task."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from resnest_imagenet.config import TrainConfig
from resnest_imagenet.data.loader import Loader
from resnest_imagenet.data.plan import BatchPlan
from resnest_imagenet.data.source import ImageSource
from resnest_imagenet.distributed import Ranks
from resnest_imagenet.evaluation.score import Score
from resnest_imagenet.randomness import Draws

Batch: TypeAlias = Any  # of a task's loader: the run does not read its content
Pause: TypeAlias = Callable[[int, bool], None]  # before each batch: its number on this rank, whether all ranks have one
Evaluate: TypeAlias = Callable[[nn.Module, Pause], Score]


class Task(Protocol):
    """All that differs between training for classification, detection and segmentation.

    A task is opened before the ranks meet: it lists its data and refuses what cannot work. It has no state that a
    checkpoint must hold: its randomness is a function of `Draws`. A task whose classes have colours may also have
    `palette`, uint8 (K, 3), and a task whose data set numbers the classes `category_ids`, int64 (K,); its checkpoints
    then have them too.

    Attributes:
        config: the run's, with values that depend on the data filled in, such as the number of classes.
        classes: names, in the order of the network's outputs.
        metric: the value of a `Score` that chooses best.pt: in percent, 0 to 100, higher is better.
        head: names of the modules that are trained at `train.head_lr_factor` times the rate; () if there is no head.
        train_set: the training images.
        val_set: the images of the evaluation.
    """

    config: TrainConfig
    classes: tuple[str, ...]
    metric: str
    head: tuple[str, ...]
    train_set: ImageSource
    val_set: ImageSource

    def identify(self, ranks: Ranks, tick: Callable[[], None]) -> dict[str, Any]:
        """Return the values that must not change when a run is resumed, by option name, and digests of the data.

        "classes" is a list of names; entries about the data have the names of `tasks.digests.describe_images`. All
        ranks take part.

        Args:
            ranks: the ranks of the run.
            tick: called from time to time while files are read.
        """

    def count_kept_bytes(self, device: torch.device, enough: float = 0) -> int:
        """Return the bytes that a forward pass of one rank keeps for the backward pass.

        Args:
            device: of the rank.
            enough: if a cheap upper bound is below this, return that bound.
        """

    def build_model(self, is_new: bool, device: torch.device) -> nn.Module:
        """Build the network on a device; a new run starts from `train.init_from` if it is set.

        `loss` applies to the network that was built last.
        """

    def plan_batches(self, num_batches: int, ranks: Ranks) -> BatchPlan:
        """Plan this rank's share of the training set, in `num_batches` batches per epoch over all ranks."""

    def choose_train_loader(self, device: torch.device, saved: str | None = None) -> str | None:
        """Return the library that decodes the training images: dali or torchvision; None if there is no choice.

        Args:
            device: of the batches.
            saved: the library in the checkpoint from which the run resumes: with loader=auto it stays where it is
                installed, so that the run stays the same bit for bit.

        Raises:
            ConfigError: for loader=dali if DALI is not installed.
        """

    def build_loader(self, plan: BatchPlan, ranks: Ranks) -> Loader:
        """Build the loader of the batches of a plan."""

    def build_evaluation(self, ranks: Ranks) -> Evaluate:
        """Prepare the evaluation after an epoch: one rank evaluates each validation image, once."""

    def loss(self, network: nn.Module, batch: Batch, draws: Draws) -> Mapping[str, Tensor]:
        """Return the loss of one batch: scalars by name, the same names for every batch; their sum is minimised.

        The names stand in metrics.jsonl beside "loss" (the sum), "lr", "images_per_s" and "data_wait".

        Args:
            network: of `build_model`, wrapped.
            batch: of the loader; may be changed in place.
            draws: of this batch.
        """

    def blank_batch(self, device: torch.device) -> Batch:
        """Return a batch without images, for the pass before the first step."""

    def show(self, batch: Batch, draws: Draws) -> Callable[[], np.ndarray]:
        """Return a function that draws some images of a batch as the network sees them, uint8 (H, W, 3).

        The batch is not changed.
        """

    def describe(self, counts_cost: bool) -> dict[str, str]:
        """Return the task's lines of a run's plan by their subjects, including "network"; no image is read.

        Args:
            counts_cost: whether the network's line includes its multiply-adds, which takes seconds.
        """
