"""Several networks on the same images: the probability each gives to the true class, and where they disagree."""

import csv
import io
import itertools
import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from resnest_imagenet import distributed
from resnest_imagenet.compute import keep_freed_memory
from resnest_imagenet.config import CompareConfig
from resnest_imagenet.data.examine import split_unreadable
from resnest_imagenet.data.folder import ImageFolder, read_image_folder
from resnest_imagenet.data.loader import build_loader, choose_loader
from resnest_imagenet.data.plan import plan_evaluation
from resnest_imagenet.data.source import ImageSource, print_notes
from resnest_imagenet.errors import DataError, printable
from resnest_imagenet.evaluation.cells import guard
from resnest_imagenet.files import replacing, require_writable
from resnest_imagenet.inference.classifier import Classifier, compute_probabilities, open_classifier
from resnest_imagenet.inference.labels import label_images
from resnest_imagenet.models.imagenet_classes import class_words, short_class_names
from resnest_imagenet.models.zoo import require_model


@dataclass(frozen=True)
class Comparison:
    """What M networks make of N images.

    Attributes:
        names: of the networks, all different.
        images: with their true classes.
        titles: of the true classes, in words where they are synsets.
        probabilities: (M, N) float64, of the true class.
        predicted: (M, N) str, the likeliest class, in words.
        in_top5: (M, N) bool, whether the true class is among the five likeliest.
        is_right: (M, N) bool, whether it is the likeliest.
        protocols: how each network sees an image.
        skipped: a line for each image that cannot be used; it is none of the N.
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

    @property
    def disagreements(self) -> np.ndarray:
        """The images that some of the networks have right and others not, where they differ most first."""
        differ = np.flatnonzero(self.is_right.any(0) & ~self.is_right.all(0))
        spread = np.ptp(self.probabilities[:, differ], axis=0)
        return differ[np.argsort(-spread, kind="stable")]


def compare_networks(config: CompareConfig) -> Comparison:
    """Compare, and write `config.csv` and `config.page` where they are set.

    Raises:
        UserError: for what a user can cause, as one line.
    """
    for name in config.models or []:
        if name is not None:
            require_model(name)
    choose_loader(config.loader.name)
    for option, path in (("csv", config.csv), ("page", config.page)):
        if path is not None:
            require_writable(Path(path), option)
    device = distributed.choose_device(config.device)
    keep_freed_memory()
    images, faults = split_unreadable(_open_images(config))
    if not len(images):
        raise DataError(faults[0])
    models = config.models or [None] * len(config.ckpt)
    sources = zip(config.ckpt, models, strict=True)
    classifiers = [open_classifier(source, name, config, device) for source, name in sources]
    comparison = replace(_judge(classifiers, images, config, device), skipped=tuple(faults))
    if config.csv is not None:
        with replacing(Path(config.csv)) as file:
            file.write(encode_csv(comparison).encode(errors="surrogateescape"))
    if config.page is not None:
        from resnest_imagenet.reports.compare_page import render_comparison

        page = render_comparison(comparison)
        with replacing(Path(config.page)) as file:
            file.write(page.encode(errors="surrogateescape"))
    return comparison


def _open_images(config: CompareConfig) -> ImageFolder:
    if config.images is not None:
        folder = Path(config.images).absolute()
        images = read_image_folder(str(folder.parent), folder.name, "images")
    else:
        assert config.data.root is not None
        images = read_image_folder(config.data.root, config.data.val_dir, "data.val_dir")
    print_notes(images)
    return images


def _judge(
    classifiers: list[Classifier], images: ImageSource, config: CompareConfig, device: torch.device
) -> Comparison:
    labelled = [label_images(images, each.known, len(each.classes), each.source) for each in classifiers]
    described = [class_words(each.classes) for each in labelled]
    shape = (len(classifiers), len(images))
    probabilities, predicted = np.zeros(shape), np.empty(shape, dtype=object)
    in_top5, is_right = np.zeros(shape, dtype=bool), np.zeros(shape, dtype=bool)
    plan = plan_evaluation(len(images), config.batch_size, 0, 1)
    # Networks that see images alike share the decoded ones.
    transforms = list(dict.fromkeys(classifier.transform for classifier in classifiers))
    total = len(images) * len(transforms)
    with tqdm(total=total, unit="image", disable=None, dynamic_ncols=True, leave=False) as progress:
        for transform in transforms:
            rows = [row for row, classifier in enumerate(classifiers) if classifier.transform == transform]
            alike = [classifiers[row] for row in rows]
            loader = build_loader(config.loader.name, images, plan, transform, device, config.loader.workers)
            done = 0
            for batch in compute_probabilities(alike, loader, device, config.precision, images.name):
                part = slice(done, done + len(batch[0]))
                done = part.stop
                for row, values in zip(rows, batch, strict=True):
                    truth = labelled[row].labels[part]
                    best = values.topk(min(5, values.shape[1])).indices.numpy()
                    probabilities[row, part] = values.numpy()[np.arange(len(truth)), truth]
                    predicted[row, part] = [described[row][index] for index in best[:, 0]]
                    in_top5[row, part] = (best == truth[:, None]).any(1)
                    is_right[row, part] = best[:, 0] == truth
                progress.update(len(batch[0]))
    protocols = tuple(classifier.transform.protocol for classifier in classifiers)
    names, titles = _distinguish(classifiers), _title(images.classes)
    return Comparison(names, images, titles, probabilities, predicted, in_top5, is_right, protocols)


def mcnemar_p(only_one: int, only_other: int) -> float:
    """Return McNemar's exact two-sided p: how likely so unequal a division is if both networks err as often.

    Args:
        only_one: images that only one of them has right.
        only_other: images that only the other has right.
    """
    n = only_one + only_other
    ways = (
        math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) for k in range(min(only_one, only_other) + 1)
    )
    return min(1.0, 2 * sum(math.exp(each - n * math.log(2)) for each in ways))


def format_comparison(comparison: Comparison) -> str:
    """Return tables for people: by class, over all images, and each pair of networks."""
    titles, names = (tuple(map(printable, texts)) for texts in (comparison.titles, comparison.names))
    wide = max(len(title) for title in (*titles, "average"))
    columns = [max(len(name), 15) for name in names]

    def line(title: str, count: str, cells: list[str]) -> str:
        return f"{title:<{wide}} {count:>7}  " + "  ".join(f"{c:>{w}}" for c, w in zip(cells, columns, strict=True))

    lines = [line("class", "images", list(names)), line("", "", ["true p   error"] * len(names))]
    for label, title in enumerate(titles):
        of_class = comparison.probabilities[:, comparison.images.labels == label]
        count = of_class.shape[1]
        cells = [f"{p:.4f}  {1 - p:.4f}" for p in of_class.mean(1)] if count else []  # all images of it were skipped
        lines.append(line(title, str(count), cells or ["-"] * len(names)))
    count = comparison.probabilities.shape[1]
    totals = comparison.probabilities.sum(1)
    lines.append(line("total", str(count), [f"{p:.2f}  {count - p:.2f}" for p in totals]))
    lines.append(line("average", "", [f"{p / count:.4f}  {1 - p / count:.4f}" for p in totals]))
    lines.append(line("top-1 %", "", [f"{100 * share:.2f}" for share in comparison.is_right.mean(1)]))
    lines.append(line("top-5 %", "", [f"{100 * share:.2f}" for share in comparison.in_top5.mean(1)]))
    return "\n".join([*lines, *map(printable, (*describe_protocols(comparison), *describe_pairs(comparison)))])


def describe_protocols(comparison: Comparison) -> list[str]:
    """Return a line about how the networks see images, or one for each of them where they do not see alike."""
    if len(set(comparison.protocols)) == 1:
        return [comparison.protocols[0]]
    return [f"{name}: {protocol}" for name, protocol in zip(comparison.names, comparison.protocols, strict=True)]


def describe_pairs(comparison: Comparison) -> list[str]:
    """Return a line for each pair of networks: where one is right alone, and McNemar's p."""
    lines = []
    for one, other in itertools.combinations(range(len(comparison.names)), 2):
        first, second = comparison.is_right[one], comparison.is_right[other]
        alone = int((first & ~second).sum()), int((second & ~first).sum())
        who, whom = comparison.names[one], comparison.names[other]
        p = mcnemar_p(*alone)
        lines.append(f"only {who} right: {alone[0]}, only {whom} right: {alone[1]}; McNemar's exact p = {p:.3g}")
    return lines


