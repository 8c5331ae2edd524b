"""Runs as a page for a browser: what they were, what they reached, where they err."""

from collections.abc import Callable, Iterable, Iterator
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from matplotlib.axes import Axes

from resnest_imagenet.data.decoding import BadImage
from resnest_imagenet.data.source import read_named
from resnest_imagenet.evaluation.charts import INK, paint_confusions, render_chart, style_of
from resnest_imagenet.evaluation.mistakes import calibrate, calibration_error, count_confusions, rank_confusions
from resnest_imagenet.evaluation.predictions import Predictions
from resnest_imagenet.models.cost import count_cost
from resnest_imagenet.models.imagenet_classes import short_class_names
from resnest_imagenet.models.zoo import list_models
from resnest_imagenet.reports.page import render_page, render_picture, render_table
from resnest_imagenet.reports.runs import Run, list_differences
from resnest_imagenet.reports.table3 import PAPER

PAIRS = 20  # of confused classes
CLASSES = 20  # with the lowest accuracy
PICTURES = 24  # of mistakes


def render_report(runs: list[Run], crop: int, latency: dict[str, float], device: str) -> str:
    """Return the HTML.

    Args:
        runs: at least one.
        crop: 224 or 320: the column of Table 3 beside which the runs are placed.
        latency: seconds for one image of this crop, by network; {} leaves that chart out.
        device: on which the latency was measured.
    """
    sections = {
        "Configuration": _render_configuration(runs),
        "Training": _render_curves(runs),
        "Accuracy": _render_accuracy(runs),
        f"Beside the paper's Table 3, at {crop} pixels": _render_table3(runs, crop, latency, device),
        **{f"{run.name}: where it errs": _render_mistakes(run) for run in runs if run.predictions},
        "Environment": _render_environment(runs),
    }
    body = "\n".join(f"<section><h2>{escape(title)}</h2>{html}</section>" for title, html in sections.items() if html)
    return render_page(
        " and ".join(run.name for run in runs) if len(runs) < 4 else f"{len(runs)} runs", _render_summary(runs) + body
    )


def _render_summary(runs: list[Run]) -> str:
    rows = []
    for run in runs:
        cost = count_cost(run.model, 224) if run.model in list_models() else None
        best = max(run.evaluations, key=lambda event: event["top1"], default=None)
        rows.append(
            [
                run.name,
                run.model or "",
                run.config.get("train.recipe", ""),
                f"{cost[0] / 1e6:.2f}" if cost else "",
                f"{cost[1] / 1e9:.2f}" if cost else "",
                f"{run.evaluations[-1]['epoch']} of {run.config.get('train.epochs', '?')}" if best else "",
                f"{best['top1']:.2f} (epoch {best['epoch']})" if best else "",
                f"{run.evaluations[-1]['top1']:.2f}" if best else "",
                f"{np.median([event['images_per_s'] for event in run.steps]):,.0f}" if run.steps else "",
                run.status.get("state", ""),
            ]
        )
    cost_heads, top1_heads = ["M params", "GFLOPs at 224"], ["epochs", "best top-1 %", "last"]
    return render_table(["run", "model", "recipe", *cost_heads, *top1_heads, "images/s", "state"], rows)


def _render_configuration(runs: list[Run]) -> str:
    described = [run for run in runs if run.config]
    parts = []
    if len(described) > 1:
        rows = [[name, *(_say(value) for value in values)] for name, values in list_differences(described)]
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

    def draw_top1(axes: Axes) -> None:
        for number, run in enumerate(runs):
            epochs, values = zip(*((event["epoch"], event["top1"]) for event in run.evaluations), strict=True)
            axes.plot(epochs, values, label=run.name, markersize=3, linewidth=1.2, **style_of(number))

    runs = [run for run in runs if run.steps]
    # How long an epoch is, is known from its evaluation; a younger run alone is drawn over its steps.
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
    if runs[0].evaluations:
        charts.insert(1, render_chart("Accuracy after each epoch", "epoch", "top-1 %", draw_top1))
    return _arrange(charts)


