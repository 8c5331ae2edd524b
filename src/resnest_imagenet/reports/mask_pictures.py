"""Writes masks of images as picture files."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from resnest_imagenet.evaluation.overlays import encode_index_png, overlay_mask, paint_mask
from resnest_imagenet.files import naming_storage_errors, write_atomically
from resnest_imagenet.inference.segment import SegmentedImage
from resnest_imagenet.reports.picture_files import encode_png, name_pictures

ENDS = (".png", "_colours.png", "_overlay.png")  # of the pictures of one image


def write_mask(stem: Path, image: SegmentedImage, palette: np.ndarray) -> None:
    """Write three pictures of an image's mask.

    STEM.png has the class indices, with the palette. STEM_colours.png has the colours. STEM_overlay.png has the image
    under the colours.

    Args:
        stem: the common beginning of the three paths.
        image: with its mask.
        palette: uint8 (K, 3).

    Raises:
        StorageError: a file cannot be written.
    """
    contents = (
        encode_index_png(image.mask, palette),
        encode_png(paint_mask(image.mask, palette)),
        encode_png(overlay_mask(image.pixels, image.mask, palette)),
    )
    with naming_storage_errors(stem):
        stem.parent.mkdir(parents=True, exist_ok=True)
    for end, content in zip(ENDS, contents, strict=True):
        with write_atomically(Path(f"{stem}{end}")) as file:
            file.write(content)


def name_masks(files: Sequence[str]) -> list[str]:
    """Return the beginning of the names of each image's pictures; see `name_pictures`."""
    return name_pictures(files, ENDS)
