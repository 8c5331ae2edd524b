"""Reads and decodes image files once each, in processes that may die of it."""

import gc
import hashlib
import multiprocessing
import os
import signal
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace

from PIL import Image
from tqdm import tqdm

from resnest_imagenet.data.decoding import BadImage, Fault, decode, find_fault, is_ordinary, open_image
from resnest_imagenet.data.folder import ImageFolder
from resnest_imagenet.data.processes import START_METHOD, end_with_parent
from resnest_imagenet.data.reading import PASSING, read_file, try_again
from resnest_imagenet.errors import LoadingError, first_line

# An image whose shorter side is below this, in pixels, is reported as tiny.
TINY = 8
# The formats of suffixes other than JPEG's.
FORMAT_OF = {".png": "PNG", ".webp": "WEBP", ".bmp": "BMP", ".tif": "TIFF", ".tiff": "TIFF"}
# Number of files that a process gets at a time.
BATCH = 32

# ImageNet's 22 CMYK JPEGs and its PNG with a JPEG's name: both loaders decode them.
KNOWN_CMYK = """
    n01739381_1309 n02077923_14822 n02447366_23489 n02492035_15739 n02747177_10752 n03018349_4028 n03062245_4620
    n03347037_9675 n03467068_12171 n03529860_11437 n03544143_17228 n03633091_5218 n03710637_5125 n03961711_5286
    n04033995_2932 n04258138_17003 n04264628_27969 n04336792_7448 n04371774_5854 n04596742_4225 n07583066_647
    n13037406_4650
""".split()  # noqa: SIM905 - as the list is published
KNOWN_PNG = "n02105855_2933"


@dataclass(frozen=True)
class Finding:
    """A fault or oddity of a file or folder.

    Attributes:
        kind: one of check.FAULTS or check.NOTES.
        path: of the file or folder, below the data set's root.
        detail: more about it, or "".
    """

    kind: str
    path: str
    detail: str = ""


@dataclass(frozen=True)
class Examined:
    """The result for one image file.

    Attributes:
        path: below the root.
        findings: its faults and oddities.
        sha256: of its content, if it can be used.
        errno: of the error, if it could not be read.
        size: (width, height) in pixels, if it can be used.
        labels: the class indices in a mask, without void.
    """

    path: str
    findings: tuple[Finding, ...]
    sha256: bytes | None = None
    errno: int | None = None
    size: tuple[int, int] | None = None
    labels: tuple[int, ...] = ()


Judge = Callable[[str, bytes], Examined]  # of a file's path and content; sent to processes


def examine_files(root: str, paths: Sequence[str], workers: int, judge: Judge | None = None) -> Iterator[Examined]:
    """Yield `examine_file` of each file, in order; "crash" for a file that kills the process that decodes it.

    Args:
        root: the folder of the paths.
        paths: the files.
        workers: number of processes.
        judge: examines the content of a file; None means `judge_image`.
    """
    from resnest_imagenet.data import torchvision  # noqa: F401 - once, before the processes are forked

    # The processes do not collect frozen objects: see `WorkerLoader.batches`.
    gc.freeze()
    try:
        yield from _examine_batches(root, paths, workers, BATCH, 4 * workers, judge or judge_image)
    finally:
        gc.unfreeze()


def count_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def split_unreadable(images: ImageFolder) -> tuple[ImageFolder, list[str]]:
    """Decode all images; return those that can be used, and a line about each of the others, in order.

    A missing file is one of the others.

    Raises:
        LoadingError: the storage fails, so nothing is known about the image.
    """
    names = [images.name(index) for index in range(len(images))]
    usable, lines = [], []
    results = examine_files("", names, min(count_cores(), len(names)))
    progress = tqdm(results, "looking at images", len(names), unit="", disable=None, dynamic_ncols=True, leave=False)
    for index, result in enumerate(progress):
        if result.sha256:
            usable.append(index)
            continue
        detail = result.findings[0].detail
        line = f"{names[index]}: " + (detail if result.errno is None else f"cannot be read ({detail})")
        if result.errno in PASSING:
            raise LoadingError(result.errno, line)
        lines.append(line)
    return replace(images, files=images.files[usable], labels=images.labels[usable]), lines


