"""A report's sections about detection: AP by class and size, precision and recall, errors, the worst images."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from PIL import Image

from resnest_imagenet.errors import ConfigError, UserError
from resnest_imagenet.evaluation.box_files import ALL_CLASSES, SHOWN, BoxFiles, ClassRow
from resnest_imagenet.evaluation.box_pictures import draw_detections, make_box_palette
from resnest_imagenet.evaluation.boxes import RECALLS
from resnest_imagenet.evaluation.charts import paint_bars, paint_percentages, render_chart
from resnest_imagenet.evaluation.detection_errors import MATCHING, MISSED, TOUCHING, Outcome
from resnest_imagenet.evaluation.worst_images import NamedBoxes, WorstImage, WorstImages, find_worst_images
from resnest_imagenet.models.cost import count_rcnn
from resnest_imagenet.models.zoo import list_models
from resnest_imagenet.reports.page import (
    FIGURE_SPACE,
    LONG,
    arrange,
    render_bar,
    render_figure,
    render_lines,
    render_table,
    render_views,
)
from resnest_imagenet.reports.runs import Run
from resnest_imagenet.weights.detection import DETECTION, read_options

CURVES = 7  # largest number of classes with their own curves
SIDE = 480  # long side of a picture, in pixels
ENLARGED = 4  # largest enlargement of a picture, which makes names readable
_CORRECT = Outcome.CORRECT.name.lower()
# The figures of a run that are shown, with their headings; a class has all but the first.
_SHOWN = {
    "ap": "AP",
    "ap50": "AP50",
    "ap75": "AP75",
    "ap_small": "small",
    "ap_medium": "medium",
    "ap_large": "large",
    "ar100": "AR100",
}
_KINDS = {"box": "Boxes", "mask": "Masks"}
# The meaning of each kind of error. Source: Bolya et al., TIDE (ECCV 2020).
_MEANINGS = {
    "background": f"no object has an IoU above {TOUCHING:g} with it",
    "localisation": f"an object of its class has an IoU of {TOUCHING:g} to {MATCHING:g} with it",
    "class": f"an object of another class has an IoU of at least {MATCHING:g} with it",
    "duplicate": "its object has a detection with a higher score",
    "both": f"an object of another class has an IoU of {TOUCHING:g} to {MATCHING:g} with it",
    MISSED: "an object without a detection, and without an error of localisation or class",
}


def is_detector(run: Run) -> bool:
    """Return whether a run trains a detector."""
    return run.config.get("train.task") == DETECTION


def view_images(run: Run) -> WorstImages | str | None:
    """Read the worst images of a run, or return in one line why there are none; None for another task.

    Args:
        run: of `read_run`.
    """
    if run.boxes is None:
        return None
    root, json, images = (run.config.get(f"data.{name}") for name in ("root", "val_json", "val_dir"))
    try:
        if not isinstance(root, str) or not all(isinstance(place, str | None) for place in (json, images)):
            raise ConfigError("config.yaml does not name the data set")
        return find_worst_images(run.boxes, root, json, images)
    except UserError as error:
        return str(error)


def count_cost_of_detector(run: Run) -> tuple[int, int, str] | None:
    """Return a detector's parameters, its multiply-adds and their image size; None if the configuration is incomplete.

    The multiply-adds are those of an image of the evaluation's largest size, with 1000 proposals and 100 masks.
    """
    config = run.config
    if run.model not in list_models():
        return None
    recipe, protocol = (
        {name.removeprefix(prefix): value for name, value in config.items() if name.startswith(prefix)}
        for prefix in ("train.", "protocol.")
    )
    try:
        longest, short_side = protocol["longest"], protocol["short_side"]
        height, width = (-(-side // 32) * 32 for side in (min(short_side, longest), longest))
        stages = count_rcnn(run.model, config["model.num_classes"], (height, width), **read_options(recipe, protocol))
    except (KeyError, TypeError, ValueError):
        return None
    multiply_adds = sum(stage.multiply_adds for stage in stages)
    return sum(stage.parameters for stage in stages), multiply_adds, f"{height}x{width}"


def render_precision(runs: Sequence[Run]) -> Markup:
    """Return a table of COCO's figures in the best evaluation of each run; "" if no run has any."""
    rows: list[tuple[object, ...]] = []
    for run in filter(is_detector, runs):
        if not run.evaluations:
            continue
        best = max(run.evaluations, key=lambda event: event[run.metric])
        for kind in _KINDS:
            if f"{kind}_ap" in best:
                figures = [
                    _format(best.get(f"{kind}_{name}")) if _has_objects(run.boxes, kind, name) else ""
                    for name in _SHOWN
                ]
                rows.append((run.name, kind, *figures, best.get("count", ""), best.get("protocol", "")))
    head = ["run", "of", *_SHOWN.values(), "images", "protocol"]
    return render_table(head, rows, "ends-in-text") if rows else Markup()


