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

Batch: TypeAlias = Any  # what a task's loader yields: a run never looks inside
Pause: TypeAlias = Callable[[int, bool], None]  # before each batch: its number on this rank, whether all ranks have one
Evaluate: TypeAlias = Callable[[nn.Module, Pause], Score]


class Task(Protocol):
    """What a run trains a network for: all that differs between classification, detection and segmentation.

    It is opened before the ranks meet: it has listed its data and refused what cannot work. It holds nothing that a
    checkpoint would have to keep: what is random is a function of `Draws`. A task whose classes have colours may also
    have `palette`, uint8 (K, 3), one whose data set numbers them `category_ids`, int64 (K,): its checkpoints then have
    them too.

    Attributes:
        config: the run's, with what the data decides filled in, such as the number of classes.
        classes: names, in the order of the network's outputs.
        metric: the value of a `Score` that chooses best.pt: in percent, 0 to 100, higher is better.
        head: names of the modules that are trained at `train.head_lr_factor` times the rate; () where there is none.
        train_set: the training images.
        val_set: those of the evaluation.
    """

    config: TrainConfig
    classes: tuple[str, ...]
    metric: str
    head: tuple[str, ...]
    train_set: ImageSource
    val_set: ImageSource

    def identify(self, ranks: Ranks, tick: Callable[[], None]) -> dict[str, Any]:
        """Return what must not change when a run is resumed: plain values by the option's name, and digests of data.

        "classes" is a list of names; entries about the data are named as `tasks.digests.describe_images` names them.

        Args:
            ranks: who takes part: all do.
            tick: called from time to time while files are read.
        """

    def count_kept_bytes(self, enough: float = 0) -> int:
        """Return the bytes that a forward pass of one rank keeps for the backward pass.

        Args:
            enough: where an upper bound that costs nothing is below this, that bound.
        """

    def build_model(self, is_new: bool, device: torch.device) -> nn.Module:
        """Build the network on a device; a new run starts from `train.init_from`, where it is set.

        `loss` is then about the network that was built last.
        """

    def plan_batches(self, num_batches: int, ranks: Ranks) -> BatchPlan:
        """Plan this rank's share of the training set, in `num_batches` batches per epoch over all ranks."""

    def build_loader(self, plan: BatchPlan, ranks: Ranks) -> Loader:
        """Build what yields the batches of a plan."""

    def build_evaluation(self, ranks: Ranks) -> Evaluate:
        """Prepare the evaluation after an epoch: each validation image once, on one of the ranks."""

    def loss(self, network: nn.Module, batch: Batch, draws: Draws) -> Mapping[str, Tensor]:
        """Return the loss of one batch: scalars by name, the same names for every batch, whose sum is minimised.

        The names stand in metrics.jsonl beside "loss", which is the sum, "lr", "images_per_s" and "data_wait".

        Args:
            network: that of `build_model`, wrapped.
            batch: of the loader; may be changed in place.
            draws: of this batch.
        """

    def blank_batch(self, device: torch.device) -> Batch:
        """Return a batch without images, for the pass before the first step."""

    def show(self, batch: Batch, draws: Draws) -> Callable[[], np.ndarray]:
        """Return what draws some images of a batch as the network sees them, uint8 (H, W, 3); the batch stays."""

    def describe(self, counts_cost: bool) -> dict[str, str]:
        """Return the task's lines of a run's plan by their subjects, "network" among them; no image is read.

        Args:
            counts_cost: whether the network's line has its multiply-adds too, which takes seconds.
        """
