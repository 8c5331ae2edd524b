"""Predicts the likeliest classes of images."""

import csv
import io
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from os import PathLike

import numpy as np
from torch import Tensor
from tqdm import tqdm

from resnest_imagenet.data.examine import split_unreadable
from resnest_imagenet.data.source import ImageSource
from resnest_imagenet.errors import printable
from resnest_imagenet.evaluation.cells import guard
from resnest_imagenet.evaluation.class_table import format_classes, list_classes
from resnest_imagenet.evaluation.mistakes import measure_classes
from resnest_imagenet.inference.classifier import (
    Classifier,
    compute_probabilities,
    find_outputs,
    load_in_order,
    take_classifier,
)
from resnest_imagenet.inference.images import Images, list_images
from resnest_imagenet.inference.options import check_arguments
from resnest_imagenet.models.imagenet_classes import class_words
from resnest_imagenet.models.mirror import average_views


@dataclass(frozen=True)
class Prediction:
    """One of the likeliest classes of an image.

    Attributes:
        file: the image's.
        rank: 1 for the likeliest.
        label: the class's name in the checkpoint: its folder, or a synset.
        description: the class in words.
        probability: between 0 and 1.
        true_label: the class whose folder the file is in; None if its folder is not named as one of the classes.
    """

    file: str
    rank: int
    label: str
    description: str
    probability: float
    true_label: str | None = None


def predict(
    network: Classifier | str | PathLike[str],
    images: Images,
    top: int = 5,
    *,
    batch_size: int = 64,
    precision: str = "fp32",
    tta: str | None = None,
    loader: str = "auto",
    workers: int | None = None,
) -> tuple[list[Prediction], list[str]]:
    """Predict the likeliest classes of images; images that cannot be used are skipped.

    Args:
        network: of `open_classifier`, or a source that it takes.
        images: files, folders or patterns such as "photos/**/*.jpg", one or several.
        top: number of classes for each image.
        batch_size: images at a time.
        precision: fp32, bf16 or fp16.
        tta: "flip": the mean of the probabilities of an image and its mirror image. None: of the image alone.
        loader: decodes the images: "auto", "dali" or "torchvision".
        workers: number of the loader's threads or processes; None: this process's cores, at most 8.

    Returns:
        The predictions, by image and rank, and a line for each image that was skipped.

    Raises:
        UserError: a user's error, in one line.
    """
    arguments = check_arguments(
        top=top, batch_size=batch_size, precision=precision, tta=tta, loader=loader, workers=workers
    )
    listed = list_images(images)
    classifier = take_classifier(network)
    averaged = replace(classifier, module=average_views(classifier.module, tta))
    usable, skipped = split_unreadable(listed)
    predictions: list[Prediction] = []
    if not len(usable):
        return predictions, skipped
    batches = load_in_order([classifier], usable, arguments)
    done, truth = 0, find_true_labels(usable, classifier.classes)
    with tqdm(total=len(usable), unit="image", disable=None, dynamic_ncols=True, leave=False) as progress:
        for (probabilities,) in compute_probabilities([averaged], batches, precision, usable.name):
            part = range(done, done + len(probabilities))
            files = [(usable.name(index), truth[index]) for index in part]
            predictions += _rank_classes(classifier.classes, files, probabilities, arguments.top)
            done = part.stop
            progress.update(len(files))
    return predictions, skipped


def find_true_labels(images: ImageSource, classes: Sequence[str]) -> list[str | None]:
    """Return for each image the class that its folder names, or None.

    Args:
        images: in any folders.
        classes: of the network; a folder may also have the words of a class, as `find_outputs` takes them.
    """
    folders = [os.path.basename(os.path.dirname(images.name(index))) for index in range(len(images))]
    names = list(dict.fromkeys(folders))
    outputs = dict(zip(names, find_outputs(names, classes), strict=True))
    return [classes[outputs[folder][0]] if len(outputs[folder]) == 1 else None for folder in folders]


def _rank_classes(
    classes: Sequence[str], files: Sequence[tuple[str, str | None]], probabilities: Tensor, top: int
) -> Iterator[Prediction]:
    """Yield the likeliest classes of each of B images, given with their true labels; probabilities are (B, K)."""
    described = class_words(classes)
    best = probabilities.topk(min(top, probabilities.shape[1]))
    for (file, truth), values, indices in zip(files, best.values.tolist(), best.indices.tolist(), strict=True):
        for rank, (value, index) in enumerate(zip(values, indices, strict=True), 1):
            yield Prediction(file, rank, classes[index], described[index], round(value, 6), truth)


def format_predictions(predictions: list[Prediction]) -> str:
    """Return a table for people: each image with its likeliest classes."""
    lines = []
    for prediction in predictions:
        label, words = prediction.label, prediction.description
        lines += [printable(prediction.file)] if prediction.rank == 1 else []
        name = words if words == label else f"{words} ({label})"
        lines.append(f"  {100 * prediction.probability:>6.2f} %  {printable(name)}")
    return "\n".join(lines)


def format_judgement(predictions: list[Prediction]) -> str:
    """Return for people how many images in folders of a class are predicted correctly; "" if no image is in one.

    With images of several classes, the table of `format_classes` follows.
    """
    pairs = [(p.true_label, p.label) for p in predictions if p.rank == 1 and p.true_label is not None]
    if not pairs:
        return ""
    right = sum(truth == label for truth, label in pairs)
    line = f"right: {right:,} of {len(pairs):,} images in folders of their class, {100 * right / len(pairs):.2f} %"
    if len({truth for truth, _ in pairs}) == 1:
        return line
    classes, labels = np.unique(np.array(pairs), return_inverse=True)
    confusions = np.zeros((len(classes), len(classes)), dtype=np.int64)
    np.add.at(confusions, tuple(labels.reshape(-1, 2).T), 1)
    return f"{line}\n\n{format_classes(list_classes(measure_classes(confusions), classes.tolist()))}"


def encode_predictions(predictions: list[Prediction], suffix: str) -> str:
    """Return the predictions as a table: in JSON for ".json", else in CSV.

    The column true_label is in it if an image lies in the folder of a class.
    """
    rows = [asdict(prediction) for prediction in predictions]
    names = [field.name for field in fields(Prediction)]
    if all(prediction.true_label is None for prediction in predictions):
        names.remove("true_label")
        rows = [{name: row[name] for name in names} for row in rows]
    if suffix == ".json":
        return json.dumps(rows, indent=1) + "\n"
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: guard(value) for key, value in row.items()} for row in rows)
    return text.getvalue()
