"""Masks of images as picture files."""

import io
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import chain, count
from pathlib import Path

import numpy as np
from PIL import Image

from resnest_imagenet.evaluation.overlays import encode_index_png, overlay_mask, paint_mask
from resnest_imagenet.files import replacing, storing
from resnest_imagenet.inference.segment import SegmentedImage

ENDS = (".png", "_colours.png", "_overlay.png")  # of the pictures of one image


def write_mask(stem: Path, image: SegmentedImage, palette: np.ndarray) -> None:
    """Write three pictures of an image's mask.

    STEM.png has the class indices, with the palette; STEM_colours.png has the colours, and STEM_overlay.png the image
    under them.

    Args:
        stem: the path that the three names begin with.
        image: with its mask.
        palette: uint8 (K, 3).

    Raises:
        StorageError: a file cannot be written.
    """
    contents = (
        encode_index_png(image.mask, palette),
        _encode_png(paint_mask(image.mask, palette)),
        _encode_png(overlay_mask(image.pixels, image.mask, palette)),
    )
    with storing(stem):
        stem.parent.mkdir(parents=True, exist_ok=True)
    for end, content in zip(ENDS, contents, strict=True):
        with replacing(Path(f"{stem}{end}")) as file:
            file.write(content)


def name_masks(files: Sequence[str]) -> list[str]:
    """Return what the names of each image's pictures begin with, so that no picture overwrites another.

    It is the path below the folder that all images have in common, without the suffix; with it where only the suffix
    tells two images apart, and with a number where that is not enough, as for "a" beside "a_overlay".

    Args:
        files: paths of images, all different.
    """
    common = os.path.commonpath([os.path.dirname(file) for file in files]) if files else ""
    paths = [os.path.relpath(file, common) for file in files]
    short = [os.path.splitext(path)[0] for path in paths]
    uses = Counter(_list_pictures(short))
    stems: list[str] = []
    taken: set[str] = set()
    for path, stem in zip(paths, short, strict=True):
        is_clear = all(uses[name] == 1 for name in _list_pictures([stem]))
        names = chain([stem] * is_clear, [path], (f"{path}-{number}" for number in count(2)))
        chosen = next(name for name in names if taken.isdisjoint(_list_pictures([name])))
        taken.update(_list_pictures([chosen]))
        stems.append(chosen)
    return stems


def _list_pictures(stems: Iterable[str]) -> list[str]:
    return [stem + end for stem in stems for end in ENDS]


def _encode_png(pixels: np.ndarray) -> bytes:
    """Return pixels, uint8 (H, W, 3), as a PNG file."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG")
    return file.getvalue()
