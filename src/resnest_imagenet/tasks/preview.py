"""Draws a contact sheet: some training images as the network sees them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from resnest_imagenet import distributed
from resnest_imagenet.config_data import PreviewDataConfig
from resnest_imagenet.data.coco import open_coco
from resnest_imagenet.data.instance_loader import InstanceLoader, restore_pixels
from resnest_imagenet.data.loader import build_loader, choose_loader, to_pixels
from resnest_imagenet.data.parts import ClassifiedData
from resnest_imagenet.data.plan import BatchPlan
from resnest_imagenet.data.scene_loader import SceneLoader
from resnest_imagenet.data.scenes import open_scenes
from resnest_imagenet.data.source import name_unreadable, print_notes
from resnest_imagenet.data.torchvision import decode
from resnest_imagenet.errors import ConfigError, DataError
from resnest_imagenet.evaluation.box_pictures import draw_detections, make_box_palette
from resnest_imagenet.evaluation.overlays import overlay_mask
from resnest_imagenet.files import require_writable, write_atomically
from resnest_imagenet.models.imagenet_classes import short_class_names
from resnest_imagenet.models.zoo import find_pixels
from resnest_imagenet.recipe import ClassificationRecipe, DetectionRecipe, SegmentationRecipe
from resnest_imagenet.tasks.classification import build_train_transform
from resnest_imagenet.tasks.detection import build_instance_transform
from resnest_imagenet.tasks.pictures import shorten
from resnest_imagenet.tasks.segmentation import build_scene_transform

MARGIN = 4  # pixels between the pictures
CAPTION = 18  # pixels above each row
LINE, FONT = 15, 12  # pixels of a line of words below a picture, and of its letters
SMALLEST = 160  # side of a small crop, at least, after it was enlarged
LARGEST = 400  # side in pixels of an image with objects, on the sheet


@dataclass(frozen=True)
class _FixedSamples(BatchPlan):
    """The same samples in every epoch, in one batch."""

    samples: tuple[int, ...] = ()

    def batches(self, epoch: int, start: int = 0) -> Iterator[np.ndarray]:
        yield np.array(self.samples)


@dataclass(frozen=True)
class _Preview:
    """The content of the sheet.

    Attributes:
        names: of the rows.
        originals: a picture for each row, of any size.
        epochs: returns each row's image as the network sees it in an epoch, uint8 (H, W, 3), at most `side`.
        side: of the images in pixels.
        enlarge: whole number by which the images of small crops are enlarged.
        words: returns for each row what was drawn for its image in an epoch, in lines; None: nothing is said.
    """

    names: list[str]
    originals: list[Image.Image]
    epochs: Callable[[int], Sequence[np.ndarray]]
    side: int
    enlarge: int = 1
    words: Callable[[int], Sequence[Sequence[str]]] | None = None

    @property
    def cell(self) -> int:
        """Side of the sheet's cells in pixels."""
        return self.side * self.enlarge


def write_preview(config: PreviewDataConfig) -> int:
    """Write the sheet to `config.out`: a row for each image, the original first; return the number of rows.

    Scenes are drawn under the colours of their masks, which have the same augmentation. Images with objects have boxes
    and names; they have the size that the network sees, or are all smaller by the same factor.

    Raises:
        UserError: a user's error, in one line.
    """
    out, recipe = Path(config.out), config.train
    require_writable(out, "out")
    if isinstance(recipe, ClassificationRecipe):
        preview = _preview_images(config, recipe)
    elif isinstance(recipe, SegmentationRecipe):
        preview = _preview_scenes(config, recipe)
    elif isinstance(recipe, DetectionRecipe):
        preview = _preview_objects(config, recipe)
    else:
        raise ConfigError(f"train.task={recipe.task}: resnest-data preview does not draw this task")
    sheet = _draw_sheet(preview, config.epochs)
    with write_atomically(out) as file:
        sheet.save(file, format="PNG")
    return len(preview.names)


def _preview_images(config: PreviewDataConfig, recipe: ClassificationRecipe) -> _Preview:
    data = config.data
    choose_loader(config.loader.name)
    source = ClassifiedData.of(data.model_dump()).open_part("train")
    print_notes(source)
    samples = _choose_samples(len(source), config.images)
    unreadable = name_unreadable(source, samples)
    if unreadable:
        raise DataError(unreadable)
    plan = _FixedSamples(len(source), len(samples), 1, samples=samples)
    transform, device = build_train_transform(recipe, config.seed), distributed.choose_device(config.device)
    loader = build_loader(config.loader.name, source, plan, transform, device, config.loader.workers)

    def draw_epoch(epoch: int) -> Sequence[np.ndarray]:
        ((images, _),) = loader.batches(epoch)
        return list(to_pixels(images, transform.mean, transform.std))

    originals = [Image.fromarray(decode(source.read(sample)).permute(1, 2, 0).numpy()) for sample in samples]
    titles = short_class_names(source.classes)
    names = [f"{titles[source.labels[sample]]}: {Path(source.name(sample)).name}" for sample in samples]

    def describe_epoch(epoch: int) -> list[tuple[str, str]]:
        pairs = zip(samples, originals, strict=True)
        return [
            transform.describe_draws(epoch, sample, (original.height, original.width)) for sample, original in pairs
        ]

    return _Preview(names, originals, draw_epoch, recipe.crop, _choose_factor(recipe.crop), describe_epoch)


