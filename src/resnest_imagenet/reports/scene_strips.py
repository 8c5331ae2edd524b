"""Scenes in a page: the image and, beside it, the image under the colours of masks."""

from collections.abc import Iterable, Sequence

import numpy as np
from markupsafe import Markup
from PIL import Image

from resnest_imagenet.data.scenes import VOID
from resnest_imagenet.evaluation.overlays import VOID_COLOUR, overlay_mask
from resnest_imagenet.reports.page import render_views

SIDE = 480  # largest long side of a picture, in pixels


def render_strip(
    pixels: np.ndarray, masks: Iterable[tuple[str, np.ndarray]], palette: np.ndarray, caption: Iterable[Markup]
) -> Markup:
    """Return a <figure> of an image and an overlay for each of its masks, each under its title.

    Args:
        pixels: of the image, uint8 (H, W, 3).
        masks: pairs of a title and a mask, uint8 (H, W), class indices and VOID.
        palette: uint8 (K, 3), a colour for each class.
        caption: HTML, one item for each line.
    """
    height, width = pixels.shape[:2]
    scale = min(1.0, SIDE / max(height, width))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    small = np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS))
    views = [("image", Image.fromarray(small))]
    for title, mask in masks:
        # Nearest: class indices cannot be interpolated.
        small_mask = np.asarray(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST))
        views.append((title, Image.fromarray(overlay_mask(small, small_mask, palette))))
    return render_views(views, caption)


def render_legend(classes: Sequence[str], palette: np.ndarray, labels: Iterable[int]) -> Markup:
    """Return a legend of the classes' colours.

    Args:
        classes: names, in the order of the class indices.
        palette: uint8 (K, 3).
        labels: the values to list: class indices, and VOID.
    """
    shown = sorted(set(labels))
    rows = [(classes[label], palette[label].tolist()) for label in shown if label != VOID]
    # An overlay does not change pixels without a label.
    rows += [("not labelled: as in the image", VOID_COLOUR)] if VOID in shown else []
    item = Markup('<li><i style="background:rgb({},{},{})"></i>{}</li>')
    items = Markup().join(item.format(*colour, name) for name, colour in rows)
    return Markup('<ul class="legend">{}</ul>').format(items)
