"""The sections of a report about segmentation: IoU by class, confusions, and the worst scenes."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from markupsafe import Markup

from resnest_imagenet.data.scenes import VOID
from resnest_imagenet.errors import UserError
from resnest_imagenet.evaluation.charts import paint_confusions, render_chart
from resnest_imagenet.evaluation.mistakes import rank_confusions
from resnest_imagenet.evaluation.region_files import NamedRegions
from resnest_imagenet.inference.worst_scenes import WorstScene, WorstScenes, find_worst_scenes
from resnest_imagenet.models.cost import count_deeplab
from resnest_imagenet.models.zoo import list_models
from resnest_imagenet.reports.page import LONG, arrange, render_bar, render_figure, render_lines, render_table
from resnest_imagenet.reports.runs import Run
from resnest_imagenet.reports.scene_strips import render_legend, render_strip

PAIRS = 20  # of confused classes
PAIRS_OF_SCENE = 3


def view_scenes(run: Run, device: torch.device) -> list[WorstScenes | str]:
    """Segment the worst scenes of each of a run's evaluations; return them, or a line about why there are none.

    Args:
        run: with `regions`; its best network segments the scenes.
        device: of the computation.
    """
    views: list[WorstScenes | str] = []
    for evaluation in run.regions:
        try:
            assert run.folder is not None
            checkpoint = run.folder / "checkpoints/best.pt"
            kind, part = (str(run.config.get(f"data.{name}")) for name in ("kind", "val_dir"))
            views.append(find_worst_scenes(evaluation, checkpoint, kind, part, device=device))
        except UserError as error:
            views.append(str(error))
    return views


def count_cost_of_run(run: Run, crop: int) -> tuple[int, int] | None:
    """Return the parameters and multiply-adds of a run's DeepLabV3; None if its configuration is incomplete."""
    config = run.config
    if run.model not in list_models():
        return None
    try:
        options = {name: config[f"train.{name}"] for name in ("output_stride", "rates")}
        options |= {"channels": config["train.head_channels"], "auxiliary": config["train.auxiliary_weight"] > 0}
        stages = count_deeplab(run.model, config["model.num_classes"], crop, **options)
    except (KeyError, TypeError, ValueError):
        return None
    return sum(stage.parameters for stage in stages), sum(stage.multiply_adds for stage in stages)


def render_scores(runs: Sequence[Run]) -> Markup:
    """Return a table of the means over classes and pixels; "" if no run has any."""
    rows = [
        (
            run.name,
            *(f"{value:.2f}" for value in (regions.miou, regions.miou_present, regions.pixel_accuracy)),
            f"{regions.count:,}",
            len(evaluation.classes),
            int(regions.is_present.sum()),
            evaluation.protocol,
        )
        for run in runs
        for evaluation in run.regions
        for regions in (evaluation.regions,)
    ]
    head = ["run", "mIoU %", "of present classes %", "pixels right %", "scenes", "classes", "present", "protocol"]
    return render_table(head, rows, "ends-in-text") if rows else Markup()


def render_regions(evaluation: NamedRegions, worst: WorstScenes | str | None) -> Markup:
    """Return the section on a network's mistakes: classes, pairs of classes, and scenes.

    Args:
        evaluation: of the best network.
        worst: of `view_scenes`; None for no pictures.
    """
    regions, classes = evaluation.regions, evaluation.classes
    labelled = int(regions.matrix.sum())
    text = f"{evaluation.protocol}; {labelled - int(regions.correct.sum()):,} of {labelled:,} labelled pixels wrong."
    html = Markup("<p>{}</p><h3>IoU by class</h3>{}").format(text, _render_classes(evaluation))
    pairs = Markup("<div><h3>Most confused</h3>{}</div>").format(_render_pairs(regions.matrix, classes))
    html += arrange([_render_matrix(regions.matrix, classes), pairs], "large")
    return (
        html if worst is None else html + Markup("<h3>The worst scenes</h3>{}").format(_render_worst(evaluation, worst))
    )


