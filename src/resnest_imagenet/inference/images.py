"""Lists the images for inference, and checks what can be checked before any is read."""

import sys
from collections.abc import Iterable, Mapping, Sequence
from os import PathLike, fspath
from os.path import isdir, lexists
from pathlib import Path
from typing import TypeAlias

import torch

from resnest_imagenet.compute import keep_freed_memory
from resnest_imagenet.data.folder import ImageFolder, find_images, read_image_folder
from resnest_imagenet.data.loader import choose_loader
from resnest_imagenet.data.parts import ClassifiedData
from resnest_imagenet.data.source import ImageSource, print_notes
from resnest_imagenet.distributed import choose_device, launched_as
from resnest_imagenet.errors import ConfigError, DataError, printable
from resnest_imagenet.files import require_writable
from resnest_imagenet.models.zoo import require_model
from resnest_imagenet.weights.load import Weights

Images: TypeAlias = ImageFolder | str | PathLike[str] | Sequence[str | PathLike[str]]


def list_images(images: Images) -> ImageFolder:
    """List images without classes; notes on stderr name skipped files.

    Args:
        images: files, folders or patterns such as "photos/**/*.jpg", one or several; or a list of images already.

    Raises:
        DataError: a file, folder or pattern has no image.
    """
    if isinstance(images, ImageFolder):
        return images
    patterns = [images] if isinstance(images, str | PathLike) else images
    listed = find_images([fspath(pattern) for pattern in patterns])
    print_notes(listed)
    return listed


def list_classified_images(folder: str | PathLike[str]) -> ImageFolder:
    """List the images of a folder that has one folder per true class; notes on stderr name skipped files.

    Raises:
        DataError: there is no such folder, it has no classes, or a class has no images.
        ConfigError: the argument is not a path.
    """
    if not isinstance(folder, str | PathLike):
        raise ConfigError(
            f"images is a {type(folder).__name__}: give the path of a folder that has one folder per true class"
        )
    if not lexists(folder):
        raise DataError(f"images={fspath(folder)}: no such file or folder")
    if not isdir(folder):
        raise DataError(f"images={fspath(folder)}: not a folder: give one that has one folder per true class")
    path = Path(folder).absolute()
    return list_part(str(path.parent), path.name, "images")


def list_part(root: str, name: str, option: str) -> ImageFolder:
    """List the images of one part of a data set by `read_image_folder`; rank 0 prints notes on skipped files."""
    listed = read_image_folder(root, name, option)
    if launched_as().rank == 0:
        print_notes(listed)
    return listed


def open_own_val(data: ClassifiedData, weights: Weights) -> ImageSource:
    """List the images of validation of a data set, where it names none those of the weights' run.

    On rank 0, notes on stderr name skipped files, and the options that are the run's.

    Raises:
        DataError: there are none.
    """
    own = data.adopt((weights.run or {}).get("data"))
    images = own.open_part("val")
    if launched_as().rank == 0:
        print_notes(images)
        if own != data:
            line = f"{weights.source}: as in its run, {len(images):,} images of {own.root} by {own.describe_split()}"
            print(printable(line), file=sys.stderr)
    return images


def prepare_inference(
    models: Iterable[str | None], loader: str, device: str, outputs: Mapping[str, str | None]
) -> torch.device:
    """Refuse what can be refused before anything is read, and return the device.

    Args:
        models: names of networks; None if the weights include the name.
        loader: "auto", "dali" or "torchvision".
        device: as of `distributed.choose_device`.
        outputs: the files to be written, by option, or None.

    Raises:
        ConfigError: a network is unknown, the loader or device is missing, or a file cannot be written.
    """
    for name in models:
        if name is not None:
            require_model(name)
    choose_loader(loader)
    for option, path in outputs.items():
        if path is not None and launched_as()[0] == 0:
            require_writable(Path(path), option)
    keep_freed_memory()
    return choose_device(device)
