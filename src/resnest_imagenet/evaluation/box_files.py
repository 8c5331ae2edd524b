"""The files that describe a detector: ap.csv, precision_recall.csv, errors.csv, images.csv and detections.json.

All but the last are written and read back here; `evaluation.detections` reads results in COCO's form.
"""

import csv
import io
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from resnest_imagenet.data.source import ImageSource
from resnest_imagenet.errors import DataError
from resnest_imagenet.evaluation.boxes import FIGURES, RECALLS, BoxScores
from resnest_imagenet.evaluation.cells import guard, unguard
from resnest_imagenet.evaluation.detection_errors import ERRORS, MISSED, DetectionErrors, Outcome, find_errors
from resnest_imagenet.evaluation.detections import DetectionTable, Kind, encode_results
from resnest_imagenet.evaluation.ground_truth import GroundTruth
from resnest_imagenet.files import require_file

_CURVES = (None, 0.5, 0.75)  # IoUs of precision_recall.csv; None: the mean over all
_COUNTED = (Outcome.CORRECT.name.lower(), *(error.name.lower() for error in ERRORS), MISSED)
_AP_COLUMNS = ("kind", "class", "category_id", "objects", "detections", *FIGURES)
_CURVE_COLUMNS = ("kind", "class", "iou", *(f"{recall:.2f}" for recall in RECALLS))
_ERROR_COLUMNS = ("kind", "class", *_COUNTED)
_IMAGE_COLUMNS = ("file", "objects", "correct", "wrong")
SHOWN = 0.5  # score from which on a detection counts in images.csv
ALL_CLASSES = ""  # stands in errors.csv for the AP50 that each kind of error costs

Cell = float | None


@dataclass(frozen=True)
class ClassRow:
    """A class in one of the files.

    Attributes:
        kind: "box" or "mask".
        name: of the class.
        values: by column; None if the class has no objects to compute the value from.
    """

    kind: str
    name: str
    values: dict[str, Cell]


class ImageRow(NamedTuple):
    """An image in images.csv: see `encode_images`."""

    file: str
    objects: int
    correct: int
    wrong: int

    @property
    def num_faults(self) -> int:
        """Number of objects that were not found, plus detections that are wrong."""
        return self.objects - self.correct + self.wrong


@dataclass(frozen=True, eq=False)
class BoxFiles:
    """The files about the best detector in a run folder.

    Attributes:
        ap: rows of ap.csv.
        curves: of precision_recall.csv, see `read_curves`.
        errors: rows of errors.csv.
        images: rows of images.csv.
        detections: the path of detections.json.
    """

    ap: list[ClassRow]
    curves: dict[tuple[str, str, str], np.ndarray]
    errors: list[ClassRow]
    images: list[ImageRow]
    detections: Path

    @property
    def kinds(self) -> tuple[str, ...]:
        """What was evaluated: ("box",) or ("box", "mask")."""
        return tuple(dict.fromkeys(row.kind for row in self.ap))

    @property
    def has_masks(self) -> bool:
        """Whether masks were evaluated."""
        return "mask" in self.kinds


def encode_ap(scores: BoxScores, truth: GroundTruth) -> bytes:
    """Return the content of ap.csv: a row for each class, for boxes and for masks.

    A row has the class and its number in the data set, its objects without crowds, its detections, and the twelve
    figures in percent. A cell is empty if there are no such objects.

    Args:
        scores: of the evaluation.
        truth: of the set.
    """
    objects = truth.count_objects().tolist()
    detections = np.bincount(scores.detections.labels, minlength=len(truth.classes)).tolist()
    rows = []
    for kind in scores.kinds:
        columns = [_list_cells(kind.per_class(name)) for name in FIGURES]
        for label, (name, number) in enumerate(zip(truth.classes, truth.category_ids.tolist(), strict=True)):
            figures = [column[label] for column in columns]
            rows.append((kind.kind, guard(name), number, objects[label], detections[label], *figures))
    return _encode(_AP_COLUMNS, rows)


def encode_curves(scores: BoxScores, truth: GroundTruth) -> bytes:
    """Return the content of precision_recall.csv: a row for each class with objects and each IoU.

    A row has the precision in percent at 101 recalls. The IoUs are .50, .75 and "mean", the average over all of them.
    """
    rows = [
        (kind.kind, guard(name), "mean" if iou is None else f"{iou:.2f}", *_list_cells(curve))
        for kind in scores.kinds
        for iou in _CURVES
        for name, curve in zip(truth.classes, kind.precision_at(iou), strict=True)
        if not np.isnan(curve[0])
    ]
    return _encode(_CURVE_COLUMNS, rows)


def encode_errors(table: DetectionTable, truth: GroundTruth, errors: Iterable[DetectionErrors]) -> bytes:
    """Return the content of errors.csv: the detections of each class by outcome, and its missed objects.

    The last row for boxes, and that for masks, has no class. Under "correct" it has the AP50 in percent, and under each
    kind of error the points that AP50 would gain without it.

    Args:
        table: the detections.
        truth: of the set.
        errors: of `find_errors`, for boxes, and for masks if they were evaluated.
    """
    rows: list[tuple[Any, ...]] = []
    for of_kind in errors:
        counts = of_kind.count(table, truth)
        for label, name in enumerate(truth.classes):
            rows.append((of_kind.kind, guard(name), *(int(counts[column][label]) for column in _COUNTED)))
        gains = (of_kind.gains[column] for column in _COUNTED[1:])
        rows.append((of_kind.kind, ALL_CLASSES, *_list_cells(np.array([of_kind.ap50, *gains]))))
    return _encode(_ERROR_COLUMNS, rows)


