"""Runs as a page for a browser: configuration, results and mistakes."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from html import escape
from itertools import starmap, zip_longest
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml
from matplotlib.axes import Axes

from resnest_imagenet.compute import name_device
from resnest_imagenet.data.decoding import BadImage
from resnest_imagenet.data.source import read_named
from resnest_imagenet.distributed import choose_device
from resnest_imagenet.evaluation.charts import INK, paint_confusions, render_chart, style_of
from resnest_imagenet.evaluation.events import TOP1
from resnest_imagenet.evaluation.latency import measure_latency
from resnest_imagenet.evaluation.mistakes import calibrate, calibration_error, count_confusions, rank_confusions
from resnest_imagenet.evaluation.predictions import Predictions
from resnest_imagenet.evaluation.results import Measured
from resnest_imagenet.evaluation.score import title_metric
from resnest_imagenet.evaluation.worst_images import WorstImages
from resnest_imagenet.files import require_writable, write_atomically
from resnest_imagenet.inference.worst_scenes import WorstScenes
from resnest_imagenet.models.cost import count_cost
from resnest_imagenet.models.imagenet_classes import short_class_names
from resnest_imagenet.models.zoo import build_model, list_models
from resnest_imagenet.reports.box_sections import (
    count_cost_of_detector,
    is_detector,
    render_boxes,
    render_precision,
    view_images,
)
from resnest_imagenet.reports.page import render_page, render_picture, render_table
from resnest_imagenet.reports.region_sections import count_cost_of_run, render_regions, render_scores, view_scenes
from resnest_imagenet.reports.runs import Run, list_differences
from resnest_imagenet.reports.table3 import PAPER, PaperRow
from resnest_imagenet.weights.segmentation import SEGMENTATION

PAIRS = 20  # of confused classes
CLASSES = 20  # with the lowest accuracy
PICTURES = 24  # of mistakes


def write_report(
    runs: list[Run], out: str | Path, crop: Literal[224, 320] = 224, latency: bool = True, device: str = "auto"
) -> None:
    """Write runs as a page for a browser.

    Args:
        runs: of `find_runs`.
        out: the file.
        crop: the crop of Table 3's column with which the runs are compared.
        latency: whether to measure the networks of Table 3 and of the runs on this machine, for a chart.
        device: of that measurement, and of the segmentation of the worst scenes: as of `distributed.choose_device`.

    Raises:
        ConfigError: the file cannot be written, or there is no such device.
    """
    require_writable(Path(out), "out")
    measured_on = choose_device(device)
    seconds: dict[str, float] = {}
    if latency and any(map(_is_classifier, runs)):
        names = {row.model for row in PAPER} | {result.model for run in runs for result in run.measured}
        networks = {name: build_model(name) for name in sorted(names.intersection(list_models()))}
        seconds = measure_latency(networks, crop, 1, measured_on, rounds=5)
    worst = {run.name: view_scenes(run, measured_on) for run in runs}
    images = {run.name: view_images(run) for run in runs}
    page = render_report(runs, crop, seconds, name_device(measured_on), worst, images)
    # File names return to their bytes when the page is written; other lone surrogates are replaced.
    page = re.sub("[\ud800-\udc7f\udd00-\udfff]", "\ufffd", page)
    with write_atomically(Path(out)) as file:
        file.write(page.encode(errors="surrogateescape"))


def render_report(
    runs: list[Run],
    crop: int,
    latency: dict[str, float],
    device: str,
    worst: Mapping[str, Sequence[WorstScenes | str]] | None = None,
    images: Mapping[str, WorstImages | str | None] | None = None,
) -> str:
    """Return the HTML.

    Args:
        runs: at least one.
        crop: 224 or 320: the crop of Table 3's column with which the runs are compared.
        latency: seconds for one image of this crop, by network; {} for no such chart.
        device: of the latency, in words.
        worst: of `view_scenes`, by run; None for no pictures of scenes.
        images: of `view_images`, by run; None for no pictures of detections.
    """
    classifiers = list(filter(_is_classifier, runs))
    sections = {
        "Configuration": _render_configuration(runs),
        "Training": _render_curves(runs),
        "Accuracy": _render_accuracy(classifiers),
        "Intersection over union": render_scores(runs),
        "Average precision, %": render_precision(runs),
        f"Beside the paper's Table 3, at {crop} pixels": _render_table3(classifiers, crop, latency, device),
        **{
            f"{run.name}: where it errs": _render_mistakes(
                run, (worst or {}).get(run.name, ()), (images or {}).get(run.name)
            )
            for run in runs
        },
        "Environment": _render_environment(runs),
    }
    body = "\n".join(f"<section><h2>{escape(title)}</h2>{html}</section>" for title, html in sections.items() if html)
    return render_page(
        " and ".join(run.name for run in runs) if len(runs) < 4 else f"{len(runs)} runs", _render_summary(runs) + body
    )


def _is_classifier(run: Run) -> bool:
    # The metric alone is not enough: a folder without events has the default, top1.
    return run.metric == TOP1 and not run.regions and not run.boxes


def _render_summary(runs: list[Run]) -> str:
    metrics = list(dict.fromkeys(run.metric for run in runs))
    rows = []
    for run in runs:
        cost = _count_cost(run)
        best = max(run.evaluations, key=lambda event: event[run.metric], default=None)
        unit = f" {_name_metric(run.metric)}" if len(metrics) > 1 else ""
        rows.append(
            [
                run.name,
                run.model or "",
                run.config.get("train.recipe", ""),
                f"{cost[0] / 1e6:.2f}" if cost else "",
                f"{cost[1] / 1e9:.2f}{cost[2]}" if cost else "",
                _describe_progress(run) if best else "",
                f"{best[run.metric]:.2f}{unit} (epoch {best['epoch']})" if best else "",
                f"{run.evaluations[-1][run.metric]:.2f}{unit}" if best else "",
                f"{np.median([event['images_per_s'] for event in run.steps]):,.0f}" if run.steps else "",
                run.status.get("state", ""),
            ]
        )
    cost_heads = ["M params", "GFLOPs" if all(map(is_detector, runs)) else "GFLOPs at 224"]
    best_head = f"best {_name_metric(metrics[0])}" if len(metrics) == 1 else "best"
    head = ["run", "model", "recipe", *cost_heads, "epochs", best_head, "last", "images/s", "state"]
    return render_table(head, rows)


def _count_cost(run: Run) -> tuple[int, int, str] | None:
    """Return the parameters and multiply-adds; None if the folder does not name the network.

    They are for 224 pixels, or for the size of a detector's evaluation, which the last value names.
    """
    if is_detector(run):
        of_detector = count_cost_of_detector(run)
        return of_detector and (*of_detector[:2], f" at {of_detector[2]}")
    if run.config.get("train.task") == SEGMENTATION:
        of_scenes = count_cost_of_run(run, 224)
        return of_scenes and (*of_scenes, "")
    return (*count_cost(run.model, 224), "") if run.model in list_models() else None


def _describe_progress(run: Run) -> str:
    """Return the epochs before a run's last evaluation, or the steps if the run counts steps."""
    last, steps = run.evaluations[-1], run.config.get("train.steps")
    if steps is not None:
        return f"{last['epoch']} ({last['step']} of {steps} steps)"
    return f"{last['epoch']} of {run.config.get('train.epochs', '?')}"


