"""A contact sheet of a run's validation images, evenly spaced, with what its best network finds in them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps

from resnest_imagenet.config import TrainConfig
from resnest_imagenet.data.decoding import BadImage, decode_by_pillow
from resnest_imagenet.data.source import read_named
from resnest_imagenet.errors import UserError
from resnest_imagenet.evaluation.box_files import read_box_files
from resnest_imagenet.evaluation.box_pictures import draw_detections, make_box_palette
from resnest_imagenet.evaluation.overlays import overlay_mask
from resnest_imagenet.evaluation.predictions import read_predictions
from resnest_imagenet.evaluation.region_files import read_regions
from resnest_imagenet.evaluation.worst_images import view_rows
from resnest_imagenet.inference.segment import segment
from resnest_imagenet.inference.segmenter import open_segmenter
from resnest_imagenet.models.imagenet_classes import short_class_names
from resnest_imagenet.recipe import ClassificationRecipe, DetectionRecipe, SegmentationRecipe
from resnest_imagenet.tasks.pictures import shorten

IMAGES, COLUMNS, SIDE = 24, 6, 176  # of classes: at most, side by side, and in pixels
LARGE_IMAGES, LARGE_COLUMNS, LARGE_SIDE = 6, 3, 352  # of scenes and objects, which are slower and have more to see
MARGIN, CAPTION = 6, 34  # pixels between pictures, and below each for two lines
RIGHT, WRONG = "black", "#b8431f"


@dataclass(frozen=True)
class Cell:
    """A picture above two lines; a wrong one has a frame."""

    picture: Image.Image
    lines: tuple[str, str]
    is_wrong: bool = False


def draw_val_sheet(config: TrainConfig, device: torch.device) -> np.ndarray | None:
    """Draw what the best network of a finished run finds, uint8 (H, W, 3); None of a task without pictures here.

    Args:
        config: of the run; its folder has the best evaluation's files, and checkpoints/best.pt.
        device: of the segmentation of scenes; the other tasks' predictions are in files.

    Raises:
        UserError: a file is not there.
    """
    recipe, folder = config.train, Path(config.run_dir)
    if isinstance(recipe, ClassificationRecipe):
        return _draw_sheet(list(_show_classes(folder)), COLUMNS, SIDE)
    if isinstance(recipe, SegmentationRecipe):
        return _draw_sheet(list(_show_scenes(folder, device)), LARGE_COLUMNS, LARGE_SIDE)
    if isinstance(recipe, DetectionRecipe):
        return _draw_sheet(list(_show_objects(config, folder)), LARGE_COLUMNS, LARGE_SIDE)
    return None


def _show_classes(folder: Path) -> Iterator[Cell]:
    predictions = read_predictions(folder / "predictions.csv")[0]
    evaluation, names = predictions.evaluation, short_class_names(predictions.classes)
    for index in _space_evenly(evaluation.count, IMAGES):
        truth, predicted = names[evaluation.labels[index]], names[evaluation.predicted[index]]
        is_wrong = bool(evaluation.labels[index] != evaluation.predicted[index])  # two classes may have one short name
        lines = f"{predicted} {100 * evaluation.confidence[index]:.0f} %", f"not {truth}" if is_wrong else ""
        try:
            picture = Image.fromarray(decode_by_pillow(read_named(str(predictions.files[index]))))
        except (BadImage, OSError, RuntimeError, ValueError):  # moved or changed since
            continue
        yield Cell(ImageOps.fit(picture, (SIDE, SIDE)), lines, is_wrong)


def _show_scenes(folder: Path, device: torch.device) -> Iterator[Cell]:
    evaluation = read_regions(folder / "iou.csv", folder / "scenes.csv")[0]
    regions, network = evaluation.regions, open_segmenter(folder / "checkpoints/best.pt", device=device)
    chosen = _space_evenly(len(evaluation.files), LARGE_IMAGES)
    shares = {
        evaluation.files[index]: 100 * regions.correct[index] / max(int(regions.labelled[index]), 1) for index in chosen
    }
    for image in segment(network, list(shares)):
        picture = Image.fromarray(overlay_mask(image.pixels, image.mask, network.palette))
        line = f"{shares[image.file]:.1f} % of the pixels right" if image.file in shares else ""
        yield Cell(ImageOps.contain(picture, (LARGE_SIDE, LARGE_SIDE)), (Path(image.file).name, line))


def _show_objects(config: TrainConfig, folder: Path) -> Iterator[Cell]:
    files, data = read_box_files(folder), config.data
    if files is None:
        return
    rows = [files.images[index] for index in _space_evenly(len(files.images), LARGE_IMAGES)]
    view = view_rows(files, rows, data.root, data.val_json, data.val_dir)
    palette = make_box_palette(len(view.classes))
    for image in view.images:
        if image.pixels is None or image.detections is None:
            continue
        height, width = image.pixels.shape[:2]
        scale = LARGE_SIDE / max(height, width)
        size = max(1, round(width * scale)), max(1, round(height * scale))
        small, found = np.asarray(Image.fromarray(image.pixels).resize(size)), image.detections
        drawn = draw_detections(small, found.boxes * scale, found.labels, view.classes, palette, found.scores)
        line = f"{image.row.correct} of {image.row.objects} objects found, wrong: {image.row.wrong}"
        yield Cell(Image.fromarray(drawn), (Path(image.row.file).name, line))


def _space_evenly(number: int, most: int) -> list[int]:
    return np.unique(np.linspace(0, number - 1, min(number, most)).round().astype(int)).tolist() if number else []


def _draw_sheet(cells: Sequence[Cell], columns: int, side: int) -> np.ndarray:
    """Draw cells in rows, uint8 (H, W, 3).

    Raises:
        UserError: there is none.
    """
    if not cells:
        raise UserError("no picture of the validation set can be read")
    step, font = side + MARGIN, ImageFont.load_default(13)
    num_rows = -(-len(cells) // columns)
    sheet = Image.new("RGB", (step * min(columns, len(cells)) + MARGIN, (step + CAPTION) * num_rows + MARGIN), "white")
    pen = ImageDraw.Draw(sheet)
    for number, cell in enumerate(cells):
        row, column = divmod(number, columns)
        left, top = MARGIN + column * step, MARGIN + row * (step + CAPTION)
        sheet.paste(cell.picture, (left, top))
        if cell.is_wrong:
            pen.rectangle((left - 2, top - 2, left + side + 1, top + side + 1), outline=WRONG, width=3)
        for line, text in enumerate(cell.lines):
            place = left, top + side + 1 + 16 * line
            pen.text(place, shorten(text, side, font), WRONG if cell.is_wrong and line else RIGHT, font)
    return np.asarray(sheet)
