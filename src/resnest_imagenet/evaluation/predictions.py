"""predictions.csv: what a network said of each image of a set, written and read back."""

import csv
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from resnest_imagenet.data.source import ImageSource
from resnest_imagenet.errors import DataError
from resnest_imagenet.evaluation.counting import Evaluation
from resnest_imagenet.files import replacing

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


def write_predictions(path: Path, images: ImageSource, evaluations: list[tuple[str, Evaluation]]) -> None:
    """Write a row for each protocol and image.

    Args:
        path: of the file, which is replaced.
        images: the set.
        evaluations: of the set, each with its protocol.

    Raises:
        StorageError: it cannot be written.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for protocol, said in evaluations:
        for index in range(len(images)):
            names = images.classes[said.labels[index]], images.classes[said.predicted[index]]
            values = (said.confidence[index], said.true_probability[index])
            row = (protocol, images.name(index), *names, int(said.in_top5[index]), *(f"{p:.6g}" for p in values))
            writer.writerow(row)
    with replacing(path) as file:
        file.write(text.getvalue().encode(errors="surrogateescape"))


def read_predictions(path: Path) -> list[Predictions]:
    """Read what `write_predictions` wrote, one for each protocol.

    Raises:
        DataError: it is no such file.
    """
    try:
        with open(path, newline="", errors="surrogateescape") as file:
            rows = list(csv.reader(file))
        if not rows or tuple(rows[0]) != _COLUMNS:
            raise ValueError(f"its first line is not {','.join(_COLUMNS)}")
        columns = np.array(rows[1:], dtype=object).reshape(-1, len(_COLUMNS)).T
        numbers = columns[4:].astype(np.float64)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not the predictions of an evaluation ({error})") from error
    return [
        _name(str(protocol), columns[:, chosen], numbers[:, chosen])
        for protocol in dict.fromkeys(columns[0])
        for chosen in [columns[0] == protocol]
    ]


def _name(protocol: str, columns: np.ndarray, numbers: np.ndarray) -> Predictions:
    names = columns[2:4].astype(str)
    classes, positions = np.unique(names, return_inverse=True)
    labels, predicted = positions.reshape(names.shape)
    in_top5, confidence, true_probability = numbers
    said = Evaluation(labels, predicted, in_top5.astype(bool), confidence, true_probability)
    return Predictions(protocol, columns[1], tuple(classes.tolist()), said)
