"""Finds the images with the most errors of a detector, with their objects and detections."""

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from resnest_imagenet.data.coco import Instances, open_coco
from resnest_imagenet.data.decoding import BadImage
from resnest_imagenet.errors import DataError, UserError
from resnest_imagenet.evaluation.box_files import SHOWN, BoxFiles, ImageRow
from resnest_imagenet.evaluation.detection_errors import ERRORS, DetectionErrors, Outcome, find_errors
from resnest_imagenet.evaluation.detections import DetectionTable, read_results
from resnest_imagenet.evaluation.ground_truth import GroundTruth, open_ground_truth
from resnest_imagenet.evaluation.masks import decode_mask
from resnest_imagenet.instances import list_corners

COUNT = 12  # images


@dataclass(frozen=True, eq=False)
class NamedBoxes:
    """Objects, or detections, of one image.

    Attributes:
        boxes: float64 (n, 4), x1 y1 x2 y2 in pixels of the image.
        labels: int64 (n,).
        notes: n texts: what is wrong with each; "" if nothing is.
        scores: float64 (n,); None: of objects.
        masks: n of bool (H, W); None: boxes only.
    """

    boxes: np.ndarray
    labels: np.ndarray
    notes: tuple[str, ...]
    scores: np.ndarray | None = None
    masks: tuple[np.ndarray, ...] | None = None


@dataclass(frozen=True, eq=False)
class WorstImage:
    """An image of an evaluation.

    Attributes:
        row: its line of images.csv.
        pixels: uint8 (H, W, 3), upright; None if there is a fault.
        truth: its objects, with crowds; None likewise.
        detections: with a score of at least `SHOWN`, the most certain first; None likewise.
        wrong: how many of these are wrong, by the kind of error.
        fault: why it cannot be shown, in one line; "" otherwise.
    """

    row: ImageRow
    pixels: np.ndarray | None = None
    truth: NamedBoxes | None = None
    detections: NamedBoxes | None = None
    wrong: tuple[tuple[str, int], ...] = ()
    fault: str = ""


@dataclass(frozen=True, eq=False)
class WorstImages:
    """The images with the most errors, the worst first.

    Attributes:
        images: of the evaluation.
        classes: K names.
    """

    images: tuple[WorstImage, ...]
    classes: tuple[str, ...]


def rank_images(rows: Sequence[ImageRow], count: int = COUNT) -> list[ImageRow]:
    """Return the images with the most missed objects and wrong detections, the worst first."""
    return sorted(filter(lambda row: row.num_faults > 0, rows), key=lambda row: -row.num_faults)[:count]


def find_worst_images(
    files: BoxFiles, root: str, json: str | None = None, images: str | None = None, count: int = COUNT
) -> WorstImages:
    """Read the worst images of an evaluation with their objects and detections; no network is needed.

    Args:
        files: of `read_box_files`.
        root: of the data set, as are the next two: see `open_coco`.
        json: the annotations of its val part.
        images: the folder of its images.
        count: of images.

    Raises:
        UserError: the data set cannot be read, or is another one than that of the evaluation.
    """
    return view_rows(files, rank_images(files.images, count), root, json, images)


def view_rows(
    files: BoxFiles, rows: Sequence[ImageRow], root: str, json: str | None = None, images: str | None = None
) -> WorstImages:
    """Read some images of an evaluation as `find_worst_images` does; `rows` are theirs."""
    masks = files.has_masks
    instances = open_coco(root, "val", json, images, masks=masks)
    truth = open_ground_truth(instances, masks=masks)
    if tuple(row.name for row in files.ap if row.kind == "box") != truth.classes:
        raise DataError(f"{instances.json}: its classes are not those of the evaluation")
    table = read_results(files.detections, truth)
    places = {os.path.abspath(instances.images.name(index)): index for index in range(len(instances))}
    chosen = [places[row.file] for row in rows if row.file in places]
    table = table.select(np.isin(table.images, chosen))
    errors = find_errors(table, truth, "box")
    views = [_view_image(row, places.get(row.file), instances, table, truth, errors) for row in rows]
    return WorstImages(tuple(views), truth.classes)


def _view_image(
    row: ImageRow,
    index: int | None,
    instances: Instances,
    table: DetectionTable,
    truth: GroundTruth,
    errors: DetectionErrors,
) -> WorstImage:
    """Return an image with its objects and detections, or with the fault that prevents it."""
    if index is None:
        return WorstImage(row, fault=f"{row.file}: not an image of {instances.json}")
    try:
        pixels = np.asarray(instances.read(index))
    except (BadImage, UserError) as error:
        return WorstImage(row, fault=str(error))
    shown = np.flatnonzero((table.images == index) & (table.scores >= SHOWN))
    shown = shown[np.argsort(-table.scores[shown], kind="stable")]
    outcomes = [Outcome(outcome) for outcome in errors.outcomes[shown].tolist()]
    objects = np.flatnonzero(truth.images == index)
    hits = set(errors.objects[shown][errors.outcomes[shown] == Outcome.CORRECT].tolist())
    wrong = Counter(outcome.name.lower() for outcome in outcomes if outcome in ERRORS)
    return WorstImage(
        row,
        pixels,
        NamedBoxes(
            list_corners(truth.boxes[objects]),
            truth.labels[objects],
            tuple(_name_object(bool(truth.crowds[number]), number in hits) for number in objects.tolist()),
            masks=_decode(truth.masks, objects, truth.size(index)),
        ),
        NamedBoxes(
            table.corners[shown],
            table.labels[shown],
            tuple(outcome.name.lower() if outcome in ERRORS else "" for outcome in outcomes),
            table.scores[shown],
            _decode(table.masks, shown, truth.size(index)),
        ),
        tuple((error.name.lower(), wrong[error.name.lower()]) for error in ERRORS if wrong[error.name.lower()]),
    )


def _name_object(is_crowd: bool, is_found: bool) -> str:
    if is_crowd:
        return "crowd"
    return "" if is_found else "not found"


def _decode(codes: Sequence[bytes] | None, rows: np.ndarray, size: tuple[int, int]) -> tuple[np.ndarray, ...] | None:
    return None if codes is None else tuple(decode_mask(codes[row], size) for row in rows.tolist())
