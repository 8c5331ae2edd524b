"""Decoding of images: which can be used, and how they are decoded, the same for every loader.

An ordinary JPEG goes to the loaders' own decoders, which agree on it, and an ordinary PNG to DALI's. Everything else
goes through Pillow, for both loaders and the data check: on such images the decoders differ, and DALI's and
torchvision's may end the process.
"""

import functools
import io
import re
import struct
import threading
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from PIL import Image, UnidentifiedImageError

from resnest_imagenet.errors import first_line

if TYPE_CHECKING:
    from torch import Tensor

# By content; the file's name does not matter. Some cameras write MPO into .jpg files: several JPEGs, the first is used.
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "BMP", "TIFF")
# Pillow's names; PNGs of 16 bits are taken too.
MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK")
# Pillow warns of a decompression bomb above this, and refuses twice as many. ImageNet's largest have 70 million.
MAX_PIXELS = 89_478_485
MAX_SIDE = 65_535  # in pixels, the limit of JPEG: the operations of recipes rely on it
# Other formats, for the message: at which byte the signature stands, the signature, the format.
OTHER_FORMATS = (
    (0, b"GIF8", "GIF"),
    (4, b"ftypavif", "AVIF"),
    (4, b"ftypavis", "AVIF"),
    (4, b"ftyphei", "HEIF"),
    (4, b"ftypmif1", "HEIF"),
    (4, b"jP  \r\n\x87\n", "JPEG 2000"),
    (0, b"\xff\x4f\xff\x51", "JPEG 2000"),
    (4, b"JXL \r\n\x87\n", "JPEG XL"),
    (0, b"\xff\x0a", "JPEG XL"),
    *((0, b"P%d" % number + space, "PPM") for number in range(1, 8) for space in (b"\n", b" ", b"\r", b"\t")),
    (0, b"DDS ", "DDS"),
    (0, b"8BPS", "PSD"),
    (0, b"\0\0\1\0", "ICO"),
)
# Markers of JPEGs: frames (baseline, extended and progressive, Huffman-coded), and segments that may precede a scan.
_FRAMES = (0xC0, 0xC1, 0xC2)
_SCAN = 0xDA
_SEGMENTS = {0xC4, 0xDB, 0xDD, 0xFE, *range(0xE0, 0xF0)}  # tables, restart intervals, comments, application data
_AFTER_SCAN = re.compile(rb"\xff[^\0\xd0-\xd7]")  # within a scan, ff is followed by zero or a restart
_END = b"\xff\xd9"
_SEGMENT = struct.Struct(">BBH")
_FRAME = struct.Struct(">BHHB")
_JFIF, _ADOBE = 0xE0, 0xEE  # they define how colours are coded, if they have at least this length:
_LEAST = {_JFIF: 16, _ADOBE: 14}
# Chunks of PNGs that change no pixel.
_PNG = b"\x89PNG\r\n\x1a\n"
_EXTRAS = {b"pHYs", b"tIME", b"tEXt", b"zTXt", b"iTXt", b"eXIf", b"sRGB", b"gAMA", b"cHRM", b"iCCP", b"sBIT", b"bKGD"}
# Passes of interlaced PNGs: first column and row, and the steps to the next ones.
_PASSES = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
_BITS_AT = 24  # byte of a PNG: bits per value
_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # of a PNG, by its colour type
# The marks of EXIF in JPEGs, PNGs and WebPs, its tag, and the operation that turns an image upright.
_EXIF = (b"Exif", b"eXIf", b"EXIF")
_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Python's warning filters belong to the process, not to a thread.
_filters = threading.Lock()


@dataclass(frozen=True)
class Fault:
    """Why an image cannot be used: a kind, for programs, and a line, for people."""

    kind: Literal[
        "not a file",
        "empty",
        "not an image",
        "wrong format",
        "wrong mode",
        "too large",
        "damaged",
        # For a scene's mask; the last also for an image with objects:
        "wrong mask",
        "unknown label",
        "other size",
    ]
    detail: str