def _render_classes(evaluation: NamedRegions) -> Markup:
    """Return a bar for the IoU of each class, the highest first, and a bar for its pixels in the ground truth."""
    regions = evaluation.regions
    pixels = regions.matrix.sum(1)
    shares = pixels / max(int(pixels.sum()), 1)
    largest = max(float(shares.max(initial=0)), 1e-9)
    rows = [
        (
            evaluation.classes[label],
            render_bar(regions.iou[label] / 100, f"{regions.iou[label]:.2f}") if pixels[label] else "absent",
            render_bar(shares[label] / largest, f"{100 * shares[label]:.2f}"),
            f"{pixels[label]:,}",
        )
        for label in np.lexsort((-regions.iou, ~regions.is_present)).tolist()
    ]
    head = ("class", "IoU %", "true pixels, %", "true pixels")
    return render_table(head, rows, is_long=len(rows) > LONG)


def _render_matrix(matrix: np.ndarray, classes: Sequence[str]) -> Markup:
    return render_chart(
        "Confusion matrix, % of the true pixels",
        "predicted",
        "true",
        lambda axes: paint_confusions(axes, matrix, classes, in_percent=True),
        (5.5, 5),
    )


def _render_pairs(matrix: np.ndarray, classes: Sequence[str]) -> Markup:
    of_class, total = matrix.sum(1), max(int(matrix.sum()), 1)
    rows = [
        (
            classes[true],
            classes[predicted],
            f"{count:,}",
            f"{100 * count / of_class[true]:.1f}",
            f"{100 * count / total:.2f}",
        )
        for true, predicted, count in rank_confusions(matrix, PAIRS)
    ]
    return render_table(["true", "predicted", "pixels", "% of true", "% of all"], rows)


def _render_worst(evaluation: NamedRegions, worst: WorstScenes | str) -> Markup:
    if isinstance(worst, str):
        return Markup("<p>No pictures: {}</p>").format(worst)
    labels = {VOID for scene in worst.scenes if scene.truth is not None and (scene.truth == VOID).any()}
    for scene in worst.scenes:
        if scene.image is not None and scene.truth is not None:
            labels |= set(np.unique(scene.image.mask).tolist()) | set(np.unique(scene.truth).tolist())
    strips = Markup().join(_render_scenes(evaluation.classes, worst))
    imperfect = int((evaluation.regions.correct < evaluation.regions.labelled).sum())
    text = (
        f"{len(worst.scenes)} of {imperfect:,} scenes with wrong pixels, the lowest share of right pixels first. The "
        f"predictions were made for this page, in fp32: {worst.protocol}."
    )
    return Markup("<p>{}</p>{}{}").format(text, render_legend(evaluation.classes, worst.palette, labels), strips)


def _render_scenes(classes: Sequence[str], worst: WorstScenes) -> Iterator[Markup]:
    for scene in worst.scenes:
        title = render_lines([f"{Path(scene.file).name}: {scene.accuracy:.1f} % of the pixels right"], "right")
        if scene.image is None or scene.truth is None:
            yield render_figure(Markup(), [title, f"(no picture: {scene.fault})"])
            continue
        masks = [("truth", scene.truth), ("prediction", scene.image.mask)]
        caption = [title, render_lines([_describe_confusions(scene, classes)])]
        yield render_strip(scene.image.pixels, masks, worst.palette, caption)


def _describe_confusions(scene: WorstScene, classes: Sequence[str]) -> str:
    """Return a line about the largest confusions in the picture of a scene."""
    assert scene.image is not None and scene.truth is not None
    is_labelled = scene.truth != VOID
    cells = scene.truth[is_labelled].astype(np.int64) * len(classes) + scene.image.mask[is_labelled]
    matrix = np.bincount(cells, minlength=len(classes) ** 2).reshape(len(classes), -1)
    total = max(int(matrix.sum()), 1)
    pairs = [
        f"{classes[true]} taken for {classes[predicted]}: {100 * count / total:.1f} %"
        for true, predicted, count in rank_confusions(matrix, PAIRS_OF_SCENE)
    ]
    return f"{'; '.join(pairs)}{' of the pixels' if pairs else ''}"
