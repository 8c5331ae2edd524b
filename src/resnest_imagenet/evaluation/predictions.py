"""predictions.csv: what a network predicts for each image of a set, written and read back."""

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
        files: (N,) str, as `ImageSource.name` gives them.
        classes: all that are true or predicted somewhere, sorted; the labels count these.
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
    # All names in quotes: a line break of any kind may be in one.
    writer = csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
    writer.writerow(_COLUMNS)
    for protocol, evaluation in evaluations:
        for index in range(len(images)):
            file = os.path.abspath(images.name(index))  # begins with a slash
            labels = evaluation.labels[index], evaluation.predicted[index]
            true, predicted = (guard(images.classes[label]) for label in labels)
            shares = evaluation.confidence[index], evaluation.true_probability[index]
            values = (float(f"{share:.6g}") for share in shares)
            writer.writerow((protocol, file, true, predicted, int(evaluation.in_top5[index]), *values))
    return text.getvalue().encode("utf-8", errors="surrogateescape")


def read_predictions(path: Path) -> list[Predictions]:
    """Read what `encode_predictions` returned, one for each protocol.

    Raises:
        DataError: it is no such file.
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
