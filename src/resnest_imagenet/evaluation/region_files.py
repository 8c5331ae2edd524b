"""iou.csv and scenes.csv: how well a network segments each class and each scene, written and read back."""

import csv
import io
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from resnest_imagenet.data.source import ImageSource
from resnest_imagenet.errors import DataError
from resnest_imagenet.evaluation.cells import guard, unguard
from resnest_imagenet.evaluation.regions import Regions

_CLASS_COLUMNS = ("protocol", "class", "iou", "labelled", "predicted")
_SCENE_COLUMNS = ("protocol", "file", "correct", "labelled")


@dataclass(frozen=True)
class NamedRegions:
    """An evaluation with names.

    Attributes:
        protocol: how the network saw the scenes.
        classes: K names, in the order of the matrix.
        files: N names, in the order of the set.
        regions: the evaluation.
    """

    protocol: str
    classes: tuple[str, ...]
    files: tuple[str, ...]
    regions: Regions


def encode_iou(evaluations: Iterable[tuple[str, Regions]], classes: Sequence[str]) -> bytes:
    """Return the content of iou.csv: a row for each protocol and class.

    A row has the class's IoU in percent, its pixels in the ground truth and in the prediction, and how many of its
    pixels in the ground truth were predicted as each class.

    Args:
        evaluations: of a set, each with its protocol.
        classes: K names, in the order of the network's outputs.
    """
    names = [guard(name) for name in classes]
    rows = [
        (protocol, name, float(f"{iou:.6g}"), int(row.sum()), int(predicted), *row.tolist())
        for protocol, regions in evaluations
        for name, iou, row, predicted in zip(names, regions.iou, regions.matrix, regions.matrix.sum(0), strict=True)
    ]
    return _encode((*_CLASS_COLUMNS, *names), rows)


def encode_scenes(images: ImageSource, evaluations: Iterable[tuple[str, Regions]]) -> bytes:
    """Return the content of scenes.csv: a row for each protocol and scene, with its correct and its labelled pixels.

    Args:
        images: the set.
        evaluations: of the set, each with its protocol.
    """
    files = [os.path.abspath(images.name(index)) for index in range(len(images))]  # with a slash first: no formulas
    rows = [
        (protocol, file, int(correct), int(labelled))
        for protocol, regions in evaluations
        for file, correct, labelled in zip(files, regions.correct, regions.labelled, strict=True)
    ]
    return _encode(_SCENE_COLUMNS, rows)


def read_regions(iou: Path, scenes: Path) -> list[NamedRegions]:
    """Read files of `encode_iou` and `encode_scenes`; return the evaluation of each protocol.

    Raises:
        DataError: a file is something else, or they are not of the same evaluations.
    """
    of_classes, of_scenes = _read(iou, _CLASS_COLUMNS, len(_CLASS_COLUMNS)), _read(scenes, _SCENE_COLUMNS, 2)
    if of_classes.keys() != of_scenes.keys():
        raise DataError(f"{iou} and {scenes} are not of the same evaluations")
    evaluations = []
    for protocol, (classes, matrix) in of_classes.items():
        if matrix.shape != (len(classes), len(classes)):
            raise DataError(f"{iou}: {len(classes)} rows of classes, but {matrix.shape[1]} columns")
        files, pixels = of_scenes[protocol]
        regions = Regions(matrix, *pixels.T[:2])
        evaluations.append(NamedRegions(protocol, tuple(map(unguard, classes)), files, regions))
    return evaluations


def _read(path: Path, columns: tuple[str, ...], first: int) -> dict[str, tuple[tuple[str, ...], np.ndarray]]:
    """Return the names in a file's second column and its numbers, int64, by protocol.

    Args:
        path: of the file.
        columns: the first columns of its header.
        first: the first column of the numbers.
    """
    try:
        with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
            header, *rows = list(csv.reader(file)) or [[]]
        if tuple(header[: len(columns)]) != columns:
            raise ValueError(f"its first line does not begin with {','.join(columns)}")
        by_protocol: dict[str, list[list[str]]] = {}
        for row in rows:
            by_protocol.setdefault(row[0], []).append(row)
        return {
            protocol: (tuple(row[1] for row in rows), np.array([row[first:] for row in rows]).astype(np.int64))
            for protocol, rows in by_protocol.items()
        }
    except (OSError, ValueError, IndexError, csv.Error) as error:
        raise DataError(f"{path}: not the regions of an evaluation ({error})") from error


def _encode(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> bytes:
    text = io.StringIO()
    # All names are quoted: a name may have a line break of any kind.
    writer = csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
    writer.writerow(columns)
    writer.writerows(rows)
    return text.getvalue().encode("utf-8", errors="surrogateescape")
