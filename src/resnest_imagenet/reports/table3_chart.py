"""Runs on ImageNet beside the accuracies of the paper's Table 3."""

from collections.abc import Callable, Sequence

from markupsafe import Markup
from matplotlib.axes import Axes

from resnest_imagenet.evaluation.charts import INK, render_chart, style_of
from resnest_imagenet.evaluation.results import Measured
from resnest_imagenet.models.cost import count_cost
from resnest_imagenet.models.zoo import list_models
from resnest_imagenet.reports.page import arrange
from resnest_imagenet.reports.runs import Run, list_figures
from resnest_imagenet.reports.table3 import PAPER, PaperRow

IMAGENET = 1000  # classes


def is_placed(run: Run) -> bool:
    """Return whether a run has an accuracy on ImageNet's classes."""
    return any(result.num_classes == IMAGENET for result in run.measured)


def render_table3(runs: Sequence[Run], crop: int, latency: dict[str, float], device: str) -> Markup:
    """Return the paper's accuracies and the runs' against their cost; "" if no run has ImageNet's classes.

    Args:
        runs: of classification.
        crop: 224 or 320: the crop of Table 3's column.
        latency: seconds for one image of this crop, by network; {} for no such chart.
        device: of the latency, in words.
    """
    if not any(map(is_placed, runs)):
        return Markup()
    results = [(run, result) for run in runs for _, result in list_figures(run)]
    comparable = [
        (run, result)
        for run, result in results
        if result.crop == crop and result.tta is None and result.model in list_models()
    ]
    placed = [(run, result) for run, result in comparable if result.num_classes == IMAGENET]
    counted = _count_gflops(crop, {result.model for _, result in placed})
    x = f"GFLOPs (multiply-adds in billions) at {crop}"
    size = (5.4, 4)
    paint = _paint_places(placed, crop, counted.__getitem__)
    charts = [render_chart("Accuracy against computation", x, "top-1 %", paint, size)]
    if latency:
        in_ms = {name: 1000 * seconds for name, seconds in latency.items()}
        x = "ms for one image, fp32, batch norms folded"
        paint = _paint_places(placed, crop, in_ms.__getitem__)
        charts.append(render_chart("Accuracy against latency", x, "top-1 %", paint, size))
    notes = ["Small marks: the paper's accuracies; lines join networks of 50 and 101 layers. Stars: the runs."]
    unplaced = sorted({run.name for run, result in comparable if result.num_classes != IMAGENET})
    notes += [f"Not drawn, because their classes are not ImageNet's: {', '.join(unplaced)}."] if unplaced else []
    notes += [] if comparable else [f"No run has an accuracy at {crop} pixels."]
    notes += [f"Latency: median of 5 interleaved rounds on {device}, when this page was made."] if latency else []
    return Markup("<p>{}</p>").format(" ".join(notes)) + arrange(charts, "large")


def _paint_places(
    placed: Sequence[tuple[Run, Measured]], crop: int, cost: Callable[[str], float]
) -> Callable[[Axes], None]:
    families: dict[str, list[PaperRow]] = {}
    for row in PAPER:
        families.setdefault(row.name.replace("-50", "").replace("-101", ""), []).append(row)

    def paint(axes: Axes) -> None:
        for number, (family, rows) in enumerate(families.items()):
            x, y = [cost(row.model) for row in rows], [row.top1[crop] for row in rows]
            axes.plot(x, y, label=family, markersize=4, linewidth=1, **style_of(number) | {"linestyle": "-"})
        for run, result in placed:
            place = cost(result.model), result.top1
            axes.plot(*place, "*", color=INK, markersize=10)
            axes.annotate(run.name, place, textcoords="offset points", xytext=(6, 4), in_layout=False)

    return paint


def _count_gflops(crop: int, placed: set[str]) -> dict[str, float]:
    """Return the GFLOPs of Table 3's networks as printed; counted ones if other networks or crops are compared."""
    printed = {row.model: row.gflops for row in PAPER}
    if crop == 224 and placed <= printed.keys():
        return printed
    return {name: count_cost(name, crop)[1] / 1e9 for name in printed.keys() | placed}
