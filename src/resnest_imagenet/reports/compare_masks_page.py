"""A comparison of masks as a page for a browser."""

from pathlib import Path

import numpy as np
from markupsafe import Markup

from resnest_imagenet.data.decoding import BadImage, decode_by_pillow
from resnest_imagenet.errors import UserError
from resnest_imagenet.inference.compare_masks import MaskComparison, describe_difference, list_classes_by_overlap
from resnest_imagenet.reports.page import LONG, render_bar, render_figure, render_lines, render_page, render_table
from resnest_imagenet.reports.scene_strips import render_legend, render_strip

PICTURES = 24  # at most


def render_mask_comparison(comparison: MaskComparison) -> str:
    """Return the HTML: the classes by their overlap, and the images whose masks differ most."""
    shown = comparison.order[:PICTURES].tolist()
    labels = {label for index in shown for label in np.unique(comparison.read_masks(index)).tolist()}
    strips = Markup().join(_render_image(comparison, index) for index in shown)
    protocols = "; ".join(
        f"{name}: {protocol}" for name, protocol in zip(comparison.names, comparison.protocols, strict=True)
    )
    number = f"{len(shown)} of {len(comparison.order):,}, the largest shares of differing pixels first."
    head = Markup("<p class=verdict>{}.</p><p>{}.</p>").format(describe_difference(comparison), protocols)
    text = Markup("<p>{}</p>").format(number if shown else "Nowhere: all masks are equal.")
    sections = {
        "Classes": _render_classes(comparison),
        "Where they differ": text + render_legend(comparison.classes, comparison.palette, labels) + strips,
    }
    return render_page(" against ".join(comparison.names), head, sections)


def _render_classes(comparison: MaskComparison) -> Markup:
    total = max(int(comparison.pixels[0].sum()), 1)
    rows = []
    for label in list_classes_by_overlap(comparison):
        overlap = comparison.overlap[label]
        shares = (f"{100 * pixels / total:.2f}" for pixels in comparison.pixels[:, label])
        rows.append((comparison.classes[label], render_bar(overlap / 100, f"{overlap:.2f}"), *shares))
    head = ("class", "overlap %", *(f"{name}: pixels, %" for name in comparison.names))
    text = "Overlap: of the pixels that any network gives a class, the share that all networks give it."
    return Markup("<p>{}</p>{}").format(text, render_table(head, rows, is_long=len(rows) > LONG))


def _render_image(comparison: MaskComparison, index: int) -> Markup:
    file, differing = comparison.images.name(index), 100 * comparison.differing[index]
    caption = [render_lines([f"{Path(file).name}: {differing:.1f} % of the pixels differ"], "right")]
    disagreement = comparison.disagreements[index]
    if disagreement:
        pairs = zip(comparison.names, disagreement[0], strict=True)
        text = ", ".join(f"{name}: {title}" for name, title in pairs)
        caption.append(render_lines([f"{100 * disagreement[1]:.1f} %: {text}"]))
    try:
        pixels = decode_by_pillow(comparison.images.read(index))
    except (BadImage, UserError) as error:  # the file has changed since it was segmented
        return render_figure(Markup(), [*caption, f"(no picture: {error})"])
    masks = zip(comparison.names, comparison.read_masks(index), strict=True)
    return render_strip(pixels, masks, comparison.palette, caption)
