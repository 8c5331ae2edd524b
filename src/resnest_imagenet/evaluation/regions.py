"""Measures how well a network segments scenes: one confusion matrix of pixels, over any number of ranks."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resnest_imagenet.compute import autocast
from resnest_imagenet.data.loader import Loader
from resnest_imagenet.data.scenes import VOID
from resnest_imagenet.data.transforms import MEAN, STD, EvalTransform
from resnest_imagenet.distributed import Ranks, sum_over_ranks
from resnest_imagenet.errors import ConfigError, DataError, suggest
from resnest_imagenet.evaluation.accuracy import require_finite

# Windows in a batch. On a CPU larger batches are not faster, and the logits of a window take 138 MB (150 classes, crop
# 480).
WINDOWS_AT_ONCE = 4

ProtocolName = Literal["whole", "slide", "centre", "published"]
Forward = Callable[[Tensor], Tensor]  # pixels (B, 3, H, W), 0..255, to scores float32 (B, K, H, W)


@dataclass(frozen=True)
class Regions:
    """A network's predictions for the labelled pixels of N scenes.

    Attributes:
        matrix: (K, K) int64, pixels of each true class (rows) that were predicted as each class (columns).
        correct: (N,) int64, pixels of each scene whose class is predicted correctly.
        labelled: (N,) int64, pixels of each scene that have a class.
    """

    matrix: np.ndarray
    correct: np.ndarray
    labelled: np.ndarray

    @property
    def count(self) -> int:
        """Number of scenes."""
        return len(self.labelled)

    @property
    def is_present(self) -> np.ndarray:
        """Whether a class is in the ground truth, (K,) bool."""
        return self.matrix.sum(1) > 0

    @property
    def iou(self) -> np.ndarray:
        """Intersection over union of each class in percent, (K,) float64; 0 for a class that does not occur."""
        intersection = self.matrix.diagonal()
        union = self.matrix.sum(0) + self.matrix.sum(1) - intersection
        return 100 * intersection / np.maximum(union, 1)

    @property
    def miou(self) -> float:
        """Mean IoU over all classes in percent; an absent class counts as 0, as in the published figures."""
        return float(self.iou.mean())

    @property
    def miou_present(self) -> float:
        """Mean IoU over the classes in the ground truth in percent."""
        return float(self.iou[self.is_present].mean()) if self.is_present.any() else 0.0

    @property
    def pixel_accuracy(self) -> float:
        """Share of the labelled pixels whose class is predicted correctly, in percent."""
        return float(100 * self.matrix.trace() / max(self.matrix.sum(), 1))


@dataclass(frozen=True)
class RegionProtocol:
    """How a network sees a scene, and how its scores become scores of the scene's pixels.

    "whole": the scene at once. "slide": windows of crop x crop pixels; logits are averaged where windows overlap.
    "published": the same windows, but exp(logits) is averaged (not softmax: confident windows weigh more) and summed
    over scales. "centre": the centre crop of a scene whose short side is resized to the crop; the mask is cut in the
    same way, so that only these pixels count. It is for the evaluation during training.

    Source: PyTorch-Encoding, encoding/models/base.py (MultiEvalModule) and encoding/datasets/base.py.

    Attributes:
        name: one of the four.
        crop: side of a window in pixels; None for "whole".
        base: long side of the resized scene in pixels; None: the scene keeps its own.
        scales: factors of that size; the scores of all scales are added.
        flip: whether the logits of the mirrored input are added.
    """

    name: ProtocolName
    crop: int | None = None
    base: int | None = None
    scales: tuple[float, ...] = (1.0,)
    flip: bool = False

    def __post_init__(self) -> None:
        names = get_args(ProtocolName)
        if self.name not in names:
            raise ConfigError(f"unknown protocol={self.name}{suggest(self.name, names)} ({', '.join(names)})")
        if self.name != "whole" and (self.crop is None or self.crop < 2):
            raise ConfigError(f"protocol={self.name} needs a crop of at least 2 pixels, not crop={self.crop}")
        if self.name == "centre" and (self.base, self.scales) != (None, (1.0,)):
            raise ConfigError("protocol=centre resizes to the crop: unset base and scales")
        if not self.scales or min(self.scales) <= 0:
            raise ConfigError(f"protocol={self.name}: scales={list(self.scales)} must be above 0")

    @property
    def text(self) -> str:
        """The rule in words, shown beside every figure."""
        if self.name == "centre":
            return _centre(self.crop).protocol + ", flipped too" * self.flip
        parts = [self.name, "own size" if self.base is None else f"long side {self.base}"]
        if self.scales != (1.0,):
            parts[-1] += " times " + " ".join(f"{scale:g}" for scale in self.scales)
        if self.name != "whole":
            parts.append(f"windows of {self.crop}")
        parts += ["flipped too"] * self.flip + ["exp() summed"] * (self.name == "published")
        return ", ".join(parts)

    def resized(self, height: int, width: int) -> Iterator[tuple[int, int]]:
        """Yield a scene's size (height, width) at each scale: the long side rounded up, the other to nearest."""
        longest = max(height, width)
        for scale in self.scales:
            side = math.ceil((self.base or longest) * scale)
            h, w = (max(1, int(length * side / longest + 0.5)) for length in (height, width))
            yield h, w


