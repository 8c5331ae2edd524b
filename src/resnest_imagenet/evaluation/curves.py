"""The curves of training runs, from their events: losses and figures over the epochs."""

from collections.abc import Sequence

import numpy as np

from resnest_imagenet.evaluation.charts import Chart, Line, paint_lines, style_of
from resnest_imagenet.evaluation.events import TOP1, Event, name_metric
from resnest_imagenet.evaluation.score import title_metric
from resnest_imagenet.evaluation.step_reports import StepReports, count_steps_per_epoch

TOP5, LOSS = "top5", "loss"
BUCKETS = 400  # of a curve: about the pixels of a chart's width
MARKERS = 40  # of a curve, at most


def thin(x: np.ndarray, y: np.ndarray, buckets: int = BUCKETS) -> np.ndarray:
    """Choose the points of a curve that can be seen: the first, the last, the lowest and the highest of each bucket.

    This is M4 (Jugel et al., M4: A Visualization-Oriented Time Series Data Aggregation, VLDB 2014, section 4.2): a line
    through these points covers the same pixels as the line through all of them, where a bucket is a column of pixels.

    Args:
        x: (N,), finite; points of a bucket follow each other.
        y: (N,); what is not finite is a gap, and is kept where a bucket begins or ends with it.
        buckets: into which the range of x is divided.

    Returns:
        Positions of the points, int64, ascending.
    """
    if len(x) <= 4 * buckets:
        return np.arange(len(x))
    bucket = np.floor((x - x.min()) * (buckets / max(np.ptp(x), 1e-300)))
    starts = np.flatnonzero(np.diff(bucket, prepend=np.nan) != 0)
    ends = np.append(starts[1:], len(x))
    kept = [starts, ends - 1]
    drawn = np.where(np.isfinite(y), y, np.nan)
    segment = np.repeat(np.arange(len(starts)), ends - starts)
    for extreme in (np.fmin, np.fmax):
        positions = np.flatnonzero(drawn == extreme.reduceat(drawn, starts)[segment])
        _, firsts = np.unique(segment[positions], return_index=True)
        kept.append(positions[firsts])
    return np.unique(np.concatenate(kept))


class RunCurves:
    """The events of a run, as lines over its epochs."""

    def __init__(self, name: str, steps: StepReports, evaluations: Sequence[Event]) -> None:
        """Take the events.

        Args:
            name: of the run.
            steps: its reports about steps, in order.
            evaluations: its evaluations, in order.
        """
        self.name, self.steps, self.evaluations = name, steps, evaluations
        self.metric = name_metric(evaluations[-1]) if evaluations else ""
        self._per_epoch = count_steps_per_epoch(steps, evaluations)

    def draw_steps(self, key: str, number: int, name: str = "", factor: float = 1) -> Line:
        """Return a value of the training's reports; `number` chooses the style."""
        kept = thin(self.steps["step"], self.steps[key])
        x, y = self.steps["step"][kept] / self._per_epoch, self.steps[key][kept] * factor
        return Line(name or self.name, x.tolist(), y.tolist(), style_of(number) | {"marker": "", "linestyle": "-"})

    def draw_evaluations(self, key: str, number: int, name: str = "") -> Line | None:
        """Return a value of the evaluations; None if they do not have it."""
        points = [(event["epoch"], event[key]) for event in self.evaluations if type(event.get(key)) in (int, float)]
        if not points:
            return None
        x, y = np.array(points, dtype=np.float64).T
        kept = thin(x, y)
        style = style_of(number) | {"markevery": 1 + (len(kept) - 1) // MARKERS}
        return Line(name or self.name, x[kept].tolist(), y[kept].tolist(), style)


def chart_losses(runs: Sequence[RunCurves]) -> Chart:
    """Return the losses of training and, where they were measured, of validation."""
    lines: list[Line | None] = []
    for number, run in enumerate(runs):
        prefix = f"{run.name}: " if len(runs) > 1 else ""
        lines.append(run.draw_steps(LOSS, number, f"{prefix}training"))
        # A run alone has a colour for each part; several runs have one each.
        style = number if len(runs) > 1 else 1
        lines.append(run.draw_evaluations(LOSS, style, f"{prefix}validation"))
    return _chart("Loss", runs, "loss", lines)


def chart_figures(runs: Sequence[RunCurves], metric: str) -> Chart:
    """Return the figure by which the best network is chosen, after each epoch; top-1 has top-5 beside it."""
    chosen = [(number, run) for number, run in enumerate(runs) if run.metric == metric]
    title = title_metric(metric)
    if metric != TOP1:
        lines = [run.draw_evaluations(metric, number) for number, run in chosen]
        return _chart(f"{title} after each epoch", runs, name_unit(metric), lines)
    lines = []
    for number, run in chosen:
        prefix = f"{run.name}: " if len(chosen) > 1 else ""
        lines.append(run.draw_evaluations(TOP1, number, f"{prefix}top-1"))
        top5 = run.draw_evaluations(TOP5, number if len(chosen) > 1 else 1, f"{prefix}top-5")
        if top5 and min(top5.y) < 100:  # of five classes or fewer it is always 100
            lines.append(Line(top5.name, top5.x, top5.y, {**top5.style, "linestyle": ":"}))
    return _chart("Accuracy after each epoch", runs, "accuracy, %", lines)


def name_unit(metric: str) -> str:
    """Return the name of a metric with its unit."""
    title = title_metric(metric)
    return metric if title == metric else f"{title} %"


def chart_steps(runs: Sequence[RunCurves], key: str, title: str, y: str, factor: float = 1) -> Chart:
    """Return another value of the training's reports."""
    return _chart(title, runs, y, [run.draw_steps(key, number, "", factor) for number, run in enumerate(runs)])


def _chart(title: str, runs: Sequence[RunCurves], y: str, lines: Sequence[Line | None]) -> Chart:
    # The length of an epoch is known from an evaluation.
    x = "epoch" if any(run.evaluations for run in runs) else "step"
    shown = [line for line in lines if line is not None]
    return Chart(title, x, y, lambda axes: paint_lines(axes, shown))
