"""Digests of a data set's names, labels, sizes and content, which tell two data sets apart."""

import hashlib
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np

from resnest_imagenet.data.decoding import BadImage
from resnest_imagenet.data.source import ImageSource
from resnest_imagenet.distributed import Ranks, gather_objects

_THREADS = 32  # most of the time they wait for a file server
_CHUNK = 256  # files that a thread gets at a time


def describe_images(
    parts: Mapping[str, ImageSource], level: str, ranks: Ranks, tick: Callable[[], None]
) -> dict[str, str]:
    """Return digests of the images by part and property: "training images", "val labels", ...

    Paths are relative to the data set's folder, so the folder may move. All ranks take part and share the files.

    Args:
        parts: of the data set, by name.
        level: "names" (of files, with their labels), "sizes" (in bytes too) or "content" (of each file too).
        ranks: the ranks of the run.
        tick: called from time to time while files are read.
    """
    files: dict[str, str] = {}
    for name, images in parts.items() if level != "names" else ():
        sizes = _map_images(images, images.list_sizes, ranks, tick)
        files[f"{name} sizes"] = f"{sizes.sum()} {_digest(sizes)}"
    for name, images in parts.items() if level == "content" else ():
        files[f"{name} content"] = _digest(_map_images(images, partial(_digest_images, images), ranks, tick))
    return {
        **{f"{name} images": f"{len(images)} {_digest(images.files)}" for name, images in parts.items()},
        **{f"{name} labels": _digest(images.labels) for name, images in parts.items()},
        **files,
    }


def _map_images(
    images: ImageSource, function: Callable[[np.ndarray], np.ndarray], ranks: Ranks, tick: Callable[[], None]
) -> np.ndarray:
    """Return the results of `function` for the indices of all images, (N, ...); each rank computes its share."""
    share = np.arange(len(images))[ranks.rank :: ranks.world_size]
    results = []
    with ThreadPoolExecutor(_THREADS) as pool:
        for values in pool.map(function, np.array_split(share, 1 + len(share) // _CHUNK)):
            results.append(values)
            tick()
    shares = gather_objects(np.concatenate(results), ranks)
    whole = np.empty((len(images), *shares[0].shape[1:]), shares[0].dtype)
    for rank, values in enumerate(shares):
        whole[rank :: ranks.world_size] = values
    return whole


def _digest_images(images: ImageSource, indices: np.ndarray) -> np.ndarray:
    """Return the digests of n images, uint8 (n, 32)."""
    digests = b"".join(_digest_image(images, index) for index in indices.tolist())
    return np.frombuffer(digests, dtype=np.uint8).reshape(-1, 32)


def _digest_image(images: ImageSource, index: int) -> bytes:
    try:
        return hashlib.sha256(images.read(index)).digest()
    except (BadImage, OSError):  # the loaders report it
        return bytes(32)


def _digest(values: np.ndarray) -> str:
    return hashlib.sha256(values.tobytes()).hexdigest()[:16]
