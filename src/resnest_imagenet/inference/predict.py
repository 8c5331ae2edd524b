"""Predicts the likeliest classes of images."""

import csv
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from os import PathLike

from torch import Tensor
from tqdm import tqdm

from resnest_imagenet.data.examine import split_unreadable
from resnest_imagenet.errors import printable
from resnest_imagenet.evaluation.cells import guard
from resnest_imagenet.inference.classifier import Classifier, compute_probabilities, load_in_order, take_classifier
from resnest_imagenet.inference.images import Images, list_images
from resnest_imagenet.inference.options import check_arguments
from resnest_imagenet.models.imagenet_classes import class_words


@dataclass(frozen=True)
class Prediction:
    """One of the likeliest classes of an image.

    Attributes:
        file: the image's.
        rank: 1 for the likeliest.
        label: the class's name in the checkpoint: its folder, or a synset.
        description: the class in words.
        probability: between 0 and 1.
    """

    file: str
    rank: int
    label: str
    description: str
    probability: float


def predict(
    network: Classifier | str | PathLike[str],
    images: Images,
    top: int = 5,
    *,
    batch_size: int = 64,
    precision: str = "fp32",
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
        loader: decodes the images: "auto", "dali" or "torchvision".
        workers: number of the loader's threads or processes; None: this process's cores, at most 8.

    Returns:
        The predictions, by image and rank, and a line for each image that was skipped.

    Raises:
        UserError: a user's error, in one line.
    """
    arguments = check_arguments(top=top, batch_size=batch_size, precision=precision, loader=loader, workers=workers)
    listed = list_images(images)
    classifier = take_classifier(network)
    usable, skipped = split_unreadable(listed)
    predictions: list[Prediction] = []
    if not len(usable):
        return predictions, skipped
    batches = load_in_order([classifier], usable, arguments)
    done = 0
    with tqdm(total=len(usable), unit="image", disable=None, dynamic_ncols=True, leave=False) as progress:
        for (probabilities,) in compute_probabilities([classifier], batches, precision, usable.name):
            files = [usable.name(index) for index in range(done, done + len(probabilities))]
            predictions += _rank_classes(classifier.classes, files, probabilities, arguments.top)
            done += len(files)
            progress.update(len(files))
    return predictions, skipped


def _rank_classes(
    classes: Sequence[str], files: Sequence[str], probabilities: Tensor, top: int
) -> Iterator[Prediction]:
    """Yield the likeliest classes of each of B images; their probabilities are (B, K)."""
    described = class_words(classes)
    best = probabilities.topk(min(top, probabilities.shape[1]))
    for file, values, indices in zip(files, best.values.tolist(), best.indices.tolist(), strict=True):
        for rank, (value, index) in enumerate(zip(values, indices, strict=True), 1):
            yield Prediction(file, rank, classes[index], described[index], round(value, 6))


def format_predictions(predictions: list[Prediction]) -> str:
    """Return a table for people: each image with its likeliest classes."""
    lines = []
    for prediction in predictions:
        label, words = prediction.label, prediction.description
        lines += [printable(prediction.file)] if prediction.rank == 1 else []
        name = words if words == label else f"{words} ({label})"
        lines.append(f"  {100 * prediction.probability:>6.2f} %  {printable(name)}")
    return "\n".join(lines)


def encode_predictions(predictions: list[Prediction], suffix: str) -> str:
    """Return the predictions as a table: in JSON for ".json", else in CSV."""
    rows = [asdict(prediction) for prediction in predictions]
    if suffix == ".json":
        return json.dumps(rows, indent=1) + "\n"
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(Prediction)], lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: guard(value) for key, value in row.items()} for row in rows)
    return text.getvalue()
