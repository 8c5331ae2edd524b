"""Scenes in a page: the image and, beside it, the image under the colours of masks."""

from collections.abc import Iterable, Sequence
from html import escape

import numpy as np
from PIL import Image

from resnest_imagenet.data.scenes import VOID
from resnest_imagenet.evaluation.overlays import VOID_COLOUR, overlay_mask
from resnest_imagenet.reports.page import embed_image

SIDE = 480  # largest long side of a picture, in pixels


def render_strip(
    pixels: np.ndarray, masks: Iterable[tuple[str, np.ndarray]], palette: np.ndarray, caption: Iterable[str]
) -> str:
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
    views = [_render_view("image", small)]
    for title, mask in masks:
        # Nearest: class indices cannot be interpolated.
        small_mask = np.asarray(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST))
        views.append(_render_view(title, overlay_mask(small, small_mask, palette)))
    return (
        f'<figure class="strip"><div class="views">{"".join(views)}</div>'
        f"<figcaption>{''.join(caption)}</figcaption></figure>"
    )


def _render_view(title: str, pixels: np.ndarray) -> str:
    return f"<div><div>{escape(title)}</div>{embed_image(Image.fromarray(pixels), title)}</div>"


def render_legend(classes: Sequence[str], palette: np.ndarray, labels: Iterable[int]) -> str:
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
    items = (
        f'<li><i style="background:rgb({red},{green},{blue})"></i>{escape(name)}</li>'
        for name, (red, green, blue) in rows
    )
    return f'<ul class="legend">{"".join(items)}</ul>'