def _render_accuracy(runs: list[Run]) -> str:
    rows = [
        (run.name, one.crop, f"{one.top1:.2f}", f"{one.count:,}", one.num_classes, one.recipe, one.protocol)
        for run in runs
        for one in run.measured
    ]
    table = render_table(["run", "crop", "top-1 %", "images", "classes", "recipe", "protocol"], rows)
    judged = [(run, said) for run in runs for said in run.predictions]

    def draw_calibration(axes: Axes) -> None:
        axes.plot([0, 1], [0, 1], color="#808080", linewidth=0.8)
        for number, (run, said) in enumerate(judged):
            confidence, accuracy, _ = calibrate(said.evaluation)
            label = f"{_name(run, said)}: error {calibration_error(said.evaluation):.3f}"
            axes.plot(confidence, accuracy, label=label, markersize=3, **style_of(number))

    def draw_classes(axes: Axes) -> None:
        for number, (run, said) in enumerate(judged):
            values = np.sort(100 * _accuracy_by_class(said))
            position = np.linspace(0, 100, len(values))
            axes.plot(position, values, label=_name(run, said), **style_of(number) | {"marker": ""})

    if not judged:
        return table
    charts = [
        render_chart("Calibration", "confidence", "accuracy", draw_calibration),
        render_chart("Accuracy by class", "% of the classes, the worst first", "top-1 %", draw_classes),
    ]
    note = """<p>Calibration: images in 15 bins by the probability of their likeliest class; a network that knows how
sure it may be stays on the diagonal. The error is the mean distance from it, weighted by images.</p>"""
    return table + _arrange(charts) + note


def _render_table3(runs: list[Run], crop: int, latency: dict[str, float], device: str) -> str:
    families: dict[str, list[Any]] = {}
    for row in PAPER:
        families.setdefault(row.name.replace("-50", "").replace("-101", ""), []).append(row)
    known = [(run, one) for run in runs for one in run.measured if one.crop == crop and one.model in list_models()]
    placed = [(run, one) for run, one in known if one.num_classes == 1000]

    def draw(cost: Callable[[str], float]) -> Callable[[Axes], None]:
        def paint(axes: Axes) -> None:
            for number, (family, rows) in enumerate(families.items()):
                x, y = [cost(row.model) for row in rows], [row.top1[crop] for row in rows]
                axes.plot(x, y, label=family, markersize=4, linewidth=1, **style_of(number) | {"linestyle": "-"})
            for run, one in placed:
                axes.plot(cost(one.model), one.top1, "*", color=INK, markersize=10)
                axes.annotate(
                    run.name, (cost(one.model), one.top1), textcoords="offset points", xytext=(6, 4), in_layout=False
                )

        return paint

    counted = {row.model: row.gflops for row in PAPER}
    if crop != 224 or any(one.model not in counted for _, one in placed):
        counted = {name: count_cost(name, crop)[1] / 1e9 for name in {*counted, *(one.model for _, one in placed)}}
    x = f"GFLOPs (multiply-adds in billions) at {crop}"
    size = (5.4, 4)
    charts = [render_chart("Accuracy against computation", x, "top-1 %", draw(counted.__getitem__), size)]
    if latency:
        in_ms = {name: 1000 * seconds for name, seconds in latency.items()}
        x = "ms for one image, fp32, batch norms folded"
        charts.append(render_chart("Accuracy against latency", x, "top-1 %", draw(in_ms.__getitem__), size))
    notes = ["Small marks: the paper's accuracies, networks of 50 and 101 layers joined. Stars: the runs."]
    others = sorted({run.name for run, one in known if one.num_classes != 1000})
    notes += [f"Not placed, since their classes are not ImageNet's: {', '.join(others)}."] if others else []
    notes += [] if known else [f"No run has an accuracy at {crop} pixels."]
    notes += [f"Latency: median of 5 interleaved rounds on {device}, as this page was made."] if latency else []
    return f"<p>{escape(' '.join(notes))}</p>" + _arrange(charts, wide=True)


