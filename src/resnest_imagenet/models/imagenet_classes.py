"""The names of ImageNet's classes: synset ids, and words from timm's table."""

import re
from collections import Counter
from collections.abc import Sequence


def imagenet_synsets() -> list[str]:
    """Return ImageNet's 1000 synset ids in the order of the labels, from timm's table."""
    return list(_read_table())


def class_words(classes: Sequence[str]) -> list[str]:
    """Return the names of classes in words: synsets are looked up in timm's table, other names stay."""
    if not any(re.fullmatch(r"n\d{8}", name) for name in classes):
        return list(classes)  # without timm, which takes seconds to import
    words = _read_table()
    return [words.get(name, name) for name in classes]


def _read_table() -> dict[str, str]:
    """Return the words of ImageNet's synsets, in the order of the labels."""
    from resnest_imagenet.torchvision_import import importing_torchvision  # it imports torch

    with importing_torchvision():
        from timm.data import ImageNetInfo

    return ImageNetInfo("imagenet-1k").label_descriptions(as_dict=True)


def short_class_names(classes: Sequence[str]) -> list[str]:
    """Return short names of classes, all different: the first word of a synset, other names as they are.

    A word that several classes have, as "crane" of ImageNet's bird and machine, has its synset behind it.
    """
    described = zip(classes, class_words(classes), strict=True)
    short = [name if words == name else words.partition(",")[0] for name, words in described]
    counts = Counter(short)
    return [
        text if counts[text] == 1 or text == name else f"{text} ({name})"
        for name, text in zip(classes, short, strict=True)
    ]
