"""A comparison as a page for a browser."""

from pathlib import Path

import numpy as np
from markupsafe import Markup

from resnest_imagenet.inference.compare import Comparison, describe_pairs, describe_protocols, describe_verdict
from resnest_imagenet.reports.page import (
    FIGURE_SPACE,
    LONG,
    render_bar,
    render_lines,
    render_page,
    render_picture,
    render_table,
)

PICTURES = 60  # at most


def render_comparison(comparison: Comparison) -> str:
    """Return the HTML: the verdict, a bar for each class, and the images on which the networks disagree."""
    images = comparison.images
    text = f"{len(images):,} images of {images.root}; {'; '.join(describe_protocols(comparison))}."
    lines = Markup().join(Markup("<p>{}</p>").format(line) for line in (text, *describe_pairs(comparison)))
    head = Markup("<p class=verdict>{}.</p>{}").format(describe_verdict(comparison), lines)
    sections = {
        "All images": _render_totals(comparison),
        "Classes": _render_classes(comparison),
        "Where they disagree": _render_pictures(comparison),
    }
    return render_page(" against ".join(comparison.names), head, sections)


def _render_totals(comparison: Comparison) -> Markup:
    columns = {
        "network": comparison.names,
        "top-1 %": [f"{100 * share:.2f}" for share in comparison.is_right.mean(1)],
        "top-5 %": [f"{100 * share:.2f}" for share in comparison.in_top5.mean(1)],
        "mean true p": [f"{p:.4f}" for p in comparison.probabilities.mean(1)],
    }
    if not comparison.has_top5:
        del columns["top-5 %"]
    return render_table(columns, zip(*columns.values(), strict=True))


def _render_classes(comparison: Comparison) -> Markup:
    """Return a row for each class: how many of its images each network predicts correctly, and the difference.

    The difference is that of the first network to the second; of more networks, the largest one.
    """
    labels, names = comparison.images.labels, comparison.names
    rows = []
    for label, title in enumerate(comparison.titles):
        of_class = labels == label
        count = np.count_nonzero(of_class)
        if not count:  # all of its images were skipped
            continue
        right = 100 * comparison.is_right[:, of_class].mean(1)
        true_p = comparison.probabilities[:, of_class].mean(1)
        difference = right[0] - right[1] if len(names) == 2 else np.ptp(right)
        bars = [render_bar(share / 100, f"{share:.1f}".rjust(5, FIGURE_SPACE)) for share in right.tolist()]
        cells = [cell for bar, p in zip(bars, true_p.tolist(), strict=True) for cell in (bar, f"{p:.4f}")]
        rows.append((float(difference), (title, f"{count:,}", _draw_difference(difference), *cells)))
    rows.sort(key=lambda row: -row[0])
    heads = [head for name in names for head in (f"{name}: right, %", "true p")]
    what = f"{names[0]} minus {names[1]}" if len(names) == 2 else "largest difference"
    text = (
        f"Sorted by {what}, in percent of the class's images. True p is the mean probability that a network gives to "
        "the true class."
    )
    head = ["class", "images", "difference", *heads]
    table = render_table(head, [row for _, row in rows], is_long=len(rows) > LONG)
    return Markup("<p>{}</p>{}").format(text, table)


def _draw_difference(difference: float) -> Markup:
    """Return a bar from the middle to the right for a value above 0, to the left below."""
    width = abs(difference) / 2
    left = 50 if difference > 0 else 50 - width
    bar = '<span class="difference"><i class="{}" style="left:{:.1f}%;width:{:.1f}%"></i></span> {}'
    number = f"{difference:+.1f}".rjust(6, FIGURE_SPACE)
    return Markup(bar).format("minus" if difference < 0 else "plus", left, width, number)


def _render_pictures(comparison: Comparison) -> Markup:
    disagreements = comparison.disagreements
    pictures = Markup().join(_picture(comparison, index) for index in disagreements[:PICTURES].tolist())
    shown = f"{min(PICTURES, len(disagreements))} of {len(disagreements)}, the largest differences first"
    text = shown if pictures else "Nowhere: all networks are right, or all are wrong, on every image."
    return Markup('<p>{}</p><div class="pictures">{}</div>').format(text, pictures)


def _picture(comparison: Comparison, index: int) -> Markup:
    images = comparison.images
    truth = comparison.titles[images.labels[index]]
    lines = [
        render_lines([f"{name}: {predicted}, true p {p:.3f}"], "right" if right else "")
        for name, predicted, p, right in zip(
            comparison.names,
            comparison.predicted[:, index],
            comparison.probabilities[:, index],
            comparison.is_right[:, index],
            strict=True,
        )
    ]
    title = render_lines([f"{truth}: {Path(images.name(index)).name}"])
    return render_picture(images.read(index), truth, [title, *lines])
