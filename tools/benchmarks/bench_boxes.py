"""COCO's average precision by both libraries: seconds of hotcoco, which evaluates each epoch, and of pycocotools.

python tools/benchmarks/bench_boxes.py [--kind box] [--images 5000] [--detections 200000] [--rounds 5] [--out FILE.json]

Objects and detections are drawn here, in numbers like those of COCO's val set: seven objects of 80 classes in an image,
and detections near them or anywhere. Each library is called as an evaluation calls it, from columns of numbers to
figures; pycocotools once, since it takes minutes. Its figures must be the same to the last digit.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np

from resnest_imagenet.evaluation.boxes import average_precision
from resnest_imagenet.evaluation.detections import DetectionTable, Kind
from resnest_imagenet.evaluation.ground_truth import GroundTruth
from resnest_imagenet.evaluation.masks import Patch, encode_patch

CLASSES, OBJECTS_PER_IMAGE = 80, 7.3
SIZE = (480, 640)
SHARE_NEAR = 0.5  # of the detections


def draw_boxes(count: int, rng: np.random.Generator) -> np.ndarray:
    """Draw boxes x y width height of all sizes, float64 (count, 4)."""
    sides = np.exp(rng.uniform(np.log(8), np.log(300), (count, 2)))
    corners = rng.uniform(0, 1, (count, 2)) * (np.array(SIZE[::-1]) - sides)
    return np.concatenate([corners, sides], 1).round(2)


def draw_truth(images: int, kind: Kind, rng: np.random.Generator) -> GroundTruth:
    """Draw the objects of a set."""
    count = int(images * OBJECTS_PER_IMAGE)
    boxes = draw_boxes(count, rng)
    return GroundTruth(
        image_ids=np.arange(images) * 7 + 1,
        sizes=np.tile(SIZE, (images, 1)),
        category_ids=np.arange(CLASSES) + 1,
        classes=tuple(map(str, range(CLASSES))),
        images=rng.integers(0, images, count),
        labels=(rng.random(count) ** 2 * CLASSES).astype(np.int64),  # some classes are frequent
        boxes=boxes,
        areas=boxes[:, 2] * boxes[:, 3] * rng.uniform(0.5, 1, count),
        crowds=rng.random(count) < 0.01,
        masks=tuple(map(draw_code, boxes)) if kind == "mask" else None,
    )


def draw_detections(truth: GroundTruth, count: int, rng: np.random.Generator) -> DetectionTable:
    """Draw detections of a set: some near an object and mostly of its class, some anywhere."""
    images, labels = rng.integers(0, len(truth.image_ids), count), rng.integers(0, CLASSES, count)
    boxes, scores = draw_boxes(count, rng), rng.random(count) ** 2
    near = np.flatnonzero(rng.random(count) < SHARE_NEAR)
    objects = rng.integers(0, len(truth), len(near))
    images[near], boxes[near] = truth.images[objects], truth.boxes[objects]
    labels[near] = np.where(rng.random(len(near)) < 0.8, truth.labels[objects], labels[near])
    boxes[near] += rng.normal(0, 0.12, (len(near), 4)) * np.tile(boxes[near, 2:], 2)
    boxes[:, 2:] = boxes[:, 2:].clip(1)
    scores[near] = rng.random(len(near))
    order = np.argsort(images, kind="stable")
    masks = None if truth.masks is None else tuple(map(draw_code, boxes[order]))
    scores = scores.astype(np.float32).astype(np.float64)
    return DetectionTable(images[order], boxes[order], scores[order], labels[order], masks)


def draw_code(box: np.ndarray) -> bytes:
    """Return the code of the ellipse within a box."""
    x1, y1 = box[:2].clip(0).astype(int)
    x2, y2 = np.minimum(box[:2] + box[2:], SIZE[::-1]).astype(int)
    x, y = np.arange(x1, max(x1, x2)) + 0.5, np.arange(y1, max(y1, y2)) + 0.5
    (centre_x, centre_y), (width, height) = box[:2] + box[2:] / 2, box[2:]
    distance = ((x - centre_x) / width * 2) ** 2 + (((y - centre_y) / height * 2) ** 2)[:, None]
    return encode_patch(Patch(distance < 1, int(y1), int(x1)), SIZE)["counts"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=("box", "mask"), default="box")
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--detections", type=int, default=200_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    truth = draw_truth(args.images, args.kind, rng)
    table = draw_detections(truth, args.detections, rng)
    seconds: list[float] = []
    for _ in range(args.rounds + 1):
        started = time.perf_counter()
        ours = average_precision(table, truth, args.kind)
        seconds.append(time.perf_counter() - started)
    seconds = seconds[1:]  # the first warms up
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    started = time.perf_counter()
    reference = average_precision(table, truth, args.kind, "pycocotools")
    reference_seconds = time.perf_counter() - started
    report = {
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores",
        "versions": {name: version(name) for name in ("hotcoco", "pycocotools", "numpy")},
        "kind": args.kind,
        "images": args.images,
        "objects": len(truth),
        "detections": len(table),
        "hotcoco_seconds": [round(value, 3) for value in seconds],
        "pycocotools_seconds": round(reference_seconds, 1),
        "ratio": round(reference_seconds / statistics.median(seconds), 1),
        "peak_mib": {"hotcoco": round(peak), "both": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)},
        "figures": ours.figures,
        "equal": ours.figures == reference.figures and bool((ours.precision == reference.precision).all()),
    }
    print(
        f"{report['machine']}: {args.images:,} images, {len(truth):,} objects, {len(table):,} detections, {args.kind}"
    )
    print(f"hotcoco      {statistics.median(seconds):8.2f} s  ({min(seconds):.2f} to {max(seconds):.2f})")
    print(f"pycocotools  {reference_seconds:8.2f} s  {report['ratio']} times as long")
    print(f"figures {'equal' if report['equal'] else 'DIFFER'}: AP {ours.figures['ap']:.4f} %")
    if args.out:
        args.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