def _name_metric(metric: str) -> str:
    """Return a report's name for the value of an evaluation."""
    title = title_metric(metric)
    return metric if title == metric else f"{title} %"


def _render_configuration(runs: list[Run]) -> str:
    described = [run for run in runs if run.config]
    parts = []
    if len(described) > 1:
        rows = [[name, *(_to_text(value) for value in values)] for name, values in list_differences(described)]
        head = ["option", *(run.name for run in described)]
        parts.append("<p>What differs:</p>" + render_table(head, rows, "text") if rows else "<p>No differences.</p>")
    for run in described:
        text = escape(yaml.safe_dump(run.config, sort_keys=False))
        parts.append(f"<details><summary>all of {escape(run.name)}</summary><pre>{text}</pre></details>")
    return "".join(parts)


def _render_curves(runs: list[Run]) -> str:
    def draw_steps(name: str, factor: float = 1) -> Callable[[Axes], None]:
        def paint(axes: Axes) -> None:
            for number, run in enumerate(runs):
                epochs = [event["step"] / run.steps_per_epoch for event in run.steps]
                values = [event[name] * factor for event in run.steps]
                axes.plot(epochs, values, label=run.name, linewidth=1.2, **style_of(number) | {"marker": ""})

        return paint

    def draw_evaluations(metric: str) -> Callable[[Axes], None]:
        def paint(axes: Axes) -> None:
            for number, run in enumerate(runs):
                points = [(event["epoch"], event[metric]) for event in run.evaluations if run.metric == metric]
                if points:
                    epochs, values = zip(*points, strict=True)
                    axes.plot(epochs, values, label=run.name, markersize=3, linewidth=1.2, **style_of(number))

        return paint

    runs = [run for run in runs if run.steps]
    # The length of an epoch is known from an evaluation. Without any evaluation, runs are drawn over their steps.
    runs = [run for run in runs if run.evaluations] or runs
    if not runs:
        return ""
    x = "epoch" if runs[0].evaluations else "step"
    charts = [
        render_chart("Training loss", x, "loss", draw_steps("loss")),
        render_chart("Learning rate", x, "learning rate", draw_steps("lr")),
        render_chart("Throughput", x, "images/s", draw_steps("images_per_s")),
        render_chart("Wait for data", x, "% of the time", draw_steps("data_wait", 100)),
    ]
    metrics = dict.fromkeys(run.metric for run in runs if run.evaluations)
    for place, metric in enumerate(metrics, 1):
        title = f"{'Accuracy' if metric == TOP1 else _name_metric(metric).removesuffix(' %')} after each epoch"
        charts.insert(place, render_chart(title, "epoch", _name_metric(metric), draw_evaluations(metric)))
    return _arrange(charts)