def encode_detections(table: DetectionTable, truth: GroundTruth) -> bytes:
    """Return the content of detections.json: COCO's results with boxes, and with masks if there are any."""
    kinds: tuple[Kind, ...] = ("box",) if table.masks is None else ("box", "mask")
    return encode_results(table, truth, *kinds)


def encode_images(errors: DetectionErrors, table: DetectionTable, truth: GroundTruth, images: ImageSource) -> bytes:
    """Return the content of images.csv: a row for each image.

    A row has the file, the number of objects without crowds, and the numbers of correct and of wrong detections with a
    score of at least .5.

    Args:
        errors: of `find_errors`.
        table: the detections.
        truth: of the set.
        images: the set.
    """
    is_shown = table.scores >= SHOWN
    is_wrong = is_shown & np.isin(errors.outcomes, ERRORS)
    is_correct = is_shown & (errors.outcomes == int(Outcome.CORRECT))
    selected = (truth.images[~truth.crowds], table.images[is_correct], table.images[is_wrong])
    counts = [np.bincount(numbers, minlength=len(images)).tolist() for numbers in selected]
    # Absolute paths begin with a slash: no spreadsheet takes them for a formula.
    files = [os.path.abspath(images.name(index)) for index in range(len(images))]
    return _encode(_IMAGE_COLUMNS, zip(files, *counts, strict=True))


def list_files(scores: BoxScores, truth: GroundTruth, images: ImageSource) -> dict[str, Callable[[], bytes]]:
    """Return the files that describe a detector: by name, a function that returns the content.

    Args:
        scores: of the evaluation.
        truth: of the set.
        images: the set.
    """
    table = scores.detections

    @cache
    def find() -> list[DetectionErrors]:
        return [find_errors(table, truth, kind.kind) for kind in scores.kinds]

    return {
        "ap.csv": partial(encode_ap, scores, truth),
        "precision_recall.csv": partial(encode_curves, scores, truth),
        "errors.csv": lambda: encode_errors(table, truth, find()),
        "images.csv": lambda: encode_images(find()[0], table, truth, images),
        "detections.json": partial(encode_detections, table, truth),
    }


FILES = ("ap.csv", "precision_recall.csv", "errors.csv", "images.csv", "detections.json")


def read_box_files(folder: Path) -> BoxFiles | None:
    """Read the files of `list_files` from a folder; None if one of them is missing.

    Raises:
        DataError: a file has another content, or they are not of the same evaluation.
    """
    paths = ap, curves, errors, images, detections = tuple(folder / name for name in FILES)
    if not all(path.exists() for path in paths):
        return None
    for path in paths:
        require_file(path)
    files = BoxFiles(read_ap(ap), read_curves(curves), read_errors(errors), read_images(images), detections)
    if [row.kind for row in files.errors if row.name == ALL_CLASSES] != list(files.kinds):
        raise DataError(f"{errors}: not of the same evaluation as {ap.name}")
    return files


def read_ap(path: Path) -> list[ClassRow]:
    """Read what `encode_ap` returned.

    Raises:
        DataError: the file has another content.
    """
    return _read(path, _AP_COLUMNS)


def read_curves(path: Path) -> dict[tuple[str, str, str], np.ndarray]:
    """Read what `encode_curves` returned: the precision in percent at RECALLS by kind, IoU and class.

    Raises:
        DataError: the file has another content.
    """
    curves = {}
    for kind, name, iou, *cells in _read_rows(path, _CURVE_COLUMNS):
        curves[kind, iou, unguard(name)] = np.array(_read_cells(path, cells), np.float64)
    return curves


def read_images(path: Path) -> list[ImageRow]:
    """Read what `encode_images` returned.

    Raises:
        DataError: the file has another content.
    """
    rows = []
    for file, *cells in _read_rows(path, _IMAGE_COLUMNS):
        counts = [int(cell or 0) for cell in _read_cells(path, cells)]
        rows.append(ImageRow(file, *counts))
    return rows


def read_errors(path: Path) -> list[ClassRow]:
    """Read what `encode_errors` returned; the rows without a class have the name ALL_CLASSES.

    Raises:
        DataError: the file has another content.
    """
    return _read(path, _ERROR_COLUMNS)


def _read(path: Path, columns: tuple[str, ...]) -> list[ClassRow]:
    rows = []
    for kind, name, *cells in _read_rows(path, columns):
        values = dict(zip(columns[2:], _read_cells(path, cells), strict=True))
        rows.append(ClassRow(kind, unguard(name), values))
    return rows


def _read_rows(path: Path, columns: tuple[str, ...]) -> list[list[str]]:
    try:
        with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
            header, *rows = list(csv.reader(file)) or [[]]
        if tuple(header) != columns:
            raise ValueError(f"its first line is not {','.join(columns[:5])},...")
        if any(len(row) != len(columns) for row in rows):
            raise ValueError("its rows are not of one length")
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"{path}: not of an evaluation of a detector ({error})") from error
    return rows


def _read_cells(path: Path, cells: Sequence[str]) -> list[Cell]:
    try:
        return [float(cell) if cell else None for cell in cells]
    except ValueError as error:
        raise DataError(f"{path}: not of an evaluation of a detector ({error})") from error


def _list_cells(values: np.ndarray) -> list[Any]:
    """Return numbers with six digits, and "" for NaN."""
    return ["" if np.isnan(value) else float(f"{value:.6g}") for value in values.tolist()]


def _encode(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> bytes:
    text = io.StringIO()
    # Quote all names: they may contain line breaks.
    writer = csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
    writer.writerow(columns)
    writer.writerows(rows)
    return text.getvalue().encode("utf-8", errors="surrogateescape")
