"""Runs as a page for a browser: what came of them, their curves and mistakes, and how they were configured."""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from itertools import starmap, zip_longest
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml
from markupsafe import Markup

from resnest_imagenet.compute import name_device
from resnest_imagenet.distributed import choose_device
from resnest_imagenet.evaluation.charts import LEGEND, Chart, render_chart, sample_style
from resnest_imagenet.evaluation.curves import RunCurves, chart_figures, chart_losses, chart_steps, name_unit
from resnest_imagenet.evaluation.events import TOP1
from resnest_imagenet.evaluation.latency import measure_latency
from resnest_imagenet.evaluation.worst_images import WorstImages
from resnest_imagenet.files import require_writable, write_atomically
from resnest_imagenet.inference.worst_scenes import WorstScenes
from resnest_imagenet.models.cost import count_cost
from resnest_imagenet.models.zoo import build_model, list_models
from resnest_imagenet.reports.box_sections import (
    count_cost_of_detector,
    is_detector,
    render_boxes,
    render_precision,
    view_images,
)
from resnest_imagenet.reports.cards import describe_progress, list_cards
from resnest_imagenet.reports.image_sections import render_accuracy, render_mistakes
from resnest_imagenet.reports.page import arrange, render, render_page, render_table
from resnest_imagenet.reports.region_sections import count_cost_of_run, render_regions, render_scores, view_scenes
from resnest_imagenet.reports.runs import Run, list_differences, list_figures
from resnest_imagenet.reports.table3 import PAPER
from resnest_imagenet.reports.table3_chart import is_placed, render_table3
from resnest_imagenet.weights.segmentation import SEGMENTATION

CARDS = 4  # runs that have cards; more would push the table off the screen
CROP = 224  # pixels, where a run does not name the crop it was trained at


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
    if latency and any(map(is_placed, runs)):
        names = {row.model for row in PAPER} | {result.model for run in runs for _, result in list_figures(run)}
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
        "Runs": _render_summary(runs),
        "Training": _render_curves(runs),
        "Accuracy": render_accuracy(classifiers),
        "Intersection over union": render_scores(runs),
        "Average precision, %": render_precision(runs),
        **{
            f"{run.name}: where it errs": _render_mistakes(
                run, (worst or {}).get(run.name, ()), (images or {}).get(run.name)
            )
            for run in runs
        },
        f"Beside the paper's Table 3, at {crop} pixels": render_table3(classifiers, crop, latency, device),
        "Configuration": _render_configuration(runs),
        "Environment": _render_environment(runs),
    }
    title = " and ".join(run.name for run in runs) if len(runs) < 4 else f"{len(runs)} runs"
    cards = [(run.name, list_cards(run)) for run in runs] if len(runs) <= CARDS else []
    return render_page(title, render("cards.html", runs=cards), sections)


def _is_classifier(run: Run) -> bool:
    # The metric alone is not enough: a folder without events has the default, top1.
    return run.metric == TOP1 and not run.regions and not run.boxes


def _render_summary(runs: list[Run]) -> Markup:
    metrics = list(dict.fromkeys(run.metric for run in runs))
    rows = []
    count = cache(count_cost)  # many runs are of one network
    for run in runs:
        cost, best = _count_cost(run, count), run.best
        unit = f" {name_unit(run.metric)}" if len(metrics) > 1 else ""
        rows.append(
            [
                run.name,
                run.model or "",
                run.config.get("train.recipe", ""),
                f"{cost[0] / 1e6:.2f}" if cost else "",
                f"{cost[1] / 1e9:.2f} at {cost[2]}" if cost else "",
                describe_progress(run),
                f"{best[run.metric]:.2f}{unit} (epoch {best['epoch']})" if best else "",
                f"{run.evaluations[-1][run.metric]:.2f}{unit}" if best else "",
                f"{np.median(run.steps['images_per_s']):,.0f}" if run.steps else "",
                run.status.get("state", ""),
            ]
        )
    best_head = f"best {name_unit(metrics[0])}" if len(metrics) == 1 else "best"
    head = ["run", "model", "recipe", "M params", "GFLOPs", "epochs", best_head, "last", "images/s", "state"]
    return render_table(head, rows)


