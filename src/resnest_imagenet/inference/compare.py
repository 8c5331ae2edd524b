"""Compares networks on the same images: the probability that each gives to the true class, and their disagreements."""

import csv
import io
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor, device
from tqdm import tqdm

from resnest_imagenet.data.examine import split_unreadable
from resnest_imagenet.data.folder import ImageFolder
from resnest_imagenet.data.source import ImageSource
from resnest_imagenet.data.transforms import EvalTransform
from resnest_imagenet.errors import ConfigError, DataError, printable
from resnest_imagenet.evaluation.accuracy import TOP
from resnest_imagenet.evaluation.cells import guard
from resnest_imagenet.inference.classifier import Classifier, compute_probabilities, load_in_order, take_classifier
from resnest_imagenet.inference.images import list_classified_images
from resnest_imagenet.inference.labels import label_images
from resnest_imagenet.inference.options import check_arguments
from resnest_imagenet.inference.segmenter import Segmenter
from resnest_imagenet.models.imagenet_classes import class_words, short_class_names

if TYPE_CHECKING:
    from resnest_imagenet.inference.detector import Detector  # it imports torchvision


CHANCE = 0.05  # a difference that chance makes more often than this is none


@dataclass(frozen=True)
class Comparison:
    """The predictions of M networks for N images.

    Attributes:
        names: of the networks, all different.
        images: with their true classes.
        titles: of the true classes; synsets are in words.
        probabilities: (M, N) float64, of the true class.
        predicted: (M, N) str, the likeliest class, in words.
        in_top5: (M, N) bool, whether the true class is among the five likeliest.
        is_right: (M, N) bool, whether the true class is the likeliest.
        protocols: how each network sees an image.
        skipped: a line for each image that cannot be used; these are not among the N.
        has_top5: whether a network has more than five classes; with fewer, every image is among the five likeliest.
    """

    names: tuple[str, ...]
    images: ImageSource
    titles: tuple[str, ...]
    probabilities: np.ndarray
    predicted: np.ndarray
    in_top5: np.ndarray
    is_right: np.ndarray
    protocols: tuple[str, ...]
    skipped: tuple[str, ...] = ()
    has_top5: bool = True

    @property
    def disagreements(self) -> np.ndarray:
        """The images that some networks predict correctly and others do not, those that differ most first."""
        differ = np.flatnonzero(self.is_right.any(0) & ~self.is_right.all(0))
        spread = np.ptp(self.probabilities[:, differ], axis=0)
        return differ[np.argsort(-spread, kind="stable")]


def compare(
    networks: Sequence[Classifier | str | PathLike[str]] | Classifier | str | PathLike[str],
    images: ImageFolder | str | PathLike[str],
    *,
    batch_size: int = 64,
    precision: str = "fp32",
    loader: str = "auto",
    workers: int | None = None,
) -> Comparison:
    """Compare networks on the same images; images that cannot be used are skipped.

    Args:
        networks: one or several, each of `open_classifier`, or a source that it takes.
        images: a folder with one folder per true class, with the names of the networks' classes or their words.
        batch_size: images at a time.
        precision: fp32, bf16 or fp16.
        loader: decodes the images: "auto", "dali" or "torchvision".
        workers: number of the loader's threads or processes; None: this process's cores, at most 8.

    Raises:
        DataError: no image can be used.
        ConfigError: there is no network, or an argument is not valid.
        UserError: another user's error, in one line.
    """
    arguments = check_arguments(batch_size=batch_size, precision=precision, loader=loader, workers=workers)
    several = networks if isinstance(networks, Sequence) and not isinstance(networks, str) else [networks]
    if not several:
        raise ConfigError("networks is empty: give one network or several")
    listed = images if isinstance(images, ImageFolder) else list_classified_images(images)
    classifiers = [take_classifier(network) for network in several]
    usable, skipped = split_unreadable(listed)
    if not len(usable):
        raise DataError(skipped[0])
    judgements = [_Judgement(classifier, usable) for classifier in classifiers]
    # Networks with the same transform share the decoded images.
    groups: dict[tuple[EvalTransform, device], list[_Judgement]] = {}
    for judgement in judgements:
        classifier = judgement.classifier
        groups.setdefault((classifier.transform, classifier.device), []).append(judgement)
    with tqdm(total=len(usable) * len(groups), unit="image", disable=None, dynamic_ncols=True, leave=False) as progress:
        for group in groups.values():
            alike = [judgement.classifier for judgement in group]
            batches = load_in_order(alike, usable, arguments)
            for batch in compute_probabilities(alike, batches, precision, usable.name):
                for judgement, probabilities in zip(group, batch, strict=True):
                    judgement.add(probabilities)
                progress.update(len(batch[0]))
    return Comparison(
        distinguish(classifiers),
        usable,
        _title(usable.classes),
        np.stack([judgement.probabilities for judgement in judgements]),
        np.stack([judgement.predicted for judgement in judgements]),
        np.stack([judgement.in_top5 for judgement in judgements]),
        np.stack([judgement.is_right for judgement in judgements]),
        tuple(classifier.transform.protocol for classifier in classifiers),
        tuple(skipped),
        any(len(classifier.classes) > TOP for classifier in classifiers),
    )