def encode_csv(comparison: Comparison) -> str:
    """Return a row for each image: its class, and each network's probability of it and likeliest class."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    heads = [f"{name} {what}" for name in comparison.names for what in ("p", "predicted")]
    writer.writerow(["file", "class", *map(guard, heads)])
    images = comparison.images
    for index in range(len(images)):
        cells = zip(comparison.probabilities[:, index], comparison.predicted[:, index], strict=True)
        row = [cell for p, predicted in cells for cell in (f"{p:.6f}", predicted)]
        writer.writerow(map(guard, [images.name(index), images.classes[images.labels[index]], *row]))
    return text.getvalue()


def _title(classes: tuple[str, ...]) -> tuple[str, ...]:
    named = zip(classes, short_class_names(classes), strict=True)
    return tuple(name if words == name else f"{words} ({name})" for name, words in named)


def _distinguish(classifiers: list[Classifier]) -> tuple[str, ...]:
    """Return the networks' names; where two have the same, with what differs in their sources, or numbered."""
    names = [classifier.name for classifier in classifiers]
    if len(set(names)) < len(names):
        parts = _drop_shared([classifier.source.split("/") for classifier in classifiers])
        parts = _drop_shared([source[::-1] for source in parts])
        differing = ["/".join(source[::-1]) for source in parts]
        names = [f"{name} ({where})" if where else name for name, where in zip(names, differing, strict=True)]
    if len(set(names)) < len(names):
        names = [f"{name} {number}" for number, name in enumerate(names, 1)]
    return tuple(names)


def _drop_shared(lists: list[list[str]]) -> list[list[str]]:
    """Drop the first items, as far as they are the same in all lists."""
    shared = sum(1 for _ in itertools.takewhile(lambda items: len(set(items)) == 1, zip(*lists, strict=False)))
    return [items[shared:] for items in lists]