@torch.inference_mode()
def measure_regions(
    network: nn.Module,
    loader: Loader,
    ranks: Ranks,
    protocol: RegionProtocol,
    num_classes: int,
    precision: str = "fp32",
    before_batch: Callable[[int, bool], None] = lambda batch, is_everywhere: None,
    name: Callable[[int], str] = str,
) -> Regions:
    """Evaluate over all ranks; every rank returns the same.

    Args:
        network: maps images (B, 3, H, W) of any size to logits (B, K, H, W); left in evaluation mode.
        loader: this rank's share of the set: scenes uint8 (1, 3, H, W), each of its own size, and masks uint8
            (1, H, W) with classes and VOID.
        ranks: the ranks of the evaluation.
        protocol: how the network sees scenes.
        num_classes: K.
        precision: fp32, bf16 or fp16.
        before_batch: called with the number of each batch on this rank, and whether all ranks have a batch of this
            number.
        name: returns a scene's name, by its index.

    Raises:
        NonFiniteError: on all ranks, after the last batch: a score of some scene is NaN or infinite, as exp() above 88.
        DataError: on all ranks, after the last batch: some mask has other values than classes and VOID.
        RuntimeError: the ranks together did not see each scene once.
    """
    network.eval()
    plan = loader.plan
    # Integers, so that the order of the ranks cannot change a sum; on the device, and read once at the end.
    matrix = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=ranks.device)
    table = torch.zeros(plan.num_samples, 5, dtype=torch.int64, device=ranks.device)
    common = plan.num_batches // ranks.world_size
    for batch, (scene, samples) in enumerate(zip(loader.batches(epoch=0), plan.batches(0), strict=False)):
        before_batch(batch, batch < common)
        images, masks = cut_centre(*scene, protocol.crop) if protocol.name == "centre" else scene
        scores = score_pixels(network, images, protocol, precision)
        confusions, row = _judge(scores, masks, num_classes)
        matrix += confusions
        table[int(samples[0])] += row
    seen, is_finite, is_known, correct, labelled = sum_over_ranks(table).T.cpu().numpy()
    if not (seen == 1).all():
        raise RuntimeError(f"evaluated {int(seen.sum())} scenes of {plan.num_samples}")
    require_finite(is_finite.astype(bool), name, precision)
    if not is_known.all():
        scene_name = name(int(is_known.argmin()))
        raise DataError(f"{scene_name}: its mask has values that are neither one of {num_classes} classes nor {VOID}")
    return Regions(sum_over_ranks(matrix).cpu().numpy(), correct, labelled)


