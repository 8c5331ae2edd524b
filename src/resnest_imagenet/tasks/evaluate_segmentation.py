"""Measures how well a trained network segments a data set."""

from pathlib import Path

import numpy as np

from resnest_imagenet import distributed
from resnest_imagenet.data.plan import plan_evaluation
from resnest_imagenet.data.scene_loader import SceneLoader
from resnest_imagenet.data.scenes import Scenes
from resnest_imagenet.errors import DataError
from resnest_imagenet.evaluation.operators import choose_attention
from resnest_imagenet.evaluation.region_files import encode_scenes
from resnest_imagenet.evaluation.regions import Regions, measure_regions
from resnest_imagenet.evaluation.results import RegionResult, RegionResults
from resnest_imagenet.files import write_atomically
from resnest_imagenet.inference.options import check_arguments
from resnest_imagenet.inference.segmenter import USUAL_SIDE, Segmenter
from resnest_imagenet.supervision import EVALUATING, supervise


def evaluate_segmenter(
    segmenter: Segmenter, scenes: Scenes, *, precision: str = "fp32", workers: int | None = None
) -> Regions:
    """Evaluate a network by its protocol, each scene once; under torchrun the ranks share the scenes.

    Args:
        segmenter: of `open_segmenter`.
        scenes: of `open_scenes`.
        precision: fp32, bf16 or fp16.
        workers: number of the loader's processes; None: this process's cores, at most 8.

    Raises:
        DataError: a scene cannot be used, or the classes are not the network's.
        UserError: another user's error, in one line.
    """
    arguments = check_arguments(precision=precision, workers=workers)
    if segmenter.classes != scenes.classes:
        raise DataError(
            f"{scenes.images.root}: its {len(scenes.classes)} classes are not the {len(segmenter.classes)} of "
            f"{segmenter.source}, in the same order"
        )
    num_classes, name = len(scenes.classes), scenes.images.name
    with distributed.join(segmenter.device) as ranks, supervise(ranks) as watch:
        plan = plan_evaluation(len(scenes), 1, ranks.rank, ranks.world_size)
        loader = SceneLoader(scenes, plan, None, ranks.device, arguments.workers)

        side = segmenter.protocol.crop or USUAL_SIDE
        choose_attention(segmenter.module, (1, side, side), precision, ranks)

        def before_batch(batch: int, is_everywhere: bool) -> None:
            watch.at(0, batch, EVALUATING)

        return measure_regions(
            segmenter.module, loader, ranks, segmenter.protocol, num_classes, precision, before_batch, name
        )


def write_regions(path: Path, segmenter: Segmenter, data: str, regions: Regions) -> None:
    """Write the figures of a network as JSON, for `read_all_measured`; all are percent, the IoU is by class name.

    Args:
        path: of the file.
        segmenter: the network.
        data: layout of the scenes on which it was evaluated.
        regions: its evaluation.

    Raises:
        StorageError: the file cannot be written.
    """
    weights = segmenter.weights
    result = RegionResult(
        protocol=segmenter.protocol.text,
        miou=regions.miou,
        miou_present=regions.miou_present,
        pixel_accuracy=regions.pixel_accuracy,
        count=regions.count,
        iou=dict(zip(segmenter.classes, regions.iou.tolist(), strict=True)),
    )
    results = RegionResults(
        task="segmentation",
        model=segmenter.name,
        ckpt=segmenter.source,
        data=data,
        is_average=weights.is_average,
        epoch=weights.epoch,
        training=weights.training,
        results=[result],
    )
    with write_atomically(path) as file:
        file.write(results.model_dump_json(indent=2).encode() + b"\n")


def write_scenes(path: Path, segmenter: Segmenter, scenes: Scenes, regions: Regions) -> None:
    """Write a CSV file with the correct and the labelled pixels of each scene.

    Raises:
        StorageError: the file cannot be written.
    """
    with write_atomically(path) as file:
        file.write(encode_scenes(scenes.images, [(segmenter.protocol.text, regions)]))


def format_regions(segmenter: Segmenter, regions: Regions) -> str:
    """Return a table for people: the classes by their IoU, and the means."""
    pixels = regions.matrix.sum(1)
    lines = [f"{'IoU %':>7} {'of pixels':>10}  class"]
    for label in np.argsort(-regions.iou, kind="stable").tolist():
        share = 100 * pixels[label] / max(pixels.sum(), 1)
        lines.append(f"{regions.iou[label]:>7.2f} {share:>8.2f} %  {segmenter.classes[label]}")
    lines += [
        f"mIoU {regions.miou:.2f} % of all {len(pixels)} classes, {regions.miou_present:.2f} % of the "
        f"{regions.is_present.sum()} that are present",
        f"pixel accuracy {regions.pixel_accuracy:.2f} %",
        f"{regions.count} scenes: {segmenter.protocol.text}",
    ]
    return "\n".join(lines)
