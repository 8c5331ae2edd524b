"""Names for the picture files of images."""

import io
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import chain, count
from pathlib import Path

import numpy as np
from PIL import Image


def name_pictures(files: Sequence[str], ends: Sequence[str]) -> list[str]:
    """Return the beginning of the names of each image's pictures, so that no picture overwrites another.

    It is the path below the images' common folder, without the suffix. The suffix stays if two images differ only in
    it, and a number is added if that is not enough, as for "a" beside "a_overlay".

    Args:
        files: paths of images, all different.
        ends: the ends of the names of an image's pictures.
    """
    paths = shorten_paths(files)
    short = [os.path.splitext(path)[0] for path in paths]
    uses = Counter(_list_pictures(short, ends))
    stems: list[str] = []
    used: set[str] = set()
    for path, stem in zip(paths, short, strict=True):
        is_clear = all(uses[name] == 1 for name in _list_pictures([stem], ends))
        names = chain([stem] * is_clear, [path], (f"{path}-{number}" for number in count(2)))
        chosen = next(name for name in names if used.isdisjoint(_list_pictures([name], ends)))
        used.update(_list_pictures([chosen], ends))
        stems.append(chosen)
    return stems


def shorten_paths(files: Sequence[str]) -> list[str]:
    """Return paths below the files' common folder."""
    common = os.path.commonpath([os.path.dirname(file) for file in files]) if files else ""
    return [os.path.relpath(file, common) for file in files]


def describe_older(folder: Path, names: Sequence[str], ends: Sequence[str]) -> str:
    """Return the end of a line about pictures that were in a folder before, and still are; "" where there are none.

    Args:
        folder: of the pictures.
        names: of `name_pictures`.
        ends: as there.
    """
    written = {folder / name for name in _list_pictures(names, ends)}
    places = {path.parent for path in written}
    older = sum(path not in written for place in places for path in place.glob("*.png"))
    return f"; other pictures there, of before: {older}" if older else ""


def encode_png(pixels: np.ndarray) -> bytes:
    """Return pixels, uint8 (H, W, 3), as a PNG file."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG")
    return file.getvalue()


def _list_pictures(stems: Iterable[str], ends: Sequence[str]) -> list[str]:
    return [stem + end for stem in stems for end in ends]