def _render_accuracy(runs: list[Run]) -> str:
    if not runs:
        return ""
    rows = [(run.name, *_describe_result(result)) for run in runs for result in run.measured]
    table = render_table(["run", "crop", "top-1 %", "images", "classes", "recipe", "protocol"], rows)
    judged = [(run, predictions) for run in runs for predictions in run.predictions]

    def draw_calibration(axes: Axes) -> None:
        axes.plot([0, 1], [0, 1], color="#808080", linewidth=0.8)
        for number, (run, predictions) in enumerate(judged):
            confidence, accuracy, _ = calibrate(predictions.evaluation)
            label = f"{_name(run, predictions)}: error {calibration_error(predictions.evaluation):.3f}"
            axes.plot(confidence, accuracy, label=label, markersize=3, **style_of(number))

    def draw_classes(axes: Axes) -> None:
        for number, (run, predictions) in enumerate(judged):
            values = np.sort(100 * _accuracy_by_class(predictions))
            position = np.linspace(0, 100, len(values))
            axes.plot(position, values, label=_name(run, predictions), **style_of(number) | {"marker": ""})

    if not judged:
        return table
    charts = [
        render_chart("Calibration", "confidence", "accuracy", draw_calibration),
        render_chart("Accuracy by class", "% of the classes, the worst first", "top-1 %", draw_classes),
    ]
    note = """<p>Calibration: images in 15 bins by the probability of their likeliest class. The line of a well
calibrated network follows the diagonal. The error is the mean distance from it, weighted by images.</p>"""
    return table + _arrange(charts) + note


def _describe_result(result: Measured) -> tuple[object, ...]:
    top1, count = f"{result.top1:.2f}", f"{result.count:,}"
    return result.crop, top1, count, result.num_classes, result.recipe, result.protocol


def _render_table3(runs: list[Run], crop: int, latency: dict[str, float], device: str) -> str:
    if not runs:
        return ""
    families: dict[str, list[PaperRow]] = {}
    for row in PAPER:
        families.setdefault(row.name.replace("-50", "").replace("-101", ""), []).append(row)
    results = [(run, result) for run in runs for result in run.measured]
    comparable = [
        (run, result)
        for run, result in results
        if result.crop == crop and result.tta is None and result.model in list_models()
    ]
    placed = [(run, result) for run, result in comparable if result.num_classes == 1000]

    def draw(cost: Callable[[str], float]) -> Callable[[Axes], None]:
        def paint(axes: Axes) -> None:
            for number, (family, rows) in enumerate(families.items()):
                x, y = [cost(row.model) for row in rows], [row.top1[crop] for row in rows]
                axes.plot(x, y, label=family, markersize=4, linewidth=1, **style_of(number) | {"linestyle": "-"})
            for run, result in placed:
                place = cost(result.model), result.top1
                axes.plot(*place, "*", color=INK, markersize=10)
                axes.annotate(run.name, place, textcoords="offset points", xytext=(6, 4), in_layout=False)

        return paint

    counted = _count_gflops(crop, {result.model for _, result in placed})
    x = f"GFLOPs (multiply-adds in billions) at {crop}"
    size = (5.4, 4)
    charts = [render_chart("Accuracy against computation", x, "top-1 %", draw(counted.__getitem__), size)]
    if latency:
        in_ms = {name: 1000 * seconds for name, seconds in latency.items()}
        x = "ms for one image, fp32, batch norms folded"
        charts.append(render_chart("Accuracy against latency", x, "top-1 %", draw(in_ms.__getitem__), size))
    notes = ["Small marks: the paper's accuracies; lines join networks of 50 and 101 layers. Stars: the runs."]
    unplaced = sorted({run.name for run, result in comparable if result.num_classes != 1000})
    notes += [f"Not drawn, because their classes are not ImageNet's: {', '.join(unplaced)}."] if unplaced else []
    notes += [] if comparable else [f"No run has an accuracy at {crop} pixels."]
    notes += [f"Latency: median of 5 interleaved rounds on {device}, when this page was made."] if latency else []
    return f"<p>{escape(' '.join(notes))}</p>" + _arrange(charts, wide=True)


