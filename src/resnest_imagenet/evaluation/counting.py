"""Exact top-1 and top-5 over any number of ranks."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from resnest_imagenet.compute import autocast
from resnest_imagenet.data.loader import Loader
from resnest_imagenet.distributed import Ranks, sum_over_ranks


@dataclass(frozen=True)
class Accuracy:
    """Counts of a whole evaluation set.

    Attributes:
        correct1: images whose label is the highest logit.
        correct5: images whose label is among the five highest.
        count: images.
    """

    correct1: int
    correct5: int
    count: int

    @property
    def top1(self) -> float:
        """Top-1 accuracy in percent."""
        return 100 * self.correct1 / self.count

    @property
    def top5(self) -> float:
        """Top-5 accuracy in percent."""
        return 100 * self.correct5 / self.count


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    loader: Loader,
    ranks: Ranks,
    precision: str = "fp32",
    before_batch: Callable[[int, bool], None] = lambda batch, is_everywhere: None,
) -> Accuracy:
    """Count over all ranks; every rank returns the same.

    Args:
        model: maps images (B, 3, H, W) to logits (B, K); left in evaluation mode.
        loader: this rank's share of the set.
        ranks: who takes part.
        precision: fp32, bf16 or fp16.
        before_batch: called with the number of each batch on this rank, and whether all ranks have one of this number.

    Raises:
        RuntimeError: where the ranks together did not see each image once.
    """
    model.eval()
    counts = torch.zeros(3, dtype=torch.int64, device=ranks.device)
    common = loader.plan.num_batches // ranks.world_size
    for batch, (images, labels) in enumerate(loader.batches(epoch=0)):
        before_batch(batch, batch < common)
        with autocast(ranks.device, precision):
            logits = model(images)
        best = logits.topk(min(5, logits.shape[1])).indices
        hits = best == labels[:, None]
        # Integers, and on the device: a sum that no order of ranks can change, read once at the end.
        counts += torch.stack([hits[:, 0].sum(), hits.sum(), hits.new_tensor(len(labels), dtype=torch.int64)])
    correct1, correct5, count = sum_over_ranks(counts).tolist()
    if count != loader.plan.num_samples:
        raise RuntimeError(f"evaluated {count} images of {loader.plan.num_samples}")
    return Accuracy(correct1, correct5, count)