def _render_mistakes(run: Run) -> str:
    return "".join(_render_confusions(run, said) for said in run.predictions)


def _render_confusions(run: Run, said: Predictions) -> str:
    titles = short_class_names(said.classes)
    confusions = count_confusions(said.evaluation, len(titles))
    of_class = np.maximum(confusions.sum(1), 1)

    def draw_matrix(axes: Axes) -> None:
        paint_confusions(axes, confusions, titles)

    matrix = render_chart("Confusion matrix", "predicted", "true", draw_matrix, (5.5, 5))
    pairs = [
        (titles[true], titles[predicted], count, f"{100 * count / of_class[true]:.1f}")
        for true, predicted, count in rank_confusions(confusions, PAIRS)
    ]
    accuracy = _accuracy_by_class(said)
    worst = np.argsort(accuracy, kind="stable")[:CLASSES]
    lowest = [(titles[label], int(of_class[label]), f"{100 * accuracy[label]:.1f}") for label in worst.tolist()]
    confused = render_table(["true", "predicted", "images", "% of true"], pairs)
    tables = [
        f"<div><h3>Most confused</h3>{confused}</div>",
        f"<div><h3>Lowest accuracy</h3>{render_table(['class', 'images', 'top-1 %'], lowest)}</div>",
    ]
    wrong = np.flatnonzero(~said.evaluation.is_right)
    order = wrong[np.argsort(-said.evaluation.confidence[wrong], kind="stable")]
    pictures = list(_show_mistakes(said, titles, order[:PICTURES].tolist()))
    return (
        f"<p>{escape(said.protocol)}; {len(wrong):,} of {said.evaluation.count:,} images wrong.</p>"
        + _arrange([matrix, *tables])
        + f"<h3>The surest mistakes</h3><p>{len(pictures)} of {len(wrong):,}.</p>"
        + f'<div class="pictures">{"".join(pictures)}</div>'
    )


def _show_mistakes(said: Predictions, titles: list[str], indices: Iterable[int]) -> Iterator[str]:
    for index in indices:
        evaluation = said.evaluation
        truth, predicted = titles[evaluation.labels[index]], titles[evaluation.predicted[index]]
        file = str(said.files[index])
        lines = [
            f"<div>{escape(truth)}, {100 * evaluation.true_probability[index]:.1f} %: {escape(Path(file).name)}</div>",
            f"<div class=right>said: {escape(predicted)}, {100 * evaluation.confidence[index]:.1f} %</div>",
        ]
        try:
            yield render_picture(read_named(file), truth, lines)
        except (BadImage, OSError, RuntimeError, ValueError):  # moved or changed since
            yield f"<figure><figcaption>(no picture at {escape(file)}){''.join(lines)}</figcaption></figure>"


def _render_environment(runs: list[Run]) -> str:
    runs = [run for run in runs if run.environment]
    names = dict.fromkeys(name for run in runs for name in run.environment)
    rows = [[name, *(_say(run.environment.get(name)) for run in runs)] for name in names]
    return render_table(["", *(run.name for run in runs)], rows, "text") if runs else ""


def _accuracy_by_class(said: Predictions) -> np.ndarray:
    """Return the share of right images of each class; 1 for a class without images."""
    labels = said.evaluation.labels
    counts = np.bincount(labels, minlength=len(said.classes))
    right = np.bincount(labels, said.evaluation.is_right, len(said.classes))
    return np.where(counts > 0, right / np.maximum(counts, 1), 1.0)


def _name(run: Run, said: Predictions) -> str:
    return run.name if len(run.predictions) == 1 else f"{run.name}, {said.protocol}"


def _say(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {each}" for name, each in value.items())
    return " ".join(str(each) for each in value) if isinstance(value, list) else str(value)


def _arrange(parts: Iterable[str], wide: bool = False) -> str:
    return f'<div class="charts{" large" if wide else ""}">{"".join(parts)}</div>'
