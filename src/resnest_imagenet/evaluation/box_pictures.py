"""Draws detections on a picture: boxes, masks, names and scores."""

import colorsys
from collections.abc import Iterable, Sequence
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from resnest_imagenet.errors import printable

_GOLDEN = 0.618034  # of the colour circle, between the hues of two classes: any few of them differ
_LIGHT = 140  # luminance from which on letters are black
_PADDING = 2  # around letters, in pixels


def make_box_palette(num_classes: int) -> np.ndarray:
    """Return a colour for each class, uint8 (num_classes, 3): bright, and far from that of the next class."""
    hues = [(0.58 + _GOLDEN * label) % 1 for label in range(num_classes)]
    colours = [
        colorsys.hsv_to_rgb(hue, 0.85 - 0.3 * (n // 13 % 2), 1.0 - 0.25 * (n // 7 % 2)) for n, hue in enumerate(hues)
    ]
    return (np.array(colours).reshape(-1, 3) * 255).round().astype(np.uint8)


def draw_detections(
    picture: np.ndarray,
    boxes: np.ndarray,
    labels: np.ndarray,
    classes: Sequence[str],
    palette: np.ndarray,
    scores: np.ndarray | None = None,
    masks: Sequence[np.ndarray] | None = None,
    opacity: float = 0.45,
) -> np.ndarray:
    """Draw detections, or objects, on a picture, uint8 (H, W, 3); the first one lies on top.

    Args:
        picture: uint8 (H, W, 3).
        boxes: (n, 4), x1 y1 x2 y2 in pixels of the picture.
        labels: (n,), class indices.
        classes: K names; letters that the font does not have are drawn as boxes.
        palette: uint8 (K, 3), a colour for each class.
        scores: (n,), 0..1, written beside the names; None: names only.
        masks: n of bool (H, W); None: boxes only.
        opacity: of the masks, 0 to 1.
    """
    height, width = picture.shape[:2]
    order = range(len(boxes) - 1, -1, -1)
    if masks is not None:
        picture = _paint_masks(picture, ((masks[row], palette[labels[row]]) for row in order), opacity)
    image = Image.fromarray(picture)
    pen = ImageDraw.Draw(image)
    thickness = max(1, round(min(height, width) / 240))
    font = _load_font(_choose_font_size(min(height, width)))
    outlines = [_round_box(box, width, height) for box in np.asarray(boxes, np.float64).tolist()]
    for row in order:
        pen.rectangle(outlines[row], outline=_colour(palette, labels[row]), width=thickness)
    # Names after all boxes, so that no line crosses a name.
    for row in order:
        text = printable(classes[labels[row]])
        if scores is not None:
            text += f" {scores[row]:.2f}"
        _write(pen, text, outlines[row], _colour(palette, labels[row]), font, (width, height))
    return np.asarray(image)


def _paint_masks(picture: np.ndarray, masks: Iterable[tuple[np.ndarray, np.ndarray]], opacity: float) -> np.ndarray:
    """Blend the colours of masks into a picture, uint8 (H, W, 3); where masks overlap, the last one's colour."""
    painted, is_covered = picture.copy(), np.zeros(picture.shape[:2], bool)
    for mask, colour in masks:
        painted[mask] = colour
        is_covered |= mask
    mixed = (1 - opacity) * picture[is_covered] + opacity * painted[is_covered]
    painted[is_covered] = mixed.round().astype(np.uint8)
    return painted


def _round_box(box: Sequence[float], width: int, height: int) -> tuple[int, int, int, int]:
    """Return the first and the last pixel of a box in each direction, within the picture."""
    x1, y1 = (int(np.clip(np.floor(value), 0, side - 1)) for value, side in zip(box[:2], (width, height), strict=True))
    x2, y2 = (
        int(np.clip(np.ceil(value) - 1, 0, side - 1)) for value, side in zip(box[2:], (width, height), strict=True)
    )
    return x1, y1, max(x1, x2), max(y1, y2)


def _write(
    pen: ImageDraw.ImageDraw,
    text: str,
    box: tuple[int, int, int, int],
    colour: tuple[int, ...],
    font: ImageFont.ImageFont | ImageFont.FreeTypeFont,
    size: tuple[int, int],
) -> None:
    """Write a name on its class's colour: above the box, or inside it at the edge of the picture."""
    left, top, right, bottom = pen.textbbox((0, 0), text, font=font)
    width, height = int(right - left) + 2 * _PADDING, int(bottom - top) + 2 * _PADDING
    x = max(0, min(box[0], size[0] - width))
    y = box[1] - height if box[1] >= height else min(box[1], max(0, size[1] - height))
    pen.rectangle((x, y, x + width - 1, y + height - 1), fill=colour)
    ink = (0, 0, 0) if np.dot(colour, (0.299, 0.587, 0.114)) > _LIGHT else (255, 255, 255)
    pen.text((x + _PADDING - left, y + _PADDING - top), text, fill=ink, font=font)


def _choose_font_size(side: int) -> int:
    """Return the height of letters for a picture's short side, in pixels.

    It grows with the picture up to a side of 600 pixels. From 1120 pixels on it grows again, more slowly.
    """
    return round(max(10, min(side / 30, 20), side / 56))


def _colour(palette: np.ndarray, label: int) -> tuple[int, ...]:
    return tuple(palette[label].tolist())


@cache
def _load_font(size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    """Return Pillow's own font, not one of the machine, so that pictures are the same everywhere."""
    return ImageFont.load_default(size)
