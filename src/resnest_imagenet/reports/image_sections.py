"""What a report has about classification: accuracies, calibration, classes, confusions, and the surest mistakes."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes

from resnest_imagenet.data.decoding import BadImage
from resnest_imagenet.data.source import read_named
from resnest_imagenet.evaluation.charts import paint_confusions, render_chart, style_of
from resnest_imagenet.evaluation.intervals import describe_confidence, wilson_interval
from resnest_imagenet.evaluation.mistakes import (
    calibrate,
    calibration_error,
    count_confusions,
    measure_classes,
    rank_confusions,
)
from resnest_imagenet.evaluation.predictions import Predictions
from resnest_imagenet.models.imagenet_classes import short_class_names
from resnest_imagenet.reports.page import (
    FIGURE_SPACE,
    LONG,
    arrange,
    render_bar,
    render_figure,
    render_picture,
    render_table,
)
from resnest_imagenet.reports.runs import Run, list_figures

PAIRS = 20  # of confused classes
CLASSES = 100  # with the lowest recall
PICTURES = 24  # of mistakes


def render_accuracy(runs: Sequence[Run]) -> Markup:
    """Return the accuracies of runs, how they are calibrated, and how they differ between classes; "" without runs."""
    if not runs:
        return Markup()
    rows = []
    for run in runs:
        for what, result in list_figures(run):
            low, high = wilson_interval(min(max(result.top1 / 100, 0.0), 1.0), max(result.count, 1))
            figures = (result.crop, f"{result.top1:.2f}", f"{100 * low:.1f} to {100 * high:.1f}", f"{result.count:,}")
            rows.append((run.name, what, *figures, result.num_classes, f"{result.protocol}; {result.recipe}"))
    head = ["run", "network", "crop", "top-1 %", "95 % interval", "images", "classes", "protocol and recipe"]
    table = render_table(head, rows, "ends-in-text")
    judged = [(run, predictions) for run in runs for predictions in run.predictions]
    return table + _render_calibration(judged) if judged else table


def _render_calibration(judged: Sequence[tuple[Run, Predictions]]) -> Markup:
    named = [(_name(run, predictions), predictions) for run, predictions in judged]
    charts = [
        render_chart("Calibration", "confidence", "accuracy", _paint_calibration(named)),
        render_chart("Confidences", "confidence", "% of the images", _paint_confidences(named)),
        render_chart("Recall by class", "% of the classes, the lowest first", "recall %", _paint_classes(named)),
    ]
    verdicts = Markup().join(
        Markup("<li>{}: {}, calibration error {:.3f}</li>").format(
            name, describe_confidence(predictions.evaluation), calibration_error(predictions.evaluation)
        )
        for name, predictions in named
    )
    note = Markup(
        "<p>Calibration: images in 15 bins by the probability of their likeliest class; larger marks stand for more "
        "images. The line of a well calibrated network follows the diagonal: below it the network is too sure. The "
        "error is the mean distance from it, weighted by images.</p><ul>{}</ul>"
    ).format(verdicts)
    return arrange(charts) + note


def _paint_calibration(named: Sequence[tuple[str, Predictions]]) -> Callable[[Axes], None]:
    def paint(axes: Axes) -> None:
        axes.plot([0, 1], [0, 1], color="#808080", linewidth=0.8)
        for number, (name, predictions) in enumerate(named):
            confidence, accuracy, counts = calibrate(predictions.evaluation)
            style = style_of(number)
            axes.plot(confidence, accuracy, **_label(name, named), **style | {"marker": ""}, linewidth=1.2)
            sizes = 4 + 60 * counts / counts.sum()
            axes.scatter(confidence, accuracy, sizes, style["color"], marker=style["marker"])

    return paint


def _paint_confidences(named: Sequence[tuple[str, Predictions]]) -> Callable[[Axes], None]:
    def paint(axes: Axes) -> None:
        edges = np.linspace(0, 1, 16)
        for number, (name, predictions) in enumerate(named):
            counts, _ = np.histogram(predictions.evaluation.confidence, edges)
            style, shares = style_of(number), 100 * counts / max(counts.sum(), 1)
            axes.stairs(
                shares, edges, **_label(name, named), color=style["color"], linestyle=style["linestyle"], linewidth=1.2
            )

    return paint


def _paint_classes(named: Sequence[tuple[str, Predictions]]) -> Callable[[Axes], None]:
    def paint(axes: Axes) -> None:
        for number, (name, predictions) in enumerate(named):
            confusions = count_confusions(predictions.evaluation, len(predictions.classes))
            recall = measure_classes(confusions).recall
            values = np.sort(recall[~np.isnan(recall)])
            position = np.linspace(0, 100, len(values))
            axes.plot(position, values, **_label(name, named), **style_of(number) | {"marker": ""})

    return paint


def _label(name: str, named: Sequence[tuple[str, Predictions]]) -> dict[str, Any]:
    """Return the label of a line; one line alone needs none."""
    return {"label": name} if len(named) > 1 else {}


def _name(run: Run, predictions: Predictions) -> str:
    return run.name if len(run.predictions) == 1 else f"{run.name}, {predictions.protocol}"


def render_mistakes(predictions: Predictions) -> Markup:
    """Return where a network errs: classes, pairs of classes, and images."""
    evaluation = predictions.evaluation
    titles = short_class_names(predictions.classes)
    confusions = count_confusions(evaluation, len(titles))
    wrong = np.flatnonzero(~evaluation.is_right)
    order = wrong[np.argsort(-evaluation.confidence[wrong], kind="stable")]
    pictures = list(_show_mistakes(predictions, titles, order[:PICTURES].tolist()))
    return (
        Markup("<p>{}; {:,} of {:,} images wrong.</p>").format(predictions.protocol, len(wrong), evaluation.count)
        + Markup("<h3>Classes</h3>{}").format(_render_classes(confusions, titles))
        + Markup("<h3>Most confused</h3>{}").format(_render_pairs(confusions, titles))
        + arrange([_render_matrix(confusions, titles)], "whole")
        + Markup("<h3>The surest mistakes</h3><p>{} of {:,}.</p>").format(len(pictures), len(wrong))
        + Markup('<div class="pictures">{}</div>').format(Markup().join(pictures))
    )


def _render_matrix(confusions: np.ndarray, titles: Sequence[str]) -> Markup:
    def paint(axes: Axes) -> None:
        paint_confusions(axes, confusions, titles)

    # The text has the page's size at ten classes, and about two thirds of it at sixty.
    side = min(max(6.0, 2.5 + 0.28 * len(titles)), 11.0)
    return render_chart("Confusion matrix", "predicted", "true", paint, (side, 0.9 * side))


def _render_pairs(confusions: np.ndarray, titles: Sequence[str]) -> Markup:
    of_class = np.maximum(confusions.sum(1), 1)
    pairs = [
        (titles[true], titles[predicted], count, f"{100 * count / of_class[true]:.1f}")
        for true, predicted, count in rank_confusions(confusions, PAIRS)
    ]
    return render_table(["true", "predicted", "images", "% of true"], pairs) if pairs else Markup("<p>None.</p>")


def _render_classes(confusions: np.ndarray, titles: Sequence[str]) -> Markup:
    """Return recall, precision and F1 of the classes with images, the lowest recall first, and their means."""
    figures = measure_classes(confusions)
    present = np.flatnonzero(~figures.is_absent)
    order = present[np.argsort(figures.recall[present], kind="stable")]
    rows: list[tuple[object, ...]] = [
        (
            titles[label],
            render_bar(figures.recall[label] / 100, f"{figures.recall[label]:.1f}".rjust(5, FIGURE_SPACE)),
            "never predicted" if figures.is_never_predicted[label] else f"{figures.precision[label]:.1f}",
            f"{figures.f1[label]:.1f}",
            f"{figures.images[label]:,}",
            f"{figures.predicted[label]:,}",
        )
        for label in order[:CLASSES].tolist()
    ]
    means = (
        f"recall {figures.macro_recall:.1f} %, precision {figures.macro_precision:.1f} %, F1 {figures.macro_f1:.1f} %"
    )
    text = f"Mean over {len(present):,} classes: {means}."
    if len(order) > CLASSES:
        text += f" Below: the {CLASSES} classes with the lowest recall."
    head = ["class", "recall %", "precision %", "F1 %", "images", "predicted"]
    return Markup("<p>{}</p>{}").format(text, render_table(head, rows, is_long=len(rows) > LONG))


def _show_mistakes(predictions: Predictions, titles: Sequence[str], indices: Iterable[int]) -> Iterator[Markup]:
    evaluation = predictions.evaluation
    for index in indices:
        truth, predicted = titles[evaluation.labels[index]], titles[evaluation.predicted[index]]
        file = str(predictions.files[index])
        lines = [
            Markup("<div>{}, {:.1f} %: {}</div>").format(
                truth, 100 * evaluation.true_probability[index], Path(file).name
            ),
            Markup("<div class=right>predicted: {}, {:.1f} %</div>").format(
                predicted, 100 * evaluation.confidence[index]
            ),
        ]
        try:
            yield render_picture(read_named(file), truth, lines)
        except (BadImage, OSError, RuntimeError, ValueError):  # moved or changed since
            yield render_figure(Markup(), [Markup("(no picture at {})").format(file), *lines])
