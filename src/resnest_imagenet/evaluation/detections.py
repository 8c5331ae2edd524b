"""Runs a detector over a set, on any number of ranks, and writes and reads its detections in COCO's form."""

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from resnest_imagenet.compute import autocast
from resnest_imagenet.data.loader import Loader
from resnest_imagenet.distributed import Ranks, gather_objects, sum_over_ranks
from resnest_imagenet.errors import DataError
from resnest_imagenet.evaluation.accuracy import require_finite
from resnest_imagenet.evaluation.ground_truth import GroundTruth, Size
from resnest_imagenet.evaluation.masks import encode_masks, import_masks
from resnest_imagenet.instances import Detections, list_corners

Kind = Literal["box", "mask"]


@dataclass(frozen=True, eq=False)
class DetectionTable:
    """D detections in the images of a set, in the order of the images, and in an image in the network's order.

    Attributes:
        images: (D,) int64, the image of each detection, by its index in the set.
        boxes: (D, 4) float64, x y width height in pixels of the original image, upright.
        scores: (D,) float64, 0..1.
        labels: (D,) int64, the class of each, 0..K-1.
        masks: D compressed run-length codes of whole images; None: boxes only.
    """

    images: np.ndarray
    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    masks: tuple[bytes, ...] | None = None

    def __len__(self) -> int:
        return len(self.images)

    @property
    def corners(self) -> np.ndarray:
        """The boxes as x1 y1 x2 y2, float64 (D, 4)."""
        return list_corners(self.boxes)

    def select(self, rows: np.ndarray) -> "DetectionTable":
        """Return some of the detections, by ascending rows int64 (n,), or by a mask bool (D,)."""
        rows = np.arange(len(self))[rows]
        masks = None if self.masks is None else tuple(self.masks[row] for row in rows.tolist())
        return DetectionTable(self.images[rows], self.boxes[rows], self.scores[rows], self.labels[rows], masks)

    def of_image(self, image: int) -> "DetectionTable":
        """Return the detections in one image."""
        return self.select(np.arange(*np.searchsorted(self.images, [image, image + 1])))


def bring_back(detections: Detections, size: Size, original: Size) -> Detections:
    """Return detections in pixels of the original image, on the host, clipped to it, without those that have no area.

    Source: detectron2, modeling/postprocessing.py (detector_postprocess).

    Args:
        detections: in one image.
        size: (height, width) of the image that the network saw, in pixels.
        original: (height, width) of the original image.
    """
    detections = detections.to(torch.device("cpu"))
    (height, width), (original_height, original_width) = size, original
    scales = torch.tensor([original_width / width, original_height / height] * 2)
    borders = torch.tensor([original_width, original_height] * 2, dtype=torch.float32)
    boxes = (detections.boxes.float() * scales).clamp(min=torch.zeros(4), max=borders)
    kept = ((boxes[:, 2:] - boxes[:, :2]) > 0).all(1)
    masks = None if detections.masks is None else detections.masks[kept].float()
    return Detections(boxes[kept], detections.scores[kept].float(), detections.labels[kept], masks)


def is_finite(detections: Detections) -> bool:
    """Return whether all values of detections are finite."""
    tensors = (detections.boxes, detections.scores, detections.masks)
    return all(bool(tensor.isfinite().all()) for tensor in tensors if tensor is not None)