def _judge(scores: Tensor, masks: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Return the confusions (K, K) int64 of one scene, and (1, is finite, mask is valid, correct, labelled) int64.

    Args:
        scores: (1, K, H, W).
        masks: uint8 (1, H, W).
        num_classes: K.
    """
    truth, predicted = masks.long(), scores.argmax(1)
    is_labelled = truth < num_classes
    # Pixels without a label get a row of their own, which is dropped.
    cells = truth.clamp(max=num_classes) * num_classes + predicted
    confusions = torch.bincount(cells.flatten(), minlength=num_classes * (num_classes + 1))
    confusions = confusions.reshape(num_classes + 1, num_classes)[:num_classes]
    columns = (
        torch.ones_like(confusions[0, 0]),
        scores.isfinite().all(),
        (is_labelled | (truth == VOID)).all(),
        confusions.trace(),
        confusions.sum(),
    )
    return confusions, torch.stack([column.long() for column in columns])


def _centre(crop: int | None) -> EvalTransform:
    assert crop is not None
    return EvalTransform(crop, ratio=1.0, interpolation="bilinear")


def cut_centre(images: Tensor, masks: Tensor, crop: int | None) -> tuple[Tensor, Tensor]:
    """Return the centre crop of a scene whose short side is resized to the crop, and of its mask.

    Args:
        images: uint8 (1, 3, H, W).
        masks: uint8 (1, H, W).
        crop: in pixels.

    Returns:
        float32 (1, 3, crop, crop), 0..255, bilinear as by Pillow; uint8 (1, crop, crop), nearest.
    """
    transform = _centre(crop)
    size = transform.resized(*masks.shape[1:])
    images = F.interpolate(images.float(), size, mode="bilinear", antialias=True)
    masks = F.interpolate(masks[:, None], size, mode="nearest-exact")[:, 0]
    top, left, height, width = transform.window(*size)
    rows, columns = slice(top, top + height), slice(left, left + width)
    return images[..., rows, columns], masks[..., rows, columns]


@torch.inference_mode()
def score_pixels(network: nn.Module, images: Tensor, protocol: RegionProtocol, precision: str = "fp32") -> Tensor:
    """Return the scores of each pixel of a scene, float32 (1, K, H, W): the predicted class has the highest.

    For "centre", call `cut_centre` first.

    Args:
        network: in evaluation mode.
        images: (1, 3, H, W), 0..255.
        protocol: how the network sees the scene.
        precision: fp32, bf16 or fp16.
    """
    forward = partial(_forward, network, protocol, precision)
    size = images.shape[2], images.shape[3]
    scores = None
    for resized in protocol.resized(*size):
        scene = _resize(images.float(), resized)
        if protocol.name in ("slide", "published"):
            assert protocol.crop is not None
            scene_scores = _score_windows(forward, scene, protocol.crop)
        else:
            scene_scores = forward(scene)
        scene_scores = _resize(scene_scores, size)
        scores = scene_scores if scores is None else scores.add_(scene_scores)
    assert scores is not None
    return scores


def _resize(images: Tensor, size: tuple[int, int]) -> Tensor:
    if images.shape[2:] == size:
        return images
    return F.interpolate(images, size, mode="bilinear", align_corners=True)


def _forward(network: nn.Module, protocol: RegionProtocol, precision: str, pixels: Tensor) -> Tensor:
    """Implements `Forward`."""
    mean, std = (torch.tensor(values, device=pixels.device)[:, None, None] for values in (MEAN, STD))
    images = ((pixels - mean) / std).contiguous(memory_format=torch.channels_last)
    with autocast(images.device, precision):
        logits = network(images).float()
        if protocol.flip:
            logits += network(images.flip(3)).float().flip(3)
    return logits.exp_() if protocol.name == "published" else logits


def place_windows(length: int, crop: int) -> list[int]:
    """Return the starts of the windows along a side, 2/3 of the crop apart; the last window may end beyond the side."""
    stride = crop * 2 // 3
    return [number * stride for number in range(max(0, math.ceil((length - crop) / stride)) + 1)]


def _score_windows(forward: Forward, images: Tensor, crop: int) -> Tensor:
    """Return the scores (1, K, H, W) of a scene (1, 3, H, W), averaged over the windows that cover a pixel."""
    height, width = images.shape[2:]
    tops, lefts = place_windows(height, crop), place_windows(width, crop)
    # Pad with black, as training crops are padded.
    images = F.pad(images, (0, lefts[-1] + crop - width, 0, tops[-1] + crop - height))
    places = [(slice(top, top + crop), slice(left, left + crop)) for top in tops for left in lefts]
    covering = images.new_zeros(images.shape[2:])
    for rows, columns in places:
        covering[rows, columns] += 1
    scores = None
    for first in range(0, len(places), WINDOWS_AT_ONCE):
        batch = places[first : first + WINDOWS_AT_ONCE]
        windows = forward(torch.cat([images[..., rows, columns] for rows, columns in batch]))
        if scores is None:
            scores = windows.new_zeros(1, windows.shape[1], *images.shape[2:])
        for (rows, columns), window in zip(batch, windows, strict=True):
            scores[0, :, rows, columns] += window
    assert scores is not None
    return scores.div_(covering)[..., :height, :width]
