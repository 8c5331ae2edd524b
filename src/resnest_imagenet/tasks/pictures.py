"""Draws the pictures of a run for its trackers, and texts on pictures."""

import math
from collections.abc import Sequence
from functools import partial

import numpy as np
from PIL import Image, ImageFont
from torch import Tensor

from resnest_imagenet.data.loader import to_pixels
from resnest_imagenet.data.transforms import MEAN, STD, Colour
from resnest_imagenet.errors import printable
from resnest_imagenet.evaluation.accuracy import Evaluation
from resnest_imagenet.evaluation.mistakes import count_confusions

MARGIN = 2  # pixels around each image


def draw_samples(images: Tensor, mean: Colour = MEAN, std: Colour = STD) -> np.ndarray:
    """Draw normalised images, (N, 3, S, S), as they were before the normalisation: uint8 (H, W, 3)."""
    return tile(list(to_pixels(images, mean, std)))


def tile(pictures: Sequence[np.ndarray]) -> np.ndarray:
    """Draw pictures of one size, uint8 (h, w, 3), in rows and columns: uint8 (H, W, 3)."""
    columns = math.ceil(math.sqrt(len(pictures)))
    height, width = (side + 2 * MARGIN for side in pictures[0].shape[:2])
    sheet = Image.new("RGB", (width * columns, height * math.ceil(len(pictures) / columns)), "white")
    for number, pixels in enumerate(pictures):
        row, column = divmod(number, columns)
        sheet.paste(Image.fromarray(pixels), (column * width + MARGIN, row * height + MARGIN))
    return np.asarray(sheet)


def draw_confusions(evaluation: Evaluation, classes: Sequence[str], title: str) -> np.ndarray:
    """Draw the share of each class's images that was predicted as each class; above 1000, neighbours share a cell.

    Args:
        evaluation: of the images.
        classes: all names.
        title: a line.

    Returns:
        uint8 (H, W, 3).
    """
    confusions = count_confusions(evaluation, len(classes), min(len(classes), 1000))
    return draw_matrix(confusions, classes[: len(confusions)], title)


def draw_matrix(confusions: np.ndarray, names: Sequence[str], title: str, in_percent: bool = False) -> np.ndarray:
    """Draw a confusion matrix.

    Args:
        confusions: images or pixels of each true class (rows) that were predicted as each class (columns), (K, K).
        names: of the classes.
        title: a line.
        in_percent: see `paint_confusions`.

    Returns:
        uint8 (H, W, 3).
    """
    # Imported late: it takes half a second, and a process without trackers does not need it.
    from resnest_imagenet.evaluation.charts import draw_chart, paint_confusions

    paint = partial(paint_confusions, confusions=confusions, names=names, in_percent=in_percent)
    side = 7 if len(confusions) <= 100 else 13.5  # in inches of 100 pixels: each of 1000 classes has a pixel
    return draw_chart(title, "predicted", "true", paint, (side, 0.9 * side))


def shorten(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """Return a text that is at most so many pixels wide."""
    text = " ".join(printable(text).split())
    while font.getlength(text) > width and len(text) > 1:
        text = f"{text[:-2].rstrip()}…"
    return text
