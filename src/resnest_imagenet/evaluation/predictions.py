"""predictions.csv: a network's prediction for each image of a set, written and read back."""

import csv
import io
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from resnest_imagenet.data.source import ImageSource
from resnest_imagenet.errors import DataError
from resnest_imagenet.evaluation.accuracy import Evaluation
from resnest_imagenet.evaluation.cells import guard, unguard

_COLUMNS = ("protocol", "file", "class", "predicted", "in_top5", "confidence", "true_probability")


@dataclass(frozen=True)
class Predictions:
    """An evaluation with names.

    Attributes:
        protocol: how the images were resized and cropped.
        files: (N,) str, as `ImageSource.name` returns them.
        classes: all classes that are true or predicted for some image, sorted; labels are indices into this list.
        evaluation: of the N images.
    """

    protocol: str
    files: np.ndarray
    classes: tuple[str, ...]
    evaluation: Evaluation


def encode_predictions(images: ImageSource, evaluations: list[tuple[str, Evaluation]]) -> bytes:
    """Return the file's content: a row for each protocol and image.

    Args:
        images: the set.
        evaluations: of the set, each with its protocol.
    """
    text = io.StringIO()
    # All names are quoted: a name may have a line break of any kind.
    writer = csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
    writer.writerow(_COLUMNS)
    for protocol, evaluation in evaluations:
        for index in range(len(images)):
            file = os.path.abspath(images.name(index))  # it begins with a slash, so it is not a formula
            labels = evaluation.labels[index], evaluation.predicted[index]
            true, predicted = (guard(images.classes[label]) for label in labels)
            shares = evaluation.confidence[index], evaluation.true_probability[index]
            values = (float(f"{share:.6g}") for share in shares)
            writer.writerow((protocol, file, true, predicted, int(evaluation.in_top5[index]), *values))
    return text.getvalue().encode("utf-8", errors="surrogateescape")


def read_predictions(path: Path) -> list[Predictions]:
    """Read a file of `encode_predictions`; return the predictions of each protocol.

    Raises:
        DataError: it is not such a file.
    """
    try:
        with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
            rows = list(csv.reader(file))
        if not rows or tuple(rows[0]) != _COLUMNS:
            raise ValueError(f"its first line is not {','.join(_COLUMNS)}")
        columns = np.array(rows[1:], dtype=object).reshape(-1, len(_COLUMNS)).T
        numbers = columns[4:].astype(np.float64)
        if not ((numbers >= 0) & (numbers <= 1)).all():
            raise ValueError("a probability is not between 0 and 1")
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"{path}: not the predictions of an evaluation ({error})") from error
    return [
        _name(str(protocol), columns[:, chosen], numbers[:, chosen])
        for protocol in dict.fromkeys(columns[0])
        for chosen in [columns[0] == protocol]
    ]


def _name(protocol: str, columns: np.ndarray, numbers: np.ndarray) -> Predictions:
    names = np.vectorize(unguard, otypes=[object])(columns[2:4]).astype(str)
    classes, positions = np.unique(names, return_inverse=True)
    labels, predicted = positions.reshape(names.shape)
    in_top5, confidence, true_probability = numbers
    evaluation = Evaluation(labels, predicted, in_top5.astype(bool), confidence, true_probability)
    return Predictions(protocol, columns[1], tuple(classes.tolist()), evaluation)
