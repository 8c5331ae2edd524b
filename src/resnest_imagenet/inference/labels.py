"""Matches the outputs of a network with the classes of a data set."""

import sys
from collections.abc import Sequence
from dataclasses import replace

from resnest_imagenet.data.source import ImageSource, are_numbers, label_by_classes, read_numbers
from resnest_imagenet.distributed import launched_as
from resnest_imagenet.errors import DataError
from resnest_imagenet.inference.classifier import find_outputs
from resnest_imagenet.weights.load import list_classes


def name_outputs(classes: Sequence[str], model_classes: Sequence[str] | None, num_outputs: int) -> list[str] | None:
    """Return the data set's names of a network's outputs, in order; None if they cannot be matched.

    The first rule that applies:
    1. The network's own list has all classes of the data set: that list.
    2. The classes are numbers, and the network's own are numbers, ImageNet's or unknown: class n is output n.
    3. The network does not name its 1000 outputs, and the classes are ImageNet's synsets: ImageNet's list.
    4. The network does not name its outputs, and their number is that of the data set's classes: these, in order.

    Args:
        classes: of the data set: all of the network's, or some.
        model_classes: the network's own class names, in order; None for bare weights.
        num_outputs: of the network.
    """
    if model_classes is not None and set(classes) <= set(model_classes):
        return list(model_classes)
    imagenet = list_classes(None, num_outputs)
    numbered = list(map(str, range(num_outputs)))
    own = numbered if model_classes is None or list(model_classes) == imagenet else list(model_classes)
    numbers, own_numbers = read_numbers(classes), read_numbers(own)
    if numbers is not None and own_numbers is not None:
        names = dict(zip(own_numbers, own, strict=True))
        is_clear = len(names) == len(own) and len(set(numbers)) == len(numbers)
        if not is_clear or not set(numbers) <= names.keys():
            return None
        return list((names | dict(zip(numbers, classes, strict=True))).values())
    if model_classes is not None and list(model_classes) != numbered:
        return None
    if imagenet is not None and set(classes) <= set(imagenet):
        return imagenet
    return list(classes) if len(classes) == num_outputs else None


def label_images(
    images: ImageSource, model_classes: Sequence[str] | None, num_outputs: int, source: str
) -> ImageSource:
    """Label images by a network's outputs, see `name_outputs`; a line on stderr reports an assumption.

    A class may also be named by its words: "goldfish" or "golden_retriever" for ImageNet's.

    Args:
        images: of all of the network's classes, or of some.
        model_classes: the network's own class names, in order; None for bare weights.
        num_outputs: of the network.
        source: of its weights, for the messages.

    Raises:
        DataError: a class has no output.
    """
    imagenet = list_classes(None, num_outputs)
    own = list_classes(model_classes, num_outputs)
    if own is not None and not set(images.classes) <= set(own):
        candidates = zip(images.classes, find_outputs(images.classes, own), strict=True)
        images = replace(images, classes=tuple(own[k[0]] if len(k) == 1 else name for name, k in candidates))
    names = name_outputs(images.classes, model_classes, num_outputs)
    are_all = are_numbers(images.classes) and len(images.classes) == num_outputs
    if names is None and are_all:  # shards without class names, but a network with names
        names = list(images.classes)
    has_numbers = read_numbers(images.classes) is not None
    if names is None and has_numbers and (model_classes is None or list(model_classes) == imagenet):
        raise DataError(
            f"{images.root}: its classes are numbers, but not those of the outputs 0 to {num_outputs - 1} of {source}: "
            "name each class by its output, or give the checkpoint of a run, which names its classes"
        )
    if names is None and own is None:
        raise DataError(
            f"{images.root} has {len(images.classes)} classes, fc.weight of {source} {num_outputs}: "
            "set data.root or ckpt"
        )
    if names is not None and names not in (list(model_classes or ()), imagenet) and launched_as()[0] == 0:
        how = "class n is output n" if has_numbers else "its classes, in their order, are taken for the outputs"
        print(f"{images.root}: {how} of {source}", file=sys.stderr)
    whose = f"the classes of {source}" if model_classes else "ImageNet's 1000"
    return label_by_classes(images, names or own or (), whose)