class _Judgement:
    """The predictions of one network for N images, filled batch by batch; the arrays are rows of a `Comparison`."""

    def __init__(self, classifier: Classifier, images: ImageSource) -> None:
        labelled = label_images(images, classifier.weights.classes, len(classifier.classes), classifier.source)
        self.classifier = classifier
        self._labels = labelled.labels
        self._described = class_words(labelled.classes)
        self._done = 0
        self.probabilities = np.zeros(len(images))
        self.predicted = np.empty(len(images), dtype=object)
        self.in_top5, self.is_right = np.zeros((2, len(images)), dtype=bool)

    def add(self, probabilities: Tensor) -> None:
        """Add the probabilities of the next B images, (B, K)."""
        part = slice(self._done, self._done + len(probabilities))
        self._done = part.stop
        truth = self._labels[part]
        best = probabilities.topk(min(TOP, probabilities.shape[1])).indices.numpy()
        self.probabilities[part] = probabilities.numpy()[np.arange(len(truth)), truth]
        self.predicted[part] = [self._described[index] for index in best[:, 0]]
        self.in_top5[part] = (best == truth[:, None]).any(1)
        self.is_right[part] = best[:, 0] == truth


def mcnemar_p(only_one: int, only_other: int) -> float:
    """Return McNemar's exact two-sided p: how likely a division this unequal is if both networks err equally often.

    Args:
        only_one: number of images that only one of them predicts correctly.
        only_other: number of images that only the other one predicts correctly.
    """
    n = only_one + only_other
    ways = (
        math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) for k in range(min(only_one, only_other) + 1)
    )
    return min(1.0, 2 * sum(math.exp(way - n * math.log(2)) for way in ways))


def format_comparison(comparison: Comparison) -> str:
    """Return tables for people: by class, over all images, each pair of networks, and the verdict last."""
    titles, names = (tuple(map(printable, texts)) for texts in (comparison.titles, comparison.names))
    wide = max(len(title) for title in (*titles, "average"))
    columns = [max(len(name), 15) for name in names]

    def line(title: str, count: str, cells: list[str]) -> str:
        return f"{title:<{wide}} {count:>7}  " + "  ".join(f"{c:>{w}}" for c, w in zip(cells, columns, strict=True))

    lines = [line("class", "images", list(names)), line("", "", ["true p   error"] * len(names))]
    for label, title in enumerate(titles):
        of_class = comparison.probabilities[:, comparison.images.labels == label]
        count = of_class.shape[1]
        # A class has no images if all of them were skipped.
        cells = [f"{p:.4f}  {1 - p:.4f}" for p in of_class.mean(1)] if count else []
        lines.append(line(title, str(count), cells or ["-"] * len(names)))
    count = comparison.probabilities.shape[1]
    totals = comparison.probabilities.sum(1)
    lines.append(line("total", str(count), [f"{p:.2f}  {count - p:.2f}" for p in totals]))
    lines.append(line("average", "", [f"{p / count:.4f}  {1 - p / count:.4f}" for p in totals]))
    lines.append(line("top-1 %", "", [f"{100 * share:.2f}" for share in comparison.is_right.mean(1)]))
    if comparison.has_top5:
        lines.append(line("top-5 %", "", [f"{100 * share:.2f}" for share in comparison.in_top5.mean(1)]))
    notes = (*describe_protocols(comparison), *describe_pairs(comparison), describe_verdict(comparison))
    return "\n".join([*lines, *map(printable, notes)])