class BadImage(Exception):  # noqa: N818 - it is the image's fault
    """An image that no reader can use: it may be replaced. A storage error is an OSError instead."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(fault)  # the fault itself, so that the error can be pickled
        self.fault = fault

    def __str__(self) -> str:
        return self.fault.detail


def find_fault(encoded: bytes) -> Fault | None:
    """Return why an image cannot be used, or None if it can.

    An image can be used if both loaders decode it to the same pixels, and if it is not above MAX_PIXELS and MAX_SIDE
    (the loaders have no limit of their own). An image that is too large is recognised by its header, not decoded.
    """
    try:
        decode_by_pillow(encoded)
    except BadImage as error:
        return error.fault
    return None


def is_ordinary(encoded: bytes) -> bool:
    """Return whether all decoders agree on an image, even if its data is damaged.

    Such an image is a JPEG or PNG of 8 bits, grey or coloured, neither interlaced nor animated, and its segments or
    chunks follow each other from start to end without a gap. All decoders read damaged data of such a JPEG alike, and
    all refuse such a PNG with damaged data.
    """
    return _is_ordinary_png(encoded) or _is_ordinary_jpeg(encoded)


def _is_ordinary_png(encoded: bytes) -> bool:
    if not encoded.startswith(_PNG) or len(encoded) < 33:
        return False
    chunks = _chunks(encoded)
    header, checksum = next(chunks, (b"", 0))
    if len(header) != 17 or zlib.crc32(header) != checksum:
        return False
    kind, width, height, bits, colour, *methods = struct.unpack(">4sIIBBBBB", header)
    if (kind, bits, methods) != (b"IHDR", 8, [0, 0, 0]) or colour not in (0, 2, 4, 6):
        return False
    kinds = [b"IHDR"]
    for content, checksum in chunks:
        kind = bytes(content[:4])
        # The decoders check the checksums of the data.
        if kind != b"IDAT" and (kind not in (*_EXTRAS, b"IEND") or zlib.crc32(content) != checksum):
            return False
        if kind != kinds[-1]:
            kinds.append(kind)
        if kind == b"IEND":
            break
    is_whole = kinds.count(b"IDAT") == 1 and kinds[-1] == b"IEND"
    return is_whole and 0 < width * height <= MAX_PIXELS and max(width, height) <= MAX_SIDE


def _is_ordinary_jpeg(encoded: bytes) -> bool:
    if not encoded.startswith(b"\xff\xd8"):
        return False
    place, has_frame = 2, False
    while place + 4 <= len(encoded):
        prefix, marker, length = _SEGMENT.unpack_from(encoded, place)
        place += 2 + length
        if prefix != 0xFF or length < 2 or place > len(encoded):
            return False
        if marker == _SCAN and has_frame:
            following = _AFTER_SCAN.search(encoded, place)
            if following is None or following[0] == _END:
                return following is not None
            place = following.start()
        elif marker in _FRAMES and not has_frame and length >= 8:
            bits, height, width, components = _FRAME.unpack_from(encoded, place - length + 2)
            has_frame = bits == 8 and components in (1, 3) and 0 < height * width <= MAX_PIXELS
            if not has_frame:
                return False
        elif marker not in _SEGMENTS:
            return False
    return False


def decode(encoded: bytes) -> "Tensor":
    """Decode an image as DALI does: uint8 RGB (3, H, W), EXIF orientation and transparency ignored.

    Raises:
        BadImage: it cannot be used.
    """
    import torch  # late: the data check does not need it

    # Not a PNG: torchvision 0.29 dies of a damaged one by a segmentation fault. Pillow's pixels are the same.
    if _is_ordinary_jpeg(encoded):
        try:
            return _find_decoder()(torch.frombuffer(bytearray(encoded), dtype=torch.uint8))
        except RuntimeError:
            pass  # Pillow's error names what is wrong
    return torch.from_numpy(decode_by_pillow(encoded)).permute(2, 0, 1)


@functools.cache
def _find_decoder() -> "Callable[[Tensor], Tensor]":
    """Return torchvision's decoder to RGB."""
    from resnest_imagenet.torchvision_import import importing_torchvision

    with importing_torchvision():
        from torchvision.io import ImageReadMode, decode_image
    return functools.partial(decode_image, mode=ImageReadMode.RGB)