def _count_cost(run: Run, count: Callable[[str, int, int], tuple[int, int]]) -> tuple[int, int, str] | None:
    """Return the parameters, the multiply-adds and the size they are for; None if the folder does not name the network.

    They are for the crop of the training, or for the size of a detector's evaluation.
    """
    if is_detector(run):
        return count_cost_of_detector(run)
    crop = run.config.get("train.crop")
    crop = crop if type(crop) is int and crop > 0 else CROP
    if run.config.get("train.task") == SEGMENTATION:
        of_scenes = count_cost_of_run(run, crop)
        return of_scenes and (*of_scenes, str(crop))
    if run.model not in list_models():
        return None
    num_classes = run.config.get("model.num_classes")
    return *count(run.model, crop, num_classes if type(num_classes) is int else 1000), str(crop)


def _render_configuration(runs: list[Run]) -> Markup:
    described = [run for run in runs if run.config]
    parts = []
    if len(described) > 1:
        rows = [[name, *(_to_text(value) for value in values)] for name, values in list_differences(described)]
        head = ["option", *(run.name for run in described)]
        table = render_table(head, rows, "text")
        parts.append(Markup("<p>What differs:</p>") + table if rows else Markup("<p>No differences.</p>"))
    for run in described:
        text = yaml.safe_dump(run.config, sort_keys=False)
        parts.append(Markup("<details><summary>all of {}</summary><pre>{}</pre></details>").format(run.name, text))
    return Markup().join(parts)


def _render_curves(runs: list[Run]) -> Markup:
    """Return the loss and the figures large, the other curves small below them."""
    runs = [run for run in runs if run.steps]
    # The length of an epoch is known from an evaluation. Without any evaluation, runs are drawn over their steps.
    runs = [run for run in runs if run.evaluations] or runs
    if not runs:
        return Markup()
    curves = [RunCurves(run.name, run.steps, run.evaluations) for run in runs]
    metrics = dict.fromkeys(of_run.metric for of_run in curves if of_run.metric)
    large = [chart_losses(curves), *(chart_figures(curves, metric) for metric in metrics)]
    small = [
        chart_steps(curves, "lr", "Learning rate", "learning rate"),
        chart_steps(curves, "images_per_s", "Throughput", "images/s"),
        chart_steps(curves, "data_wait", "Wait for data", "% of the time", 100),
    ]
    note = ""
    if any("loss" in event for run in runs for event in run.evaluations):
        note = (
            "Loss in training is the mean since the last report, with the recipe's mixing and smoothing; in validation "
            "the plain cross entropy."
        )
    key = _render_key(curves) if 2 * len(curves) > LEGEND else Markup()  # a run has two lines in a large chart
    parts = key + arrange([_render(chart, (5.4, 3.4)) for chart in large], "large")
    return parts + Markup("<p>{}</p>").format(note) + arrange([_render(chart, (4.4, 2.6)) for chart in small])


def _render_key(curves: Sequence[RunCurves]) -> Markup:
    """Return the names of runs with their colours and marks."""
    names = (
        Markup('<span style="white-space:nowrap"><span style="color:{}">{}</span> {}</span> ').format(
            *sample_style(number), run.name
        )
        for number, run in enumerate(curves)
    )
    note = "Marks are on the lines of evaluations: validation, and top-5, which is dotted."
    return Markup("<p>{}</p><p>{}</p>").format(Markup().join(names), note)


def _render(chart: Chart, size: tuple[float, float]) -> Markup:
    return render_chart(chart.title, chart.x, chart.y, chart.paint, size)


def _render_mistakes(run: Run, worst: Sequence[WorstScenes | str], images: WorstImages | str | None) -> Markup:
    scenes = zip_longest(run.regions, worst[: len(run.regions)])
    boxes = [render_boxes(run.boxes, images)] if run.boxes else []
    return Markup().join([*map(render_mistakes, run.predictions), *starmap(render_regions, scenes), *boxes])


def _render_environment(runs: list[Run]) -> Markup:
    runs = [run for run in runs if run.environment]
    names = dict.fromkeys(name for run in runs for name in run.environment)
    rows = [[name, *(_to_text(run.environment.get(name)) for run in runs)] for name in names]
    return render_table(["", *(run.name for run in runs)], rows, "text") if runs else Markup()


def _to_text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {part}" for name, part in value.items())
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
