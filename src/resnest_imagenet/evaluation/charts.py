"""Draws charts: as SVG in a page's colours, or as pixels."""

import io
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure

# Visible on white and on black, and distinct for colour-blind people; styles and markers differ too.
_COLOURS = ("#3b8fd6", "#d8722c", "#2a9d7f", "#c05fb5", "#9a8320", "#d9534f", "#808080")
_STYLES = ("-", "--", "-.", ":")
_MARKERS = "osD^vPX"
_SIGNS = "●■◆▲▼✚✖"  # like the markers
INK = "#010203"  # replaced by the page's text colour
LEGEND = 12  # lines that a legend names; more names would cover the chart
NAMED, NUMBERED = 60, 24  # a confusion matrix has names and numbers up to this number of classes
_TAG = re.compile(r"<[^<>]+>")
_LONG_NUMBER = re.compile(r"(?<![\w#.])(-?\d+\.\d\d)\d+")


@dataclass(frozen=True)
class Chart:
    """A chart: its title, the labels of its axes with their units, and what draws into the axes."""

    title: str
    x: str
    y: str
    paint: Callable[[Axes], object]


@dataclass(frozen=True)
class Line:
    """A line of a chart: its name, its points, and its style, for `Axes.plot`."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    style: Mapping[str, Any]


def style_of(number: int) -> dict[str, Any]:
    """Return the style of the n-th line, for `Axes.plot`."""
    names = ("color", "linestyle", "marker")
    choices = zip(names, (_COLOURS, _STYLES, _MARKERS), strict=True)
    return {name: values[number % len(values)] for name, values in choices}


def sample_style(number: int) -> tuple[str, str]:
    """Return the colour and a sign like the marker of the n-th line."""
    return _COLOURS[number % len(_COLOURS)], _SIGNS[number % len(_SIGNS)]


def render_chart(
    title: str, x: str, y: str, paint: Callable[[Axes], object], size: tuple[float, float] = (4.4, 3.0)
) -> Markup:
    """Draw a chart; return it as a <figure>.

    Args:
        title: of the chart.
        x: label of the horizontal axis, with its unit.
        y: label of the vertical axis, with its unit.
        paint: draws into the axes.
        size: in inches, of 72 pixels on a wide screen.
    """
    # Text stays text: small, searchable, in the page's font. The salt makes the ids of each chart unique.
    style: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": title, "font.family": "sans-serif"}
    parts = ("text.color", "xtick.color", "ytick.color", "axes.edgecolor", "axes.labelcolor")
    with _drawn([Chart(title, x, y, paint)], size, style | dict.fromkeys(parts, INK)) as figure:
        file = io.StringIO()
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=metadata)
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    # Without a size of its own, the chart takes the page's width.
    svg = re.sub(r' (?:width|height)="[\d.]+pt"', "", svg, count=2)
    # Half of the bytes would be digits of places that no screen can show. Texts between the tags stay.
    svg = _TAG.sub(lambda tag: _LONG_NUMBER.sub(r"\1", tag[0]), svg)
    label = escape(f"{title}: {y} against {x}")
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{label}" ', 1)
    return Markup(f'<figure class="chart">{svg}</figure>')  # matplotlib escapes texts


def draw_chart(title: str, x: str, y: str, paint: Callable[[Axes], object], size: tuple[float, float]) -> np.ndarray:
    """Draw a chart as `render_chart` does, in black on white; return uint8 (100 * height, 100 * width, 3)."""
    return draw_charts([Chart(title, x, y, paint)], size)


def draw_charts(charts: Sequence[Chart], size: tuple[float, float]) -> np.ndarray:
    """Draw charts side by side, in black on white; return uint8 (100 * height, 100 * width, 3).

    Args:
        charts: the left one first.
        size: of all together, in inches.
    """
    with _drawn(charts, size, {}) as figure:
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        return np.asarray(canvas.buffer_rgba())[..., :3].copy()


@contextmanager
def _drawn(charts: Sequence[Chart], size: tuple[float, float], style: dict[Any, Any]) -> Iterator[Figure]:
    # Names of files and classes may have a dollar sign: they are not formulas.
    common: dict[Any, Any] = {"font.size": 9, "axes.titlesize": 10, "legend.fontsize": 8, "text.parse_math": False}
    with matplotlib.rc_context({**common, **style}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # the font lacks a script: each character is drawn as a box
        figure = Figure(figsize=size, layout="constrained", dpi=100)
        for number, chart in enumerate(charts, 1):
            axes = figure.add_subplot(1, len(charts), number, xlabel=chart.x, ylabel=chart.y, title=chart.title)
            axes.grid(color=matplotlib.rcParams["text.color"], alpha=0.15, linewidth=0.6)
            axes.set_axisbelow(True)
            chart.paint(axes)
            if axes.get_legend_handles_labels()[0]:
                axes.legend(framealpha=0).set_in_layout(False)  # long names must not shrink the axes
        yield figure


def paint_lines(axes: Axes, lines: Sequence[Line]) -> None:
    """Draw lines; a single one needs no legend, and more than LEGEND have none."""
    for line in lines:
        label = {"label": line.name} if 1 < len(lines) <= LEGEND else {}
        axes.plot(line.x, line.y, **{"linewidth": 1.2, "markersize": 3, **line.style, **label})


def paint_confusions(axes: Axes, confusions: np.ndarray, names: Sequence[str], in_percent: bool = False) -> None:
    """Draw the share of the images, or pixels, of each true class (rows) that was predicted as each class (columns).

    The colour scale is the square root of the share, so that one wrong image of 50 is visible.

    Args:
        axes: to draw into.
        confusions: images or pixels, (K, K).
        names: of the classes.
        in_percent: write the share into the cells, if it is at least 0.5 %, not the number: pixels are millions.
    """
    shares = confusions / np.maximum(confusions.sum(1, keepdims=True), 1)
    # With few classes, draw cells with sharp edges; with many, do not blend cells that share a pixel.
    interpolation: Any = "nearest" if len(names) <= NAMED else "none"
    visible = np.ma.masked_equal(shares, 0)  # a cell without images has no colour
    image = axes.imshow(visible, cmap="Blues", norm=PowerNorm(0.5, 0, 1), interpolation=interpolation, aspect="equal")
    axes.grid(visible=False)
    figure = axes.get_figure()
    assert figure
    scale = figure.colorbar(image, ticks=(0, 0.02, 0.1, 0.25, 0.5, 1), shrink=0.7)
    scale.set_label("share of the true class")
    if len(names) <= NAMED:
        short = list(map(_shorten, names))
        axes.set_xticks(range(len(names)), short, rotation=90)
        axes.set_yticks(range(len(names)), short)
    for row, column in np.argwhere(confusions) if len(names) <= NUMBERED else ():
        share = shares[row, column]
        if in_percent and share < 0.005:
            continue
        number = f"{100 * share:.0f}" if in_percent else confusions[row, column]
        colour = "white" if share > 0.3 else "black"
        axes.text(column, row, number, ha="center", va="center", color=colour, fontsize=8)


def _shorten(name: str) -> str:
    """Return a name as one short line that a chart can draw."""
    return " ".join(name.encode(errors="replace").decode().split())[:20]


def paint_percentages(axes: Axes, x: np.ndarray, lines: Mapping[str, np.ndarray]) -> None:
    """Draw lines from 0 to 100 %.

    Args:
        axes: to draw into.
        x: (n,), of the points.
        lines: (n,) each, by name.
    """
    for number, (name, y) in enumerate(lines.items()):
        axes.plot(x, y, label=_shorten(name), linewidth=1.2, **style_of(number) | {"marker": ""})
    axes.set_ylim(-2, 102)  # so that a line at 0 or 100 is visible


def paint_bars(axes: Axes, values: Mapping[str, float]) -> None:
    """Draw a bar for each value, the first on top."""
    axes.barh(list(values), list(values.values()), color=_COLOURS[0])
    axes.invert_yaxis()
