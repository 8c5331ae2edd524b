"""Images of validation that are training images too: copies under any name."""

import hashlib

import numpy as np

from resnest_imagenet.data.decoding import BadImage
from resnest_imagenet.data.source import ImageSource

_MOST_IMAGES = 100_000  # of both parts: the sizes of more files are too many to ask for at each start of a run
_MOST_COMPARED = 500  # images of validation, evenly spaced where there are more
_MOST_READ = 5_000  # files
_FEW = 0.001  # share of the images of validation that is not worth a line: ImageNet has some


def describe_shared(train_set: ImageSource, val_set: ImageSource) -> str | None:
    """Return a line about the images of validation that have the same content as a training image; None if few do.

    Only files of equal size are read; none of a data set of over 100,000 images, which resnest-data check compares.

    Args:
        train_set: the images of training.
        val_set: the images of validation.
    """
    if len(train_set) + len(val_set) > _MOST_IMAGES:
        return None
    train_sizes, val_sizes = (images.list_sizes(np.arange(len(images))) for images in (train_set, val_set))
    alike = np.flatnonzero(np.isin(val_sizes, train_sizes) & (val_sizes > 0))
    compared = alike[:: -(-len(alike) // _MOST_COMPARED)] if len(alike) else alike
    others = np.flatnonzero(np.isin(train_sizes, val_sizes[compared]))
    if len(compared) + len(others) > _MOST_READ:
        return None
    originals = {digest: index for index in others.tolist() if (digest := _digest(train_set, index))}
    copies = {
        index: originals[digest] for index in compared.tolist() if (digest := _digest(val_set, index)) in originals
    }
    if len(copies) * len(alike) <= _FEW * len(val_set) * len(compared):
        return None
    copy, original = next(iter(copies.items()))
    number = f"at least {len(copies):,}" if len(compared) < len(alike) else f"{len(copies):,}"
    return (
        f"{number} of {len(val_set):,} val images are training images too ({val_set.name(copy)} is "
        f"{train_set.name(original)}): accuracy will be too high; resnest-data check lists them"
    )


def _digest(images: ImageSource, index: int) -> bytes:
    """Return the digest of an image's content; b"" if it cannot be read, which the loaders report."""
    try:
        return hashlib.sha256(images.read(index)).digest()
    except (BadImage, OSError):
        return b""
