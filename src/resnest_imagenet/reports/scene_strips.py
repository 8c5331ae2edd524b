"""Scenes in a page: the image and, side by side with it, the image under the colours of masks."""

from collections.abc import Iterable, Sequence
from html import escape

import numpy as np
from PIL import Image

from resnest_imagenet.data.scenes import VOID
from resnest_imagenet.evaluation.overlays import VOID_COLOUR, overlay_mask
from resnest_imagenet.reports.page import embed_image

SIDE = 480  # the longer one of each picture, in pixels, at most


def render_strip(
    pixels: np.ndarray, masks: Iterable[tuple[str, np.ndarray]], palette: np.ndarray, caption: Iterable[str]
) -> str:
    """Return a <figure> of an image and an overlay for each of its masks, each under its title.

    Args:
        pixels: of the image, uint8 (H, W, 3).
        masks: titles, and uint8 (H, W), class indices and VOID.
        palette: uint8 (K, 3), a colour for each class.
        caption: HTML, a line each.
    """
    height, width = pixels.shape[:2]
    scale = min(1.0, SIDE / max(height, width))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    small = np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS))
    views = [_render_view("image", small)]
    for title, mask in masks:
        # Class indices have no values in between.
        small_mask = np.asarray(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST))
        views.append(_render_view(title, overlay_mask(small, small_mask, palette)))
    return (
        f'<figure class="strip"><div class="views">{"".join(views)}</div>'
        f"<figcaption>{''.join(caption)}</figcaption></figure>"
    )


def _render_view(title: str, pixels: np.ndarray) -> str:
    return f"<div><div>{escape(title)}</div>{embed_image(Image.fromarray(pixels), title)}</div>"


def render_legend(classes: Sequence[str], palette: np.ndarray, labels: Iterable[int]) -> str:
    """Return which colours stand for which classes.

    Args:
        classes: names, in the order of the class indices.
        palette: uint8 (K, 3).
        labels: the values that occur in masks, of which only these are named: class indices, and VOID.
    """
    shown = sorted(set(labels))
    rows = [(classes[label], palette[label].tolist()) for label in shown if label != VOID]
    # Where nothing is labelled, the image stays as it is.
    rows += [("not labelled: as in the image", VOID_COLOUR)] if VOID in shown else []
    items = (
        f'<li><i style="background:rgb({red},{green},{blue})"></i>{escape(name)}</li>'
        for name, (red, green, blue) in rows
    )
    return f'<ul class="legend">{"".join(items)}</ul>'