class _Collector:
    """Collects the detections of one rank."""

    def __init__(self, num_images: int) -> None:
        self._parts: list[tuple[int, Detections]] = []
        self._masks: list[bytes] = []
        self._has_masks = False
        self._seen = torch.zeros(num_images, 2, dtype=torch.int64)

    def add(self, image: int, size: Size, original: Size, detections: Detections) -> None:
        has_numbers = is_finite(detections)
        self._seen[image] += torch.tensor([1, has_numbers])
        if not has_numbers:
            return
        kept = bring_back(detections, size, original)
        if kept.masks is not None:
            self._has_masks = True
            self._masks += encode_masks(kept.masks, kept.boxes, original)
        self._parts.append((image, Detections(kept.boxes, kept.scores, kept.labels)))

    def gather(self, ranks: Ranks, name: Callable[[int], str], precision: str) -> DetectionTable:
        """Return the detections of all ranks, in the order of the images."""
        seen, is_finite = sum_over_ranks(self._seen.to(ranks.device)).T.cpu().numpy()
        if not (seen == 1).all():
            raise RuntimeError(f"evaluated {int(seen.sum())} images of {len(seen)}")
        require_finite(is_finite.astype(bool), name, precision)
        shares = gather_objects((*self._columns(), self._pack_masks()), ranks)
        columns = [np.concatenate(column) for column in zip(*(share[:4] for share in shares), strict=True)]
        order = np.argsort(columns[0], kind="stable")
        masks = None
        if any(share[4] is not None for share in shares):
            codes = list(itertools.chain.from_iterable(_unpack_masks(share[4]) for share in shares))
            masks = tuple(codes[row] for row in order.tolist())
        images, corners, scores, labels = (column[order] for column in columns)
        # float64 keeps every digit of the differences of float32, and a file that is read back has the same values.
        boxes = corners.astype(np.float64)
        boxes[:, 2:] -= boxes[:, :2]
        return DetectionTable(images, boxes, scores.astype(np.float64), labels, masks)

    def _columns(self) -> tuple[np.ndarray, ...]:
        images = np.repeat(
            np.array([image for image, _ in self._parts], np.int64), [len(detections) for _, detections in self._parts]
        )
        empty = (torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64))
        columns = zip(empty, *((part.boxes, part.scores, part.labels) for _, part in self._parts), strict=True)
        return images, *(torch.cat(column).numpy() for column in columns)

    def _pack_masks(self) -> tuple[bytes, np.ndarray] | None:
        """Return all codes as one string, which pickles fast, and their lengths; None if there are no masks."""
        if not self._has_masks:
            return None
        return b"".join(self._masks), np.array([len(code) for code in self._masks], np.int64)


def _unpack_masks(packed: tuple[bytes, np.ndarray] | None) -> Iterator[bytes]:
    content, lengths = packed or (b"", np.zeros(0, np.int64))
    ends = np.cumsum(lengths).tolist()
    for start, end in zip([0, *ends], ends, strict=False):
        yield content[start:end]


@torch.inference_mode()
def detect_over_ranks(
    network: nn.Module,
    loader: Loader,
    ranks: Ranks,
    precision: str = "fp32",
    before_batch: Callable[[int, bool], None] = lambda batch, is_everywhere: None,
    name: Callable[[int], str] = str,
) -> DetectionTable:
    """Find the objects in the images of a set, over all ranks; every rank returns the same.

    Args:
        network: maps images (B, 3, H, W) and their (height, width) without padding to a list of `Detections`; it stays
            in evaluation mode.
        loader: this rank's share of the set: images and a `Target` of each.
        ranks: who takes part.
        precision: fp32, bf16 or fp16.
        before_batch: called with the number of each batch on this rank, and whether all ranks have one of this number.
        name: of an image, by its index.

    Raises:
        NonFiniteError: on all ranks, after the last batch: detections of an image have NaN or infinity.
        RuntimeError: the ranks together did not see each image once.
        ConfigError: the network finds masks, and pycocotools is not installed.
    """
    network.eval()
    plan = loader.plan
    collector = _Collector(plan.num_samples)
    common = plan.num_batches // ranks.world_size
    batches: Iterator[tuple[Tensor, Any]] = loader.batches(epoch=0)
    for batch, (images, targets) in enumerate(batches):
        before_batch(batch, batch < common)
        with autocast(ranks.device, precision):
            batch_detections = network(images, [target.size for target in targets])
        for target, detections in zip(targets, batch_detections, strict=True):
            collector.add(target.index, target.size, target.original, detections)
    return collector.gather(ranks, name, precision)