def describe_protocols(comparison: Comparison) -> list[str]:
    """Return a line about how the networks see images, or a line for each network if they differ."""
    if len(set(comparison.protocols)) == 1:
        return [comparison.protocols[0]]
    return [f"{name}: {protocol}" for name, protocol in zip(comparison.names, comparison.protocols, strict=True)]


def describe_verdict(comparison: Comparison) -> str:
    """Return what came of the comparison in a sentence: each network's top-1, and whether two of them differ."""
    names, top1 = comparison.names, 100 * comparison.is_right.mean(1)
    figures = [f"{name} {value:.2f} %" for name, value in zip(names, top1, strict=True)]
    text = f"{' against '.join(figures)} of {comparison.is_right.shape[1]:,} images"
    if len(names) != 2:
        return text
    first, second = comparison.is_right
    p = mcnemar_p(int((first & ~second).sum()), int((second & ~first).sum()))
    text += ", p < 0.001" if p < 0.001 else f", p = {p:.2g}"
    return text if p < CHANCE else f"{text}: no difference that these images show"


def describe_pairs(comparison: Comparison) -> list[str]:
    """Return a line for each pair of networks: how many images only one predicts correctly, and McNemar's p."""
    lines = []
    for (name, is_right), (other_name, is_other_right) in itertools.combinations(
        zip(comparison.names, comparison.is_right, strict=True), 2
    ):
        alone = int((is_right & ~is_other_right).sum()), int((is_other_right & ~is_right).sum())
        lines.append(
            f"only {name} right: {alone[0]}, only {other_name} right: {alone[1]}; "
            f"McNemar's exact p = {mcnemar_p(*alone):.3g}"
        )
    return lines


def encode_csv(comparison: Comparison) -> str:
    """Return a row for each image: its class, and each network's probability of it and likeliest class."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    heads = [f"{name} {column}" for name in comparison.names for column in ("p", "predicted")]
    writer.writerow(["file", "class", *map(guard, heads)])
    images = comparison.images
    for index in range(len(images)):
        cells = zip(comparison.probabilities[:, index], comparison.predicted[:, index], strict=True)
        row = [cell for p, predicted in cells for cell in (f"{p:.6f}", predicted)]
        writer.writerow(map(guard, [images.name(index), images.classes[images.labels[index]], *row]))
    return text.getvalue()


def _title(classes: tuple[str, ...]) -> tuple[str, ...]:
    named = zip(classes, short_class_names(classes), strict=True)
    return tuple(words if name in words else f"{words} ({name})" for name, words in named)


def distinguish(networks: "Sequence[Classifier | Segmenter | Detector]") -> tuple[str, ...]:
    """Return the networks' names; if two are equal, with the differing parts of their sources, or numbered."""
    names = [network.name for network in networks]
    if len(set(names)) < len(names):
        parts = _drop_shared([network.source.split("/") for network in networks])
        parts = _drop_shared([source[::-1] for source in parts])
        differing = ["/".join(source[::-1]) for source in parts]
        names = [f"{name} ({where})" if where else name for name, where in zip(names, differing, strict=True)]
    if len(set(names)) < len(names):
        names = [f"{name} {number}" for number, name in enumerate(names, 1)]
    return tuple(names)


def require_same_classes(networks: "Sequence[Segmenter | Detector]") -> None:
    """Raise a ConfigError unless all networks have the same classes in the same order."""
    first = networks[0]
    for other in networks[1:]:
        if other.classes == first.classes:
            continue
        if len(other.classes) != len(first.classes):
            what = f"{len(first.classes)} classes, {other.source} {len(other.classes)}"
        else:
            pairs = zip(first.classes, other.classes, strict=True)
            index, names = next((index, names) for index, names in enumerate(pairs) if names[0] != names[1])
            what = f"{names[0]} as class {index}, {other.source} {names[1]}"
        raise ConfigError(f"{first.source} has {what}: compare networks of the same classes")


def _drop_shared(lists: list[list[str]]) -> list[list[str]]:
    """Drop the first items that are the same in all lists."""
    shared = sum(1 for _ in itertools.takewhile(lambda items: len(set(items)) == 1, zip(*lists, strict=False)))
    return [items[shared:] for items in lists]
