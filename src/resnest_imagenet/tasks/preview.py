"""A contact sheet: what the network gets of some training images."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageOps

from resnest_imagenet import distributed
from resnest_imagenet.config import PreviewDataConfig
from resnest_imagenet.data.loader import build_loader, choose_loader, open_source, to_pixels
from resnest_imagenet.data.plan import BatchPlan
from resnest_imagenet.data.scene_loader import SceneLoader
from resnest_imagenet.data.scenes import open_scenes
from resnest_imagenet.data.source import name_unreadable, print_notes
from resnest_imagenet.data.torchvision import decode
from resnest_imagenet.errors import ConfigError, DataError
from resnest_imagenet.evaluation.overlays import overlay_mask
from resnest_imagenet.files import replacing, require_writable
from resnest_imagenet.recipe import ClassificationRecipe, SegmentationRecipe
from resnest_imagenet.tasks.classification import build_train_transform
from resnest_imagenet.tasks.segmentation import build_scene_transform

MARGIN = 4  # pixels between the pictures
CAPTION = 14  # pixels above each row


@dataclass(frozen=True)
class _FixedSamples(BatchPlan):
    """The same samples in every epoch, in one batch."""

    samples: tuple[int, ...] = ()

    def batches(self, epoch: int, start: int = 0) -> Iterator[np.ndarray]:
        yield np.array(self.samples)


@dataclass(frozen=True)
class _Preview:
    """What stands on the sheet.

    Attributes:
        names: of the rows.
        originals: a picture of each row, of any size.
        epochs: yields what the network gets of each row in an epoch, uint8 (crop, crop, 3).
    """

    names: list[str]
    originals: list[Image.Image]
    epochs: Callable[[int], Sequence[np.ndarray]]


def write_preview(config: PreviewDataConfig) -> int:
    """Write the sheet to `config.out`: a row for each image, the original first; return the number of rows.

    Scenes are drawn under the colours of their masks, the mask after the same augmentation as its image.

    Raises:
        UserError: for what a user can cause, as one line.
    """
    out, recipe = Path(config.out), config.train
    require_writable(out, "out")
    if isinstance(recipe, ClassificationRecipe):
        preview = _preview_images(config, recipe)
    elif isinstance(recipe, SegmentationRecipe):
        preview = _preview_scenes(config, recipe)
    else:
        raise ConfigError(f"train.task={recipe.task}: resnest-data preview draws classification and segmentation only")
    sheet = _draw_sheet(preview, recipe.crop, config.epochs)
    with replacing(out) as file:
        sheet.save(file, format="PNG")
    return len(preview.names)


def _preview_images(config: PreviewDataConfig, recipe: ClassificationRecipe) -> _Preview:
    data = config.data
    choose_loader(config.loader.name)
    source = open_source(data.kind, data.root, data.train_dir, "data.train_dir")
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
        return list(to_pixels(images))

    originals = [Image.fromarray(decode(source.read(sample)).permute(1, 2, 0).numpy()) for sample in samples]
    return _Preview([source.name(sample) for sample in samples], originals, draw_epoch)


def _preview_scenes(config: PreviewDataConfig, recipe: SegmentationRecipe) -> _Preview:
    """Scenes have one loader, whatever `loader` is."""
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
    return _Preview(names, [Image.fromarray(original) for original in originals], draw_epoch)


def _choose_samples(num_samples: int, num_rows: int) -> tuple[int, ...]:
    """Return so many samples, evenly spaced over the set."""
    return tuple(np.unique(np.linspace(0, num_samples - 1, num_rows).round().astype(int)).tolist())


def _draw_sheet(preview: _Preview, crop: int, num_epochs: int) -> Image.Image:
    step = crop + MARGIN
    rows = [number * (step + CAPTION) for number in range(len(preview.names))]
    sheet = Image.new("RGB", (step * (1 + num_epochs) + MARGIN, (step + CAPTION) * len(rows)), "white")
    for top, name, original in zip(rows, preview.names, preview.originals, strict=True):
        ImageDraw.Draw(sheet).text((MARGIN, top), name[-step * num_epochs // 6 :], "black")
        sheet.paste(ImageOps.contain(original, (crop, crop)), (MARGIN, top + CAPTION))
    for epoch in range(num_epochs):
        for top, picture in zip(rows, preview.epochs(epoch), strict=True):
            sheet.paste(Image.fromarray(picture), (MARGIN + step * (1 + epoch), top + CAPTION))
    return sheet
