"""Image files, each read and decoded once, by processes that may die of it."""

import hashlib
import io
import multiprocessing
import os
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

from PIL import Image

from resnest_imagenet.data.decoding import find_fault

# No image of at most decoding.MAX_PIXELS has more bytes; a file that has more is not read.
MAX_BYTES = 2**30
# The shorter side, in pixels, of images that nobody means to train on.
TINY = 8
# Files that are handed to a process at once.
BATCH = 32

# ImageNet's 22 CMYK JPEGs and its PNG with the name of a JPEG: both loaders decode them.
KNOWN_CMYK = """
    n01739381_1309 n02077923_14822 n02447366_23489 n02492035_15739 n02747177_10752 n03018349_4028 n03062245_4620
    n03347037_9675 n03467068_12171 n03529860_11437 n03544143_17228 n03633091_5218 n03710637_5125 n03961711_5286
    n04033995_2932 n04258138_17003 n04264628_27969 n04336792_7448 n04371774_5854 n04596742_4225 n07583066_647
    n13037406_4650
""".split()  # noqa: SIM905 - as the list is published
KNOWN_PNG = "n02105855_2933"


@dataclass(frozen=True)
class Finding:
    """One thing that was found.

    Attributes:
        kind: one of check.FAULTS or check.NOTES.
        path: of the file or folder, below the data set's root.
        detail: what about it, or "".
    """

    kind: str
    path: str
    detail: str = ""


@dataclass(frozen=True)
class Examined:
    """An image file: what was found, and the SHA-256 of its content if it can be used."""

    path: str
    findings: tuple[Finding, ...]
    sha256: bytes | None = None


def examine_files(root: str, paths: Sequence[str], workers: int) -> Iterator[Examined]:
    """Yield what examine_file says of each file, in order; "crash" for a file that kills the process decoding it.

    Args:
        root: the folder of the paths.
        paths: the files.
        workers: processes.
    """
    return _examine_batches(root, paths, workers, BATCH, ahead=4 * workers)


def _examine_batches(root: str, paths: Sequence[str], workers: int, batch: int, ahead: int) -> Iterator[Examined]:
    waiting = deque(paths[start : start + batch] for start in range(0, len(paths), batch))
    running: deque[tuple[Sequence[str], Future[list[Examined]]]] = deque()
    context = multiprocessing.get_context("spawn")  # a fork would inherit the locks of threads
    while waiting:
        with ProcessPoolExecutor(min(workers, len(waiting)), context, _be_quiet) as processes:
            try:
                while waiting or running:
                    while waiting and len(running) < ahead:
                        running.append((waiting[0], processes.submit(_examine_batch, root, waiting[0])))
                        waiting.popleft()
                    yield from running[0][1].result()
                    running.popleft()
            except BrokenProcessPool:
                pass  # a process died, and the others were ended; the rest of `waiting` goes to new ones
        suspects = [path for files, _ in running for path in files]
        running.clear()
        if ahead > 1:
            yield from _examine_batches(root, suspects, workers=1, batch=1, ahead=1)
        elif suspects:
            yield Examined(suspects[0], (Finding("crash", suspects[0], "the process that decoded it died"),))


def _be_quiet() -> None:
    """Set up a process: neither Pillow's own limit counts here, nor what its libraries print about damaged files."""
    Image.MAX_IMAGE_PIXELS = None
    warnings.simplefilter("ignore")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def _examine_batch(root: str, paths: Sequence[str]) -> list[Examined]:
    return [examine_file(root, path) for path in paths]


def examine_file(root: str, path: str) -> Examined:
    """Read a file, decode it and tell what is wrong with it, or odd."""
    try:
        with open(os.path.join(root, path), "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > MAX_BYTES:
                return Examined(path, (Finding("too large", path, f"a file of {size:,} bytes, which was not read"),))
            encoded = file.read()
    except OSError as error:
        return Examined(path, (Finding("unreadable", path, str(error.strerror)),))
    fault = find_fault(encoded)
    if fault:
        return Examined(path, (Finding(fault.kind, path, fault.detail),))
    return Examined(path, tuple(_find_oddities(path, encoded)), hashlib.sha256(encoded).digest())


def _find_oddities(path: str, encoded: bytes) -> Iterator[Finding]:
    """Yield what is unusual about an image that can be used."""
    with Image.open(io.BytesIO(encoded)) as image:
        # MPO is several JPEGs in one file, of which the first counts.
        form = "JPEG" if image.format == "MPO" else image.format
        mode, size = image.mode, image.size
    name, suffix = os.path.splitext(os.path.basename(path))
    if (name in KNOWN_CMYK and mode == "CMYK") or (name == KNOWN_PNG and form == "PNG"):
        yield Finding("known oddity", path, f"ImageNet's own: a {form} image of mode {mode}")
        return
    if form != ("PNG" if suffix.lower() == ".png" else "JPEG"):
        yield Finding("odd format", path, f"a {form} image")
    if mode != "RGB":
        yield Finding("odd mode", path, f"of mode {mode}")
    if min(size) < TINY:
        yield Finding("tiny", path, f"{size[0]} x {size[1]} pixels")