def decode_by_pillow(encoded: bytes) -> np.ndarray:
    """Decode an image: uint8 RGB (H, W, 3), EXIF orientation and transparency ignored.

    Raises:
        BadImage: it cannot be used.
    """
    return np.array(decode_picture(encoded))


def decode_picture(encoded: bytes) -> Image.Image:
    """Decode an image as `decode_by_pillow` does, to a Pillow image, RGB."""
    with _naming_damage():
        image = _load(encoded)
        image.info.pop("transparency", None)  # `convert` would warn of it
        if image.mode.startswith("I"):  # of 16 bits
            grey = ((np.asarray(image).astype(np.int32) + 128) // 257).astype(np.uint8)
            return Image.fromarray(np.repeat(grey[..., None], 3, axis=-1))
        return image.convert("RGB")


def decode_upright(encoded: bytes) -> Image.Image:
    """Decode an image as `decode_picture` does, then turn it upright by its EXIF orientation.

    Raises:
        BadImage: it cannot be used.
    """
    picture, turn = decode_picture(encoded), find_turn(encoded)
    return picture if turn is None else picture.transpose(turn)


def find_turn(encoded: bytes) -> Image.Transpose | None:
    """Return the operation that turns a decoded image upright, by its EXIF orientation; None if it is upright."""
    if not any(mark in encoded for mark in _EXIF):
        return None
    # A damaged EXIF may raise anything: the image then has no orientation.
    with suppress(Exception), _without_warnings(), Image.open(io.BytesIO(encoded)) as image:
        if image.format != "TIFF":  # Pillow has turned a TIFF already
            return _TURNS.get(image.getexif().get(_ORIENTATION, 1))
    return None


def decode_indices(encoded: bytes) -> Image.Image:
    """Decode a PNG of class indices without changing them: uint8, with a palette or without (P or L).

    Raises:
        BadImage: it cannot be used, or its values are not such indices.
    """
    with _naming_damage():
        image = _load(encoded)
    if image.format != "PNG" or image.mode not in ("L", "P"):
        form = f"a {image.format} image of mode {image.mode}"
        raise BadImage(Fault("wrong mask", f"{form}, not class indices: save them as a grey PNG of 8 bits"))
    if image.mode == "L" and encoded[_BITS_AT] != 8:  # Pillow would stretch its values to 0..255
        raise BadImage(Fault("wrong mask", f"a grey PNG of {encoded[_BITS_AT]} bits: save one of 8 bits"))
    return image


def _load(encoded: bytes) -> Image.Image:
    """Decode an image, in its own mode."""
    image = open_image(encoded)
    if fault := _judge_header(image) or (_judge_chunks(encoded) if image.format == "PNG" else None):
        raise BadImage(fault)
    image.load()
    if image.format == "PNG" and _may_be_short(image) and not _is_complete(encoded):
        raise BadImage(Fault("damaged", "a PNG image without some of its rows"))
    return image


@contextmanager
def _naming_damage() -> Iterator[None]:
    """Turn any error of Pillow's decoders into a BadImage: they raise many kinds for damaged files."""
    try:
        yield
    except (BadImage, MemoryError):
        raise
    except Exception as error:
        raise BadImage(Fault("damaged", f"not a readable image ({first_line(error)})")) from error


def open_image(encoded: bytes) -> Image.Image:
    """Open an image: only its header is read.

    Raises:
        BadImage: it is empty, of none of FORMATS, or larger than Pillow allows.
    """
    if not encoded:
        raise BadImage(Fault("empty", "not a readable image (it is empty)"))
    formats = [name for name in FORMATS if name != "MPO"]  # Pillow opens an MPO as a JPEG
    # Pillow may fail on chunks and segments that other decoders skip.
    if _is_ordinary_png(encoded):
        encoded = _without_extra_chunks(encoded)
    try:
        with _without_warnings():
            try:
                return Image.open(io.BytesIO(encoded), formats=formats)
            except UnidentifiedImageError:
                if not _is_ordinary_jpeg(encoded):
                    raise
                return Image.open(io.BytesIO(_without_extra_segments(encoded)), formats=formats)
    except UnidentifiedImageError as error:
        for start, signature, name in OTHER_FORMATS:
            if encoded.startswith(signature, start):
                article = "an" if name[0] in "AI" else "a"
                fault = Fault("wrong format", f"{article} {name} image (not one of {', '.join(FORMATS)})")
                raise BadImage(fault) from error
        raise BadImage(Fault("not an image", "not a readable image (of no known format)")) from error
    except Image.DecompressionBombError as error:  # if Pillow's own limit has not been lifted
        raise BadImage(Fault("too large", f"not a readable image ({error})")) from error


def _without_extra_chunks(encoded: bytes) -> bytes:
    """Return an ordinary PNG without the chunks that change no pixel."""
    pieces: list[bytes | memoryview] = [_PNG]
    for content, checksum in _chunks(encoded):
        if content[:4] not in _EXTRAS:
            pieces += ((len(content) - 4).to_bytes(4, "big"), content, checksum.to_bytes(4, "big"))
    return b"".join(pieces)


def _without_extra_segments(encoded: bytes) -> bytes:
    """Return an ordinary JPEG without the segments that change no pixel."""
    pieces, place, marker = [encoded[:2]], 2, 0
    while marker != _SCAN:
        _, marker, length = _SEGMENT.unpack_from(encoded, place)
        end = place + 2 + length if marker != _SCAN else len(encoded)
        if length >= _LEAST[marker] if marker in _LEAST else marker < _JFIF:
            pieces.append(encoded[place:end])
        place = end
    return b"".join(pieces)


def _judge_header(image: Image.Image) -> Fault | None:
    form = f"a {image.format} image"
    if image.mode not in MODES and not (image.format == "PNG" and image.mode.startswith("I")):
        return Fault("wrong mode", f"{form} of mode {image.mode} (not one of {', '.join(MODES)})")
    form += f" of {image.width} x {image.height} pixels"
    if image.width * image.height > MAX_PIXELS:
        return Fault("too large", f"{form} (over {MAX_PIXELS:,})")
    if max(image.size) > MAX_SIDE:
        return Fault("too large", f"{form} (a side over {MAX_SIDE:,})")
    return None


def _judge_chunks(encoded: bytes) -> Fault | None:
    """Check the chunks of a PNG: Pillow checks neither the checksums of its data nor its end."""
    for content, checksum in _chunks(encoded):
        if zlib.crc32(content) != checksum:
            return Fault("damaged", "a PNG image with a wrong checksum")
        if content[:4] == b"IEND":
            return None
    return Fault("damaged", "a PNG image without its end")


def _chunks(encoded: bytes) -> Iterator[tuple[memoryview, int]]:
    """Yield the content of each whole chunk of a PNG, which begins with its kind (4 bytes), and its checksum."""
    view, place = memoryview(encoded), 8
    while place + 12 <= len(encoded):
        end = place + 8 + int.from_bytes(view[place : place + 4], "big")
        if end + 4 > len(encoded):
            return
        yield view[place + 4 : end], int.from_bytes(view[end : end + 4], "big")
        place = end + 4


def _may_be_short(image: Image.Image) -> bool:
    """Return whether rows may be missing from a decoded PNG: missing rows are black, and last unless interlaced."""
    width, height = image.size
    return bool(image.info.get("interlace")) or image.crop((0, height - 1, width, height)).getbbox() is None


def _is_complete(encoded: bytes) -> bool:
    """Return whether a PNG's data has all its rows."""
    width, height, bits, colour, _, _, interlaced = struct.unpack_from(">IIBBBBB", encoded, 16)
    expected = 0
    for left, top, across, down in _PASSES if interlaced else ((0, 0, 1, 1),):
        columns, rows = -((left - width) // across), -((top - height) // down)
        if columns > 0:
            expected += rows * (1 + (columns * bits * _CHANNELS[colour] + 7) // 8)
    inflating = zlib.decompressobj()
    for content, _ in _chunks(encoded):
        data = content[4:] if content[:4] == b"IDAT" else b""
        while data and expected > 0:
            expected -= len(inflating.decompress(data, 1 << 20))
            data = inflating.unconsumed_tail
    return expected <= len(inflating.flush())


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Silence Pillow's warnings of repairs and large images: this file judges them."""
    with _filters, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