def _choose_factor(side: int) -> int:
    """Return the whole number by which a small crop is enlarged."""
    return max(1, -(-SMALLEST // side))


def _preview_scenes(config: PreviewDataConfig, recipe: SegmentationRecipe) -> _Preview:
    """Preview scenes; they have only one loader, so `loader.name` is not used."""
    data = config.data
    scenes = open_scenes(data.kind, data.root, data.train_dir, "data.train_dir")
    print_notes(scenes.images)
    samples = _choose_samples(len(scenes), config.images)
    unreadable = next(filter(None, map(scenes.name_fault, samples)), None)
    if unreadable:
        raise DataError(unreadable)
    plan = _FixedSamples(len(scenes), len(samples), 1, samples=samples)
    transform, device = build_scene_transform(recipe, config.seed), distributed.choose_device(config.device)
    loader = SceneLoader(scenes, plan, transform, device, config.loader.workers)

    def draw(picture: np.ndarray, mask: np.ndarray) -> np.ndarray:
        return overlay_mask(picture, mask, scenes.palette)

    def draw_epoch(epoch: int) -> Sequence[np.ndarray]:
        ((images, masks),) = loader.batches(epoch)
        return list(map(draw, to_pixels(images), masks.cpu().numpy().astype(np.uint8)))

    originals = [draw(np.asarray(picture), mask) for picture, mask in map(scenes.read, samples)]
    names = [scenes.images.name(sample) for sample in samples]
    pictures = [Image.fromarray(original) for original in originals]
    return _Preview(names, pictures, draw_epoch, recipe.crop, _choose_factor(recipe.crop))


def _preview_objects(config: PreviewDataConfig, recipe: DetectionRecipe) -> _Preview:
    """Preview images with objects; they have only one loader, so `loader.name` is not used."""
    data = config.data
    if data.kind != "coco":
        raise ConfigError(f"data.kind={data.kind}: a detector is trained on data=coco")
    instances = open_coco(data.root, "train", data.train_json, data.train_dir)
    print_notes(instances.images)
    samples = _choose_samples(len(instances), config.images)
    unreadable = next(filter(None, map(instances.name_fault, samples)), None)
    if unreadable:
        raise DataError(unreadable)
    plan, pixels = _FixedSamples(len(instances), len(samples), 1, samples=samples), find_pixels(config.model.name)
    transform, device = build_instance_transform(recipe, config.seed), distributed.choose_device(config.device)
    loader = InstanceLoader(instances, plan, transform, device, pixels, config.loader.workers)
    palette, scale = make_box_palette(len(instances.classes)), min(1.0, LARGEST / recipe.longest)

    def draw(picture: np.ndarray, boxes: np.ndarray, labels: np.ndarray) -> np.ndarray:
        # Names are drawn after scaling, so that they can be read.
        height, width = (max(1, int(side * scale)) for side in picture.shape[:2])
        small = np.asarray(Image.fromarray(picture).resize((width, height), Image.Resampling.LANCZOS))
        return draw_detections(small, boxes * scale, labels, instances.classes, palette)

    def draw_epoch(epoch: int) -> Sequence[np.ndarray]:
        ((images, targets),) = loader.batches(epoch)
        pictures = []
        for picture, target in zip(restore_pixels(images, pixels), targets, strict=True):
            height, width = target.size
            pictures.append(draw(picture[:height, :width], target.boxes.cpu().numpy(), target.labels.cpu().numpy()))
        return pictures

    names = [instances.images.name(sample) for sample in samples]
    return _Preview(names, list(map(instances.read, samples)), draw_epoch, min(recipe.longest, LARGEST))


def _choose_samples(num_samples: int, num_rows: int) -> tuple[int, ...]:
    """Return `num_rows` samples, evenly spaced over the set."""
    return tuple(np.unique(np.linspace(0, num_samples - 1, num_rows).round().astype(int)).tolist())


def _draw_sheet(preview: _Preview, num_epochs: int) -> Image.Image:
    side, font = preview.cell, ImageFont.load_default(FONT)
    step, below = side + MARGIN, 2 * LINE if preview.words else 0
    height = CAPTION + step + below
    tops = [number * height + CAPTION for number in range(len(preview.names))]
    sheet = Image.new("RGB", (step * (1 + num_epochs) + MARGIN, height * len(tops)), "white")
    pen = ImageDraw.Draw(sheet)
    for top, name, original in zip(tops, preview.names, preview.originals, strict=True):
        pen.text((MARGIN, top - CAPTION + 1), shorten(name, sheet.width - 2 * MARGIN, font), "black", font)
        sheet.paste(ImageOps.contain(original, (side, side)), (MARGIN, top))
    for epoch in range(num_epochs):
        left = MARGIN + step * (1 + epoch)
        for top, picture in zip(tops, preview.epochs(epoch), strict=True):
            cell = Image.fromarray(picture)
            size = cell.width * preview.enlarge, cell.height * preview.enlarge
            sheet.paste(cell.resize(size, Image.Resampling.NEAREST), (left, top))
        for top, lines in zip(tops, preview.words(epoch) if preview.words else (), strict=bool(preview.words)):
            for number, text in enumerate(filter(None, lines)):
                pen.text((left, top + side + number * LINE), shorten(text, side, font), "black", font)
    return sheet
