"""Writes the objects in images: a picture of each image, COCO's results, or a table."""

import csv
import io
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from resnest_imagenet.evaluation.box_pictures import draw_detections, make_box_palette
from resnest_imagenet.evaluation.cells import guard
from resnest_imagenet.evaluation.masks import measure_area
from resnest_imagenet.files import naming_storage_errors, write_atomically
from resnest_imagenet.inference.detect import DetectedImage, DetectedImages
from resnest_imagenet.reports.picture_files import describe_older, encode_png, name_pictures, shorten_paths

Writer: TypeAlias = Callable[[DetectedImage], None]  # takes the images of `DetectedImages`, each once, in order

_COLUMNS = ("file", "rank", "label", "score", "x1", "y1", "x2", "y2", "mask_pixels")


def open_files(out: Path, detected: DetectedImages) -> AbstractContextManager[Writer]:
    """Return a context with a function that writes the objects of the next image.

    Args:
        out: a file if its name ends in .json or .csv, complete at the end of the context; otherwise a folder.
        detected: the images that will be written.

    Raises:
        StorageError: a file cannot be written.
    """
    writers = {".json": _open_results, ".csv": _open_table}
    return writers.get(out.suffix, _open_pictures)(out, detected)


@contextmanager
def _open_pictures(folder: Path, detected: DetectedImages) -> Iterator[Writer]:
    classes = detected.detector.classes
    palette, names = make_box_palette(len(classes)), iter(name_pictures(detected.files, [".png"]))

    def write(image: DetectedImage) -> None:
        path = folder / f"{next(names)}.png"
        with naming_storage_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        with write_atomically(path) as file:
            file.write(encode_png(draw_objects(image, classes, palette)))

    yield write


def draw_objects(image: DetectedImage, classes: Sequence[str], palette: np.ndarray) -> np.ndarray:
    """Return an image under the boxes, masks, names and scores of its objects, uint8 (H, W, 3).

    Args:
        image: with its objects.
        classes: names, in the order of the indices.
        palette: uint8 (K, 3), a colour for each class.
    """
    columns = (image.boxes, image.labels, classes, palette, image.scores, image.decoded_masks)
    return draw_detections(image.pixels, *columns)


def describe_written(out: Path, detected: DetectedImages) -> str:
    """Return the end of the line about the files that `open_files` has written.

    It explains the numbers in COCO's results, or counts older pictures in the folder.
    """
    if out.suffix == ".csv":
        return ""
    if out.suffix != ".json":
        return describe_older(out, name_pictures(detected.files, [".png"]), [".png"])
    _, are_names = number_images(detected.files)
    image_id = "the number in the file's name" if are_names else "a count of the images from 1"
    category_id = (
        "a count of the classes from 1" if detected.detector.weights.category_ids is None else "the data set's"
    )
    return f"; image_id is {image_id}, category_id {category_id}"


def number_images(files: Sequence[str]) -> tuple[list[int], bool]:
    """Return an image_id for each file, and whether these are the numbers in the names, as in COCO.

    Unless all names are different numbers, the files are numbered from 1 on.

    Args:
        files: paths.
    """
    stems = [os.path.splitext(os.path.basename(file))[0] for file in files]
    numbers = [int(stem) for stem in stems if stem.isascii() and stem.isdecimal()]
    are_names = 0 < len(files) == len(set(numbers))
    return (numbers if are_names else list(range(1, len(files) + 1))), are_names


@contextmanager
def _open_results(path: Path, detected: DetectedImages) -> Iterator[Writer]:
    image_ids, _ = number_images(detected.files)
    names = iter(zip(image_ids, shorten_paths(detected.files), strict=True))
    with write_atomically(path) as file:
        separator = b"["

        def write(image: DetectedImage) -> None:
            nonlocal separator
            for result in list_results(image, *next(names), detected):
                file.write(separator + json.dumps(result).encode())
                separator = b",\n"

        yield write
        file.write(b"[]\n" if separator == b"[" else b"]\n")


def list_results(image: DetectedImage, image_id: int, name: str, detected: DetectedImages) -> Iterator[dict[str, Any]]:
    """Yield the objects of an image in the form of COCO's results, to the last digit.

    Args:
        image: with its objects.
        image_id: of the image.
        name: of the image.
        detected: the images that include it.
    """
    detector, (height, width) = detected.detector, image.size
    for row, (label, score) in enumerate(zip(image.labels.tolist(), image.scores.tolist(), strict=True)):
        x1, y1, x2, y2 = image.boxes[row].tolist()
        result = {"image_id": image_id, "file_name": name}
        result |= {"category_id": detector.category_ids[label], "category_name": detector.classes[label]}
        result |= {"bbox": [x1, y1, x2 - x1, y2 - y1], "score": score}
        if image.masks is not None:
            result["segmentation"] = {"size": [height, width], "counts": image.masks[row].decode("ascii")}
        yield result


@contextmanager
def _open_table(path: Path, detected: DetectedImages) -> Iterator[Writer]:
    with write_atomically(path) as file:

        def write(image: DetectedImage) -> None:
            file.write(_encode_rows(list_rows(image, detected.detector.classes)))

        file.write(_encode_rows([_COLUMNS]))
        yield write


def list_rows(image: DetectedImage, classes: Sequence[str]) -> Iterator[tuple[Any, ...]]:
    """Yield a row for each object: its box in pixels, to hundredths, and the number of pixels of its mask.

    Args:
        image: with its objects.
        classes: names, in the order of the indices.
    """
    for row, (label, score) in enumerate(zip(image.labels.tolist(), image.scores.tolist(), strict=True)):
        area = "" if image.masks is None else measure_area(image.masks[row], image.size)
        box = image.boxes[row].round(2).tolist()
        yield guard(image.file), row + 1, guard(classes[label]), round(score, 6), *box, area


def _encode_rows(rows: Iterator[tuple[Any, ...]] | Sequence[Sequence[Any]]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode(errors="surrogateescape")
