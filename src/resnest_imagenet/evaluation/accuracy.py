"""A network's predictions for each image of a set, over any number of ranks."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from resnest_imagenet.compute import autocast
from resnest_imagenet.data.loader import Loader
from resnest_imagenet.distributed import Ranks, sum_over_ranks
from resnest_imagenet.errors import NonFiniteError

TOP = 5  # of top-5; with as many classes, or fewer, every image is among them: such a figure is not shown
_COLUMNS = 7  # of `_judge`


@dataclass(frozen=True)
class Evaluation:
    """A network's predictions for N images, in the order of the set.

    Attributes:
        labels: (N,) int64, the true class.
        predicted: (N,) int64, the class with the highest logit.
        in_top5: (N,) bool, whether the true class is among the five highest logits.
        confidence: (N,) float64, the probability of the predicted class.
        true_probability: (N,) float64, the probability of the true class.
    """

    labels: np.ndarray
    predicted: np.ndarray
    in_top5: np.ndarray
    confidence: np.ndarray
    true_probability: np.ndarray

    @property
    def is_right(self) -> np.ndarray:
        """Whether the true class has the highest logit, (N,) bool."""
        return self.predicted == self.labels

    @property
    def count(self) -> int:
        """Number of images."""
        return len(self.labels)

    @property
    def correct1(self) -> int:
        """Number of images whose true class has the highest logit."""
        return int(self.is_right.sum())

    @property
    def correct5(self) -> int:
        """Number of images whose true class is among the five highest logits."""
        return int(self.in_top5.sum())

    @property
    def top1(self) -> float:
        """Top-1 accuracy in percent."""
        return 100 * self.correct1 / self.count

    @property
    def top5(self) -> float:
        """Top-5 accuracy in percent."""
        return 100 * self.correct5 / self.count

    @property
    def loss(self) -> float:
        """Mean cross entropy, without smoothing; a probability below float32's smallest counts as that."""
        smallest = float(np.finfo(np.float32).tiny)
        return float(-np.log(np.maximum(self.true_probability, smallest)).mean())


@torch.inference_mode()
def measure_accuracy(
    model: nn.Module,
    loader: Loader,
    ranks: Ranks,
    precision: str = "fp32",
    before_batch: Callable[[int, bool], None] = lambda batch, is_everywhere: None,
    name: Callable[[int], str] = str,
) -> Evaluation:
    """Evaluate over all ranks; every rank returns the same.

    Args:
        model: maps images (B, 3, H, W) to logits (B, K); left in evaluation mode.
        loader: this rank's share of the set.
        ranks: the ranks of the evaluation.
        precision: fp32, bf16 or fp16.
        before_batch: called with the number of each batch on this rank, and whether all ranks have a batch of this
            number.
        name: returns an image's name, by its index.

    Raises:
        NonFiniteError: on all ranks, after the last batch: a logit of some image is NaN or infinite.
        RuntimeError: the ranks together did not see each image once.
    """
    model.eval()
    plan = loader.plan
    # A row for each image, filled by the one rank that sees it. float32 holds its numbers exactly (classes below 2^24),
    # so the order of the ranks cannot change the sum. The table stays on the device and is read once at the end.
    table = torch.zeros(plan.num_samples, _COLUMNS, device=ranks.device)
    common = plan.num_batches // ranks.world_size
    for batch, ((images, labels), samples) in enumerate(zip(loader.batches(epoch=0), plan.batches(0), strict=False)):
        before_batch(batch, batch < common)
        with autocast(ranks.device, precision):
            logits = model(images)
        rows = torch.from_numpy(samples).to(ranks.device, non_blocking=True)
        table[rows] += _judge(logits, labels)
    seen, is_finite, truth, predicted, in_top5, confidence, true_probability = (
        sum_over_ranks(table).T.cpu().double().numpy()
    )
    if not (seen == 1).all():
        raise RuntimeError(f"evaluated {int(seen.sum())} images of {plan.num_samples}")
    require_finite(is_finite.astype(bool), name, precision)
    return Evaluation(
        truth.astype(np.int64), predicted.astype(np.int64), in_top5.astype(bool), confidence, true_probability
    )


def _judge(logits: Tensor, labels: Tensor) -> Tensor:
    """Return a row for each image of a batch, float32 (B, 7): 1, and then the attributes of `Evaluation`.

    Args:
        logits: (B, K).
        labels: int64 (B,).
    """
    best = logits.topk(min(TOP, logits.shape[1])).indices
    probabilities = logits.float().softmax(1)
    columns = (
        torch.ones_like(labels),
        logits.isfinite().all(1),
        labels,
        best[:, 0],
        (best == labels[:, None]).any(1),
        probabilities.gather(1, best[:, :1])[:, 0],
        probabilities.gather(1, labels[:, None])[:, 0],
    )
    return torch.stack([column.float() for column in columns], dim=1)


def require_finite(
    is_finite: np.ndarray, name: Callable[[int], str], precision: str, first: int = 0, what: str = "logits"
) -> None:
    """Raise a NonFiniteError unless the logits of all images are finite.

    Args:
        is_finite: (N,) bool.
        name: returns an image's name, by its index.
        precision: of the logits.
        first: index of the first of the N images.
        what: must be finite.
    """
    bad = np.flatnonzero(~is_finite)
    if len(bad):
        advice = "; bf16 and fp32 hold larger values" if precision == "fp16" else ""
        raise NonFiniteError(
            f"{name(first + int(bad[0]))}: its {what} are not finite in {precision}, like those of {len(bad)} of "
            f"{len(is_finite)} images{advice}"
        )
