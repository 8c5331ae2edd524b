"""Charts: as SVG within a page, in its colours, or as pixels."""

import io
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from html import escape
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure

# Seen on white and on black, and apart by people who do not see all colours; the styles tell them apart besides.
_COLOURS = ("#3b8fd6", "#d8722c", "#2a9d7f", "#c05fb5", "#9a8320", "#d9534f", "#808080")
_STYLES = ("-", "--", "-.", ":")
_MARKERS = "osD^vPX"
INK = "#010203"  # stands for the page's own
NAMED, NUMBERED = 60, 24  # classes up to which a confusion matrix has names and numbers


def style_of(number: int) -> dict[str, Any]:
    """Return how the n-th of several things is drawn, for `Axes.plot`."""
    names = ("color", "linestyle", "marker")
    choices = zip(names, (_COLOURS, _STYLES, _MARKERS), strict=True)
    return {name: values[number % len(values)] for name, values in choices}


def render_chart(
    title: str, x: str, y: str, paint: Callable[[Axes], object], size: tuple[float, float] = (4.4, 3.0)
) -> str:
    """Draw a chart, and return it as a <figure>.

    Args:
        title: of the chart.
        x: what the horizontal axis has, with its unit.
        y: the same of the vertical one.
        paint: draws into the axes.
        size: in inches, of 72 pixels on a wide screen.
    """
    # Text stays text: small, searchable, in the page's font. The salt keeps the names within one chart its own.
    style: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": title, "font.family": "sans-serif"}
    parts = ("text.color", "xtick.color", "ytick.color", "axes.edgecolor", "axes.labelcolor")
    with _drawn(title, x, y, paint, size, style | dict.fromkeys(parts, INK)) as figure:
        file = io.StringIO()
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=metadata)
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    # Without a size of its own it takes the page's.
    svg = re.sub(r' (?:width|height)="[\d.]+pt"', "", svg, count=2)
    label = escape(f"{title}: {y} against {x}")
    return f'<figure class="chart">{svg.replace("<svg", f"""<svg role="img" aria-label="{label}" """, 1)}</figure>'


def draw_chart(title: str, x: str, y: str, paint: Callable[[Axes], object], size: tuple[float, float]) -> np.ndarray:
    """Draw a chart as `render_chart` does, in black on white; return uint8 (100 * height, 100 * width, 3)."""
    with _drawn(title, x, y, paint, size, {}) as figure:
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        return np.asarray(canvas.buffer_rgba())[..., :3].copy()


@contextmanager
def _drawn(
    title: str, x: str, y: str, paint: Callable[[Axes], object], size: tuple[float, float], style: dict[Any, Any]
) -> Iterator[Figure]:
    # Names of files and classes may have a dollar sign, and are no formulas.
    common: dict[Any, Any] = {"font.size": 9, "axes.titlesize": 10, "legend.fontsize": 8, "text.parse_math": False}
    with matplotlib.rc_context({**common, **style}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # of a script that the font lacks: a box stands for each
        figure = Figure(figsize=size, layout="constrained", dpi=100)
        axes = figure.add_subplot(xlabel=x, ylabel=y, title=title)
        axes.grid(color=matplotlib.rcParams["text.color"], alpha=0.15, linewidth=0.6)
        axes.set_axisbelow(True)
        paint(axes)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(framealpha=0).set_in_layout(False)  # long names do not push the axes away
        yield figure


def paint_confusions(axes: Axes, confusions: np.ndarray, names: Sequence[str], in_percent: bool = False) -> None:
    """Draw which share of the images, or pixels, of each class (a row) was taken for which class (a column).

    The colours rise with the square root of the share: one image of 50 that goes astray is seen.

    Args:
        axes: where.
        confusions: images or pixels, (K, K).
        names: of the classes.
        in_percent: whether the cells have the share, from 0.5 % on, and not the number: pixels are millions.
    """
    shares = confusions / np.maximum(confusions.sum(1, keepdims=True), 1)
    # Few cells are drawn with sharp edges; of many each keeps its own pixel.
    how: Any = "nearest" if len(names) <= NAMED else "none"
    seen = np.ma.masked_equal(shares, 0)  # no mark at all where there is no image
    image = axes.imshow(seen, cmap="Blues", norm=PowerNorm(0.5, 0, 1), interpolation=how, aspect="equal")
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
    """Return a name in one short line that a chart can draw."""
    return " ".join(name.encode(errors="replace").decode().split())[:20]


def paint_percentages(axes: Axes, x: np.ndarray, lines: Mapping[str, np.ndarray]) -> None:
    """Draw lines from 0 to 100 %.

    Args:
        axes: where.
        x: (n,), of their points.
        lines: (n,) each, by name.
    """
    for number, (name, y) in enumerate(lines.items()):
        axes.plot(x, y, label=_shorten(name), linewidth=1.2, **style_of(number) | {"marker": ""})
    axes.set_ylim(-2, 102)  # a line at the border is seen


def paint_bars(axes: Axes, values: Mapping[str, float]) -> None:
    """Draw a bar for each value, the first on top."""
    axes.barh(list(values), list(values.values()), color=_COLOURS[0])
    axes.invert_yaxis()