def _has_objects(files: BoxFiles | None, kind: str, name: str) -> bool:
    """Return whether the set has objects for a figure; true without files, since a run's log has 0 in both cases."""
    return files is None or any(row.values[name] is not None for row in files.ap if row.kind == kind)


def render_boxes(files: BoxFiles, worst: WorstImages | str | None) -> Markup:
    """Return the sections about a detector's errors: by class, size and kind, and the worst images.

    Args:
        files: about the best detector.
        worst: of `view_images`; None: without pictures.
    """
    parts = []
    for kind in files.kinds:
        rows = [row for row in files.ap if row.kind == kind]
        title = _KINDS.get(kind, kind)
        parts += [
            Markup("<h3>{}: AP by class and size of the object, %</h3>{}").format(title, _render_classes(rows)),
            arrange([*_draw_curves(files, kind, rows), _draw_gains(files, kind)]),
            Markup("<h3>{}: kinds of errors</h3>{}").format(title, _render_errors(files, kind)),
        ]
    if worst is not None:
        parts.append(Markup("<h3>The worst images</h3>{}").format(_render_worst(files, worst)))
    return Markup().join(parts)


def _format(value: Any) -> str:
    return f"{value:.2f}" if isinstance(value, int | float) else ""


def _render_classes(rows: Sequence[ClassRow]) -> Markup:
    """Return a table with a bar for the AP of each class, the highest first, its other figures and its objects."""
    lines = []
    for row in sorted(rows, key=lambda row: -1.0 if row.values["ap"] is None else row.values["ap"], reverse=True):
        ap = row.values["ap"]
        bar = "absent" if ap is None else render_bar(ap / 100, f"{ap:.2f}".rjust(5, FIGURE_SPACE))
        figures = (row.values[name] for name in _SHOWN if name != "ap")
        counts = (f"{row.values[name] or 0:,.0f}" for name in ("objects", "detections"))
        lines.append((row.name, bar, *map(_format, figures), *counts))
    return render_table(("class", *_SHOWN.values(), "objects", "detections"), lines, is_long=len(lines) > LONG)


def _draw_curves(files: BoxFiles, kind: str, rows: Sequence[ClassRow]) -> Iterator[Markup]:
    """Yield charts of precision against recall: averaged over the classes, and for the classes with most objects."""
    names = [row.name for row in rows if (kind, "0.50", row.name) in files.curves]
    means = {
        "IoU .50": "0.50",
        "IoU .75": "0.75",
        "mean of .50 to .95": "mean",
    }
    averaged = {
        title: np.mean([files.curves[kind, iou, name] for name in names], axis=0)
        for title, iou in means.items()
        if names
    }
    title = _KINDS.get(kind, kind)
    yield _draw_lines(f"{title}: mean over the classes", averaged)
    objects = {row.name: row.values["objects"] or 0 for row in rows}
    largest = sorted(names, key=lambda name: -objects[name])[:CURVES]
    which = "each class" if len(largest) == len(names) else f"the {len(largest)} classes with the most objects"
    yield _draw_lines(f"{title}: {which}, IoU .50", {name: files.curves[kind, "0.50", name] for name in largest})


def _draw_lines(title: str, curves: dict[str, np.ndarray]) -> Markup:
    recalls = 100 * np.array(RECALLS)
    return render_chart(title, "recall, %", "precision, %", lambda axes: paint_percentages(axes, recalls, curves))


def _list_gains(files: BoxFiles, kind: str) -> ClassRow:
    """Return the row with the AP50 of all classes, and the points that each kind of error costs."""
    (row,) = [row for row in files.errors if (row.kind, row.name) == (kind, ALL_CLASSES)]
    return row


