"""Encoded images: what can be used, and how it is decoded, whichever loader is used."""

import io
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from PIL import Image, UnidentifiedImageError

from resnest_imagenet.errors import first_line

if TYPE_CHECKING:
    from torch import Tensor

# By content, whatever the file's name says. MPO is what some cameras write into .jpg files: JPEGs, the first counts.
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "BMP", "TIFF")
# As Pillow calls them; besides, PNGs may have 16 bits.
MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK")
# Above, Pillow warns of a decompression bomb, and from twice as many on refuses. ImageNet's largest have 70 million.
MAX_PIXELS = 89_478_485
# DALI refuses PNGs without it, Pillow and torchvision do not.
PNG_END = b"IEND\xaeB\x60\x82"
# What Pillow raises on damaged images.
UNREADABLE = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    IndexError,
    EOFError,
    struct.error,
    Image.DecompressionBombError,
)


@dataclass(frozen=True)
class Fault:
    """Why an image cannot be used: in one of a few words, for programs, and in a line."""

    kind: Literal["not a file", "empty", "not an image", "wrong format", "wrong mode", "too large", "damaged"]
    detail: str


class BadImage(Exception):  # noqa: N818 - it is the image's fault
    """An image that cannot be used, whatever reads it: it may be replaced. A storage error is an OSError instead."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(fault.detail)
        self.fault = fault


def find_fault(encoded: bytes) -> Fault | None:
    """Return why an image cannot be used, or None where it can.

    What both loaders decode to the same pixels can be used, up to MAX_PIXELS: neither loader has a limit. What is too
    large is told by its header and not decoded.
    """
    if not encoded:
        return Fault("empty", "not a readable image (it is empty)")
    try:
        with _without_warnings(), Image.open(io.BytesIO(encoded)) as image:
            fault = _judge_header(image)
            if fault is None:
                image.convert("RGB")
            if fault is None and image.format == "PNG" and PNG_END not in encoded:
                fault = Fault("damaged", "a PNG image without its end")
    except UnidentifiedImageError:
        fault = Fault("not an image", "not a readable image (of no known format)")
    except Image.DecompressionBombError as error:  # where nobody has lifted Pillow's own limit
        fault = Fault("too large", f"not a readable image ({error})")
    except UNREADABLE as error:
        fault = Fault("damaged", f"not a readable image ({first_line(error)})")
    return fault


def _judge_header(image: Image.Image) -> Fault | None:
    what = f"a {image.format} image"
    if image.format not in FORMATS:
        return Fault("wrong format", f"{what} (not one of {', '.join(FORMATS)})")
    if image.mode not in MODES and not (image.format == "PNG" and image.mode.startswith("I")):
        return Fault("wrong mode", f"{what} of mode {image.mode} (not one of {', '.join(MODES)})")
    if image.width * image.height > MAX_PIXELS:
        return Fault("too large", f"{what} of {image.width} x {image.height} pixels (over {MAX_PIXELS:,})")
    return None


def decode(encoded: bytes) -> "Tensor":
    """Decode an image as DALI does: uint8 RGB (3, H, W), EXIF orientation and transparency ignored.

    Raises:
        UNREADABLE: not an image, or damaged.
    """
    # Late: the data check needs neither.
    import torch
    from torchvision.io import ImageReadMode, decode_image

    # What torchvision decodes and DALI does not.
    if encoded.startswith(b"GIF8") or (encoded.startswith(b"\x89PNG") and PNG_END not in encoded):
        raise OSError("what DALI does not decode")
    try:
        image = decode_image(torch.frombuffer(bytearray(encoded), dtype=torch.uint8), ImageReadMode.RGB)
    except (RuntimeError, ValueError):
        # JPEGs without an end marker, BMP and TIFF images: Pillow and DALI read them, and agree.
        if fault := find_fault(encoded):
            raise OSError(fault.detail) from None
        with Image.open(io.BytesIO(encoded)) as picture:
            image = torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)
    if image.dtype == torch.uint16:  # of 16-bit PNGs
        image = ((image.to(torch.int32) + 128) // 257).to(torch.uint8)
    return image


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Keep Pillow from warning of what it mends, and of large images: they are judged here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