def encode_results(table: DetectionTable, truth: GroundTruth, *kinds: Kind) -> bytes:
    """Return the content of a file in the form of COCO's results, with the data set's own numbers.

    It has every digit of the values that were evaluated. Evaluation servers take one file of boxes and one of masks: if
    a file has both, COCO's evaluation of masks uses the areas of the boxes.

    Args:
        table: the detections; with masks if `kinds` has "mask".
        truth: of the set.
        kinds: "box", "mask", or both.
    """
    columns = [truth.image_ids[table.images].tolist(), truth.category_ids[table.labels].tolist(), table.scores.tolist()]
    texts = [
        f'"image_id": {image}, "category_id": {category}, "score": {score}'
        for image, category, score in zip(*columns, strict=True)
    ]
    if "box" in kinds:
        texts = [f'{text}, "bbox": {box}' for text, box in zip(texts, table.boxes.tolist(), strict=True)]
    if "mask" in kinds:
        assert table.masks is not None
        codes = zip(texts, truth.sizes[table.images].tolist(), table.masks, strict=True)
        texts = [
            f'{text}, "segmentation": {{"size": {size}, "counts": {json.dumps(counts.decode("ascii"))}}}'
            for text, size, counts in codes
        ]
    return ("[" + ",\n".join(f"{{{text}}}" for text in texts) + "]\n").encode()


def read_results(path: Path, truth: GroundTruth) -> DetectionTable:
    """Read boxes or masks from a file in the form of COCO's results, in the order of the images.

    If the file has masks only, the boxes are those around the masks.

    Args:
        path: of the file.
        truth: of the same set.

    Raises:
        DataError: the file has another content, or belongs to another set.
        ConfigError: it has masks, and pycocotools is not installed.
    """
    index_of = {number: index for index, number in enumerate(truth.image_ids.tolist())}
    label_of = {number: label for label, number in enumerate(truth.category_ids.tolist())}
    try:
        rows = json.loads(path.read_bytes())
        images, labels = _look_up(rows, "image_id", index_of), _look_up(rows, "category_id", label_of)
        scores = np.array([row["score"] for row in rows], np.float64)
        masks = _read_codes(rows, truth, images) if rows and "segmentation" in rows[0] else None
        boxes = _read_boxes(rows, truth, images, masks)
    except (OSError, ValueError, TypeError, KeyError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else error
        raise DataError(f"{path}: not COCO's results of this set ({reason})") from error
    order = np.argsort(images, kind="stable")
    codes = None if masks is None else tuple(masks[row] for row in order.tolist())
    return DetectionTable(images[order], boxes[order], scores[order], labels[order], codes)


def _look_up(rows: Sequence[Any], key: str, numbers: dict[int, int]) -> np.ndarray:
    unknown = next((row[key] for row in rows if row[key] not in numbers), None)
    if unknown is not None:
        raise ValueError(f"the set has no {key} {unknown}")
    return np.array([numbers[row[key]] for row in rows], np.int64)


def _read_codes(rows: Sequence[Any], truth: GroundTruth, images: np.ndarray) -> list[bytes]:
    for row, size in zip(rows, truth.sizes[images].tolist(), strict=True):
        if row["segmentation"]["size"] != size:
            raise ValueError(f"the mask of image_id {row['image_id']} is of {row['segmentation']['size']}, not {size}")
    return [row["segmentation"]["counts"].encode("ascii") for row in rows]


def _read_boxes(
    rows: Sequence[Any], truth: GroundTruth, images: np.ndarray, masks: Sequence[bytes] | None
) -> np.ndarray:
    """Return float64 (D, 4), x y width height."""
    if masks is None or "bbox" in rows[0]:
        return np.array([row["bbox"] for row in rows], np.float64).reshape(-1, 4)
    sizes = truth.sizes[images].tolist()
    codes = [{"size": size, "counts": counts} for size, counts in zip(sizes, masks, strict=True)]
    return np.array([import_masks().toBbox(code) for code in codes], np.float64).reshape(-1, 4)
