"""Charts as SVG within a page, in the colours of the page."""

import io
import re
from collections.abc import Callable
from html import escape
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Seen on white and on black, and apart by people who do not see all colours; the styles tell them apart besides.
_COLOURS = ("#3b8fd6", "#d8722c", "#2a9d7f", "#c05fb5", "#9a8320", "#d9534f", "#808080")
_STYLES = ("-", "--", "-.", ":")
_MARKERS = "osD^vPX"
INK = "#010203"  # stands for the page's own


def style_of(number: int) -> dict[str, Any]:
    """Return how the n-th of several things is drawn, for `Axes.plot`."""
    names = ("color", "linestyle", "marker")
    return {name: each[number % len(each)] for name, each in zip(names, (_COLOURS, _STYLES, _MARKERS), strict=True)}


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
    parts = ("text.color", "xtick.color", "ytick.color", "axes.edgecolor", "axes.labelcolor")
    ink: dict[Any, Any] = dict.fromkeys(parts, INK)
    # Text stays text: small, searchable, in the page's font. The salt keeps the names within one chart its own.
    style: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": title, "font.family": "sans-serif", "font.size": 9}
    with matplotlib.rc_context({**ink, **style, "axes.titlesize": 10, "legend.fontsize": 8}):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.add_subplot(xlabel=x, ylabel=y, title=title)
        axes.grid(color=INK, alpha=0.15, linewidth=0.6)
        axes.set_axisbelow(True)
        paint(axes)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(framealpha=0)
        file = io.StringIO()
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=metadata)
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    # Without a size of its own it takes the page's.
    svg = re.sub(r' (?:width|height)="[\d.]+pt"', "", svg, count=2)
    label = escape(f"{title}: {y} against {x}")
    return f'<figure class="chart">{svg.replace("<svg", f"""<svg role="img" aria-label="{label}" """, 1)}</figure>'
