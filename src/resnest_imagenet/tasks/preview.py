"""A contact sheet: what the network gets of some training images."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageOps

from resnest_imagenet import distributed
from resnest_imagenet.config import PreviewDataConfig
from resnest_imagenet.data.loader import build_loader, choose_loader, open_source, to_pixels
from resnest_imagenet.data.plan import BatchPlan
from resnest_imagenet.data.source import name_unreadable, print_notes
from resnest_imagenet.data.torchvision import decode
from resnest_imagenet.errors import ConfigError, DataError
from resnest_imagenet.files import replacing, require_writable
from resnest_imagenet.recipe import ClassificationRecipe
from resnest_imagenet.tasks.classification import build_train_transform

MARGIN = 4  # pixels between the pictures
CAPTION = 14  # pixels above each row


@dataclass(frozen=True)
class _FixedSamples(BatchPlan):
    """The same samples in every epoch, in one batch."""

    samples: tuple[int, ...] = ()

    def batches(self, epoch: int, start: int = 0) -> Iterator[np.ndarray]:
        yield np.array(self.samples)


def write_preview(config: PreviewDataConfig) -> int:
    """Write the sheet to `config.out`: a row for each image, the original first; return the number of rows.

    Raises:
        UserError: for what a user can cause, as one line.
    """
    out, data, recipe = Path(config.out), config.data, config.train
    if not isinstance(recipe, ClassificationRecipe):
        raise ConfigError(f"train.task={recipe.task}: resnest-data preview draws the images of classification only")
    require_writable(out, "out")
    choose_loader(config.loader.name)
    source = open_source(data.kind, data.root, data.train_dir, "data.train_dir")
    print_notes(source)
    samples = tuple(np.unique(np.linspace(0, len(source) - 1, config.images).round().astype(int)).tolist())
    unreadable = name_unreadable(source, samples)
    if unreadable:
        raise DataError(unreadable)
    plan = _FixedSamples(len(source), len(samples), 1, samples=samples)
    transform = build_train_transform(recipe, config.seed)
    device = distributed.choose_device(config.device)
    loader = build_loader(config.loader.name, source, plan, transform, device, config.loader.workers)
    step = recipe.crop + MARGIN
    sheet = Image.new("RGB", (step * (1 + config.epochs) + MARGIN, (step + CAPTION) * len(samples)), "white")
    rows = [number * (step + CAPTION) for number in range(len(samples))]
    for top, sample in zip(rows, samples, strict=True):
        ImageDraw.Draw(sheet).text((MARGIN, top), source.name(sample)[-step * config.epochs // 6 :], "black")
        original = Image.fromarray(decode(source.read(sample)).permute(1, 2, 0).numpy())
        sheet.paste(ImageOps.contain(original, (recipe.crop, recipe.crop)), (MARGIN, top + CAPTION))
    for epoch in range(config.epochs):
        ((images, _),) = loader.batches(epoch)
        for top, picture in zip(rows, to_pixels(images), strict=True):
            sheet.paste(Image.fromarray(picture), (MARGIN + step * (1 + epoch), top + CAPTION))
    with replacing(out) as file:
        sheet.save(file, format="PNG")
    return len(samples)
