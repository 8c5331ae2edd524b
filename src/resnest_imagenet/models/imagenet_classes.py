"""The names of ImageNet's classes: synset ids, and words from timm's table."""

import csv
import functools
import re
from collections import Counter
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

_FOLDER = "data/_info"  # of timm's tables


def imagenet_synsets() -> list[str]:
    """Return ImageNet's 1000 synset ids in the order of the labels, from timm's table."""
    return list(_read_words())


def class_words(classes: Sequence[str]) -> list[str]:
    """Return the names of classes in words: synsets are looked up in timm's table, other names stay."""
    if not any(re.fullmatch(r"n\d{8}", name) for name in classes):
        return list(classes)
    words = _read_words()
    return [words.get(name, name) for name in classes]


@functools.cache
def _read_words() -> dict[str, str]:
    """Return the words of ImageNet's synsets, in the order of the labels.

    timm's files are read without timm, which takes longer to import than torch. A timm that keeps them elsewhere is
    imported.
    """
    package = find_spec("timm")
    assert package is not None and package.origin is not None
    folder = Path(package.origin).parent / _FOLDER
    try:
        synsets = (folder / "imagenet_synsets.txt").read_text("utf-8").splitlines()
        table = (folder / "imagenet_synset_to_lemma.txt").read_text("utf-8").splitlines()
    except OSError:
        from timm.data import ImageNetInfo

        return ImageNetInfo("imagenet-1k").label_descriptions(as_dict=True)
    words = dict(csv.reader(table, delimiter="\t"))
    return {synset: words[synset] for synset in synsets}


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