def _count_gflops(crop: int, placed: set[str]) -> dict[str, float]:
    """Return the GFLOPs of Table 3's networks as printed; counted ones if other networks or crops are compared."""
    printed = {row.model: row.gflops for row in PAPER}
    if crop == 224 and placed <= printed.keys():
        return printed
    return {name: count_cost(name, crop)[1] / 1e9 for name in printed.keys() | placed}


def _render_mistakes(run: Run, worst: Sequence[WorstScenes | str], images: WorstImages | str | None) -> str:
    scenes = zip_longest(run.regions, worst[: len(run.regions)])
    boxes = [render_boxes(run.boxes, images)] if run.boxes else []
    return "".join([*map(_render_confusions, run.predictions), *starmap(render_regions, scenes), *boxes])


def _render_confusions(predictions: Predictions) -> str:
    evaluation = predictions.evaluation
    titles = short_class_names(predictions.classes)
    confusions = count_confusions(evaluation, len(titles))
    of_class = np.maximum(confusions.sum(1), 1)

    def draw_matrix(axes: Axes) -> None:
        paint_confusions(axes, confusions, titles)

    matrix = render_chart("Confusion matrix", "predicted", "true", draw_matrix, (5.5, 5))
    pairs = [
        (titles[true], titles[predicted], count, f"{100 * count / of_class[true]:.1f}")
        for true, predicted, count in rank_confusions(confusions, PAIRS)
    ]
    accuracy = _accuracy_by_class(predictions)
    worst = np.argsort(accuracy, kind="stable")[:CLASSES]
    lowest = [(titles[label], int(of_class[label]), f"{100 * accuracy[label]:.1f}") for label in worst.tolist()]
    confused = render_table(["true", "predicted", "images", "% of true"], pairs)
    tables = [
        f"<div><h3>Most confused</h3>{confused}</div>",
        f"<div><h3>Lowest accuracy</h3>{render_table(['class', 'images', 'top-1 %'], lowest)}</div>",
    ]
    wrong = np.flatnonzero(~evaluation.is_right)
    order = wrong[np.argsort(-evaluation.confidence[wrong], kind="stable")]
    pictures = list(_show_mistakes(predictions, titles, order[:PICTURES].tolist()))
    return (
        f"<p>{escape(predictions.protocol)}; {len(wrong):,} of {evaluation.count:,} images wrong.</p>"
        + _arrange([matrix, *tables])
        + f"<h3>The surest mistakes</h3><p>{len(pictures)} of {len(wrong):,}.</p>"
        + f'<div class="pictures">{"".join(pictures)}</div>'
    )


def _show_mistakes(predictions: Predictions, titles: Sequence[str], indices: Iterable[int]) -> Iterator[str]:
    evaluation = predictions.evaluation
    for index in indices:
        truth, predicted = titles[evaluation.labels[index]], titles[evaluation.predicted[index]]
        file = str(predictions.files[index])
        lines = [
            f"<div>{escape(truth)}, {100 * evaluation.true_probability[index]:.1f} %: {escape(Path(file).name)}</div>",
            f"<div class=right>predicted: {escape(predicted)}, {100 * evaluation.confidence[index]:.1f} %</div>",
        ]
        try:
            yield render_picture(read_named(file), truth, lines)
        except (BadImage, OSError, RuntimeError, ValueError):  # moved or changed since
            yield f"<figure><figcaption>(no picture at {escape(file)}){''.join(lines)}</figcaption></figure>"


def _render_environment(runs: list[Run]) -> str:
    runs = [run for run in runs if run.environment]
    names = dict.fromkeys(name for run in runs for name in run.environment)
    rows = [[name, *(_to_text(run.environment.get(name)) for run in runs)] for name in names]
    return render_table(["", *(run.name for run in runs)], rows, "text") if runs else ""


def _accuracy_by_class(predictions: Predictions) -> np.ndarray:
    """Return the accuracy of each class, 0 to 1; 1 for a class without images."""
    labels, num_classes = predictions.evaluation.labels, len(predictions.classes)
    counts = np.bincount(labels, minlength=num_classes)
    right = np.bincount(labels, predictions.evaluation.is_right, num_classes)
    return np.where(counts > 0, right / np.maximum(counts, 1), 1.0)


def _name(run: Run, predictions: Predictions) -> str:
    return run.name if len(run.predictions) == 1 else f"{run.name}, {predictions.protocol}"


def _to_text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {part}" for name, part in value.items())
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _arrange(parts: Iterable[str], wide: bool = False) -> str:
    return f'<div class="charts{" large" if wide else ""}">{"".join(parts)}</div>'
