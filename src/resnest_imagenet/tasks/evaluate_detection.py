"""Evaluates a trained detector on a data set."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from resnest_imagenet import distributed
from resnest_imagenet.data.coco import Instances
from resnest_imagenet.errors import DataError
from resnest_imagenet.evaluation.boxes import FIGURES, BoxScores, score_detections
from resnest_imagenet.evaluation.detections import detect_over_ranks, encode_results
from resnest_imagenet.evaluation.ground_truth import GroundTruth, open_ground_truth
from resnest_imagenet.evaluation.operators import choose_attention
from resnest_imagenet.files import write_atomically
from resnest_imagenet.inference.detector import Detector
from resnest_imagenet.inference.options import check_arguments
from resnest_imagenet.supervision import EVALUATING, supervise
from resnest_imagenet.tasks.detection import build_val_loader


def evaluate_detector(
    detector: Detector, instances: Instances, *, precision: str = "fp32", workers: int | None = None
) -> tuple[BoxScores, GroundTruth]:
    """Evaluate a detector by its protocol, each image once; under torchrun the ranks share the images.

    pycocotools, the reference, computes the figures.

    Args:
        detector: of `open_detector`.
        instances: of `open_coco` with every image, and with masks if the detector finds masks.
        precision: fp32, bf16 or fp16.
        workers: processes of the loader; None: this process's cores, at most 8.

    Returns:
        The detections with COCO's figures, and the ground truth.

    Raises:
        DataError: an image cannot be used, or the classes are not the detector's.
        UserError: for other errors that a user can cause, as one line.
    """
    arguments = check_arguments(precision=precision, workers=workers)
    if detector.classes != instances.classes:
        raise DataError(
            f"{instances.json}: its {len(instances.classes)} classes are not the {len(detector.classes)} classes of "
            f"{detector.source} in the same order: set data.val_json to a file that has these"
        )
    truth = open_ground_truth(instances, masks=detector.finds_masks)
    with distributed.join(detector.device) as ranks, supervise(ranks) as watch:
        size = (detector.protocol.short_side, detector.protocol.longest)
        choose_attention(detector.module, (1, *size), precision, ranks)
        loader = build_val_loader(instances, detector.protocol, detector.name, ranks, arguments.workers)

        def before_batch(batch: int, is_everywhere: bool) -> None:
            watch.at(0, batch, EVALUATING)

        name: Callable[[int], str] = instances.images.name
        table = detect_over_ranks(detector.module, loader, ranks, precision, before_batch, name)
    # Outside of supervision, which would take a rank for hanging: COCO's tool takes minutes without a report.
    return score_detections(table, truth, masks=detector.finds_masks, evaluator="pycocotools"), truth


def write_scores(path: Path, detector: Detector, scores: BoxScores, truth: GroundTruth) -> None:
    """Write the figures of a detector as JSON, in percent; the AP of each class is by name.

    Raises:
        StorageError: the file cannot be written.
    """
    weights = detector.weights
    per_class = {
        kind.kind: {
            name: None if math.isnan(ap) else ap
            for name, ap in zip(truth.classes, kind.per_class("ap").tolist(), strict=True)
        }
        for kind in scores.kinds
    }
    results: dict[str, Any] = {
        "task": "detection",
        "model": detector.name,
        "detector": detector.kind,
        "ckpt": detector.source,
        "is_average": weights.is_average,
        "epoch": weights.epoch,
        "training": weights.training,
        "results": [
            {
                "protocol": detector.protocol.text,
                **scores.values(),
                "count": len(truth.image_ids),
                "ap_per_class": per_class,
            }
        ],
    }
    with write_atomically(path) as file:
        file.write(json.dumps(results, indent=2).encode() + b"\n")


def write_detections(path: Path, scores: BoxScores, truth: GroundTruth) -> None:
    """Write the boxes in the form of COCO's results, and the masks into a second file beside it, NAME_masks.json.

    If a result has both, COCO's evaluation of masks uses the area of the box.

    Raises:
        StorageError: a file cannot be written.
    """
    for kind in scores.kinds:
        place = path if kind.kind == "box" else path.with_stem(f"{path.stem}_masks")
        with write_atomically(place) as file:
            file.write(encode_results(scores.detections, truth, kind.kind))


def format_scores(detector: Detector, scores: BoxScores, truth: GroundTruth) -> str:
    """Return a table for people: COCO's twelve figures."""
    kinds = scores.kinds
    lines = ["%".rjust(10) + "".join(kind.kind.rjust(8) for kind in kinds)]
    for name in FIGURES:
        cells = ["-" if (value := kind.figures[name]) is None else f"{value:.2f}" for kind in kinds]
        lines.append(name.upper().replace("_", " ").rjust(10) + "".join(cell.rjust(8) for cell in cells))
    lines.append(f"{len(truth.image_ids)} images, {len(truth)} objects: {detector.protocol.text}")
    return "\n".join(lines)