def _draw_gains(files: BoxFiles, kind: str) -> Markup:
    gains = _list_gains(files, kind)
    costs = {name: gains.values[name] or 0 for name in _MEANINGS}
    title = f"{_KINDS.get(kind, kind)}: what each kind of error costs"
    of_all = f"points of AP50, which is {_format(gains.values[_CORRECT])}"
    return render_chart(title, of_all, "", lambda axes: paint_bars(axes, costs))


def _render_errors(files: BoxFiles, kind: str) -> Markup:
    """Return a table with the number and the cost of each kind of error, and a table of errors by class."""
    rows = [row for row in files.errors if row.kind == kind and row.name != ALL_CLASSES]
    gains = _list_gains(files, kind)
    totals = {name: sum(row.values[name] or 0 for row in rows) for name in (_CORRECT, *_MEANINGS)}
    num_detections = max(sum(total for name, total in totals.items() if name != MISSED), 1)

    def share(name: str) -> str:
        return "" if name == MISSED else f"{100 * totals[name] / num_detections:.1f}"

    of_all = [(_CORRECT, f"{totals[_CORRECT]:,.0f}", share(_CORRECT), "", "the first that has found its object")]
    of_all += [
        (name, f"{totals[name]:,.0f}", share(name), _format(gains.values[name]), meaning)
        for name, meaning in _MEANINGS.items()
    ]
    head = ["", "number", "% of the detections", "points of AP50", "what it is"]
    names = (_CORRECT, *_MEANINGS)
    by_class = [(row.name, *(f"{row.values[name] or 0:,.0f}" for name in names)) for row in rows]
    table = render_table(["class", *names], by_class)
    text = (
        f"At an IoU of {MATCHING:g}, of all detections that count. Points of AP50: how much higher it would be without "
        "this kind alone."
    )
    details = Markup('<details><summary>by class</summary><div class="tall">{}</div></details>').format(table)
    return Markup("<p>{}</p>{}{}").format(text, render_table(head, of_all, "ends-in-text"), details)


def _render_worst(files: BoxFiles, worst: WorstImages | str) -> Markup:
    if isinstance(worst, str):
        return Markup("<p>No pictures: {}</p>").format(worst)
    imperfect = sum(row.num_faults > 0 for row in files.images)
    text = (
        f"{len(worst.images)} of {imperfect:,} that are not all right, those with the most objects that are not found "
        f"and detections that are wrong first. Detections with a score of at least {SHOWN:g}, as the best network had "
        "them in its evaluation."
    )
    palette = make_box_palette(len(worst.classes))
    figures = Markup().join(_render_image(image, worst.classes, palette) for image in worst.images)
    return Markup("<p>{}</p>{}").format(text, figures)


def _render_image(image: WorstImage, classes: Sequence[str], palette: np.ndarray) -> Markup:
    row = image.row
    title = f"{Path(row.file).name}: {row.correct} of {row.objects} objects found, wrong detections: {row.wrong}"
    kinds = ", ".join(f"{count} {name}" for name, count in image.wrong)
    caption = render_lines([title], "right")
    if image.pixels is None or image.truth is None or image.detections is None:
        return render_figure(Markup(), [caption, f"(no picture: {image.fault})"])
    views = [
        (name, _draw_view(image.pixels, boxes, classes, palette))
        for name, boxes in (("truth", image.truth), ("found", image.detections))
    ]
    return render_views(views, [caption, render_lines([kinds])])


def _draw_view(pixels: np.ndarray, boxes: NamedBoxes, classes: Sequence[str], palette: np.ndarray) -> Image.Image:
    """Return a picture with objects or detections; each has its name, and its kind of error if it is wrong."""
    height, width = pixels.shape[:2]
    scale = min(ENLARGED, SIDE / max(height, width))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    picture = np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS))
    masks = None if boxes.masks is None else [np.asarray(Image.fromarray(mask).resize(size)) for mask in boxes.masks]
    names = [classes[label] for label in boxes.labels.tolist()]
    titles = [f"{name} ({note})" if note else name for name, note in zip(names, boxes.notes, strict=True)]
    scales = np.array([size[0] / width, size[1] / height] * 2)
    # Each box gets its own entry in names and colours, so that a name can have a note.
    numbers = np.arange(len(titles))
    drawn = draw_detections(picture, boxes.boxes * scales, numbers, titles, palette[boxes.labels], boxes.scores, masks)
    return Image.fromarray(drawn)