def _examine_batches(
    root: str, paths: Sequence[str], workers: int, batch: int, ahead: int, judge: Judge
) -> Iterator[Examined]:
    waiting = deque(paths[start : start + batch] for start in range(0, len(paths), batch))
    running: deque[tuple[Sequence[str], Future[list[Examined]]]] = deque()
    context = multiprocessing.get_context(START_METHOD)
    while waiting:
        number = min(workers, len(waiting))
        with ProcessPoolExecutor(number, context, _set_up, (os.getpid(),)) as processes:
            try:
                while waiting or running:
                    while waiting and len(running) < ahead:
                        running.append((waiting[0], processes.submit(_examine_batch, root, waiting[0], judge)))
                        waiting.popleft()
                    yield from running[0][1].result()
                    running.popleft()
            except BrokenProcessPool:
                pass  # a process died and the executor ended the others; new ones get the rest of `waiting`
        suspects = [path for files, _ in running for path in files]
        running.clear()
        if ahead > 1:
            yield from _examine_batches(root, suspects, 1, 1, 1, judge)
        elif suspects:
            yield Examined(suspects[0], (Finding("crash", suspects[0], "the process that decoded it died"),))


def _set_up(parent: int) -> None:
    """Set up a process: lift Pillow's own limit, and silence its libraries' messages about damaged files."""
    end_with_parent(parent)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the executor ends processes with it when one has died
    Image.MAX_IMAGE_PIXELS = None
    warnings.simplefilter("ignore")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def _examine_batch(root: str, paths: Sequence[str], judge: Judge) -> list[Examined]:
    return [examine_file(root, path, judge) for path in paths]


def examine_file(root: str, path: str, judge: Judge) -> Examined:
    """Read a file and return its faults and oddities."""
    try:
        encoded = try_again(lambda: read_file(os.path.join(root, path)), lambda: path)
    except BadImage as error:
        return Examined(path, (Finding(error.fault.kind, path, error.fault.detail),))
    except LoadingError as error:
        return Examined(path, (Finding("unreadable", path, os.strerror(error.errno or 0)),), errno=error.errno)
    return judge(path, encoded)


def judge_image(path: str, encoded: bytes) -> Examined:
    """Decode an image and return its faults and oddities."""
    fault = _find_fault(encoded)
    if fault:
        return Examined(path, (Finding(fault.kind, path, fault.detail),))
    with open_image(encoded) as image:
        findings = tuple(_find_oddities(path, image))
        return Examined(path, findings, hashlib.sha256(encoded).digest(), size=image.size)


def _find_fault(encoded: bytes) -> Fault | None:
    """Return why an image cannot be used: decode it by Pillow and, if a run would do so, by torchvision."""
    try:
        fault = find_fault(encoded)
        if fault is None and is_ordinary(encoded):
            decode(encoded)
    except BadImage as error:
        return error.fault
    except MemoryError:  # end like a process that the system kills for it
        os._exit(1)
    except Exception as error:  # any error of a decoder is the file's fault
        return Fault("damaged", f"not a readable image ({first_line(error)})")
    return fault


def _find_oddities(path: str, image: Image.Image) -> Iterator[Finding]:
    """Yield the oddities of an image that can be used."""
    # An MPO file holds several JPEGs; the first is used.
    form = "JPEG" if image.format == "MPO" else image.format
    mode, size = image.mode, image.size
    name, suffix = os.path.splitext(os.path.basename(path))
    if (name in KNOWN_CMYK and mode == "CMYK") or (name == KNOWN_PNG and form == "PNG"):
        yield Finding("known oddity", path, f"ImageNet's own: a {form} image of mode {mode}")
        return
    if form != FORMAT_OF.get(suffix.lower(), "JPEG"):
        yield Finding("odd format", path, f"a {form} image")
    if mode != "RGB":
        yield Finding("odd mode", path, f"of mode {mode}")
    if min(size) < TINY:
        yield Finding("tiny", path, f"{size[0]} x {size[1]} pixels")
