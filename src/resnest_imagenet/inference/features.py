"""Extracts feature vectors of images: what a network computes at a layer, averaged over the places of its maps."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from resnest_imagenet.compute import autocast
from resnest_imagenet.data.examine import split_unreadable
from resnest_imagenet.data.folder import ImageFolder
from resnest_imagenet.errors import ConfigError
from resnest_imagenet.evaluation.accuracy import require_finite
from resnest_imagenet.inference.classifier import Classifier, load_in_order, take_classifier
from resnest_imagenet.inference.images import Images, list_images
from resnest_imagenet.inference.options import Arguments, check_arguments
from resnest_imagenet.models.zoo import find_head

HEAD = "head"  # the name of the classifier's input among the layers


@dataclass(frozen=True)
class Features:
    """Feature vectors of N images.

    Attributes:
        files: the N images' files.
        vectors: float32 (N, C), a row for each image.
        skipped: a line for each image that cannot be used; these are not among the N.
    """

    files: tuple[str, ...]
    vectors: np.ndarray
    skipped: tuple[str, ...]


def extract_features(
    network: Classifier | str | PathLike[str],
    images: Images,
    layer: str = "layer4",
    *,
    batch_size: int = 64,
    precision: str = "fp32",
    loader: str = "auto",
    workers: int | None = None,
) -> Features:
    """Return what a classifier computes at a layer for each image; images that cannot be used are skipped.

    Args:
        network: of `open_classifier`, or a source that it takes: its crop and protocol are the network's own.
        images: files, folders or patterns such as "photos/**/*.jpg", one or several.
        layer: "layer1" to "layer4", whose maps are averaged over their places, or "head", the classifier's input. For
            a ResNeSt "layer4" and "head" are the same.
        batch_size: images at a time.
        precision: of the network, fp32, bf16 or fp16.
        loader: decodes the images: "auto", "dali" or "torchvision".
        workers: number of the loader's threads or processes; None: this process's cores, at most 8.

    Raises:
        ConfigError: the network has no such layer.
        UserError: another user's error, in one line.
    """
    arguments = check_arguments(layer=layer, batch_size=batch_size, precision=precision, loader=loader, workers=workers)
    listed = list_images(images)
    classifier = take_classifier(network)
    if layer != HEAD and layer not in dict(classifier.module.named_modules()):
        raise ConfigError(f"{layer}: {classifier.name} has no layer of that name; {HEAD} is its classifier's input")
    usable, skipped = split_unreadable(listed)
    files = tuple(usable.name(index) for index in range(len(usable)))
    batches = list(_extract_batches(classifier, usable, layer, arguments)) if files else []
    vectors = np.concatenate(batches) if batches else np.empty((0, 0), dtype=np.float32)
    return Features(files, vectors, tuple(skipped))


@torch.inference_mode()
def _extract_batches(
    classifier: Classifier, images: ImageFolder, layer: str, arguments: Arguments
) -> Iterator[np.ndarray]:
    """Yield the vectors of each batch, float32 (B, C)."""
    loader = load_in_order([classifier], images, arguments)
    done = 0
    with (
        tqdm(total=len(images), unit="image", disable=None, dynamic_ncols=True, leave=False) as progress,
        _recording(classifier, layer) as recorded,
    ):
        for batch, _ in loader.batches(epoch=0):
            with autocast(batch.device, arguments.precision):
                logits = classifier.module(batch)
            vectors = recorded.pop()
            is_finite = logits.isfinite().all(1) & vectors.isfinite().all(1)
            require_finite(is_finite.cpu().numpy(), images.name, arguments.precision, done, "features or logits")
            done += len(batch)
            progress.update(len(batch))
            yield vectors.cpu().numpy()


@contextmanager
def _recording(classifier: Classifier, layer: str) -> Iterator[list[Tensor]]:
    """Yield a list to which each forward pass appends its vectors, float32 (B, C)."""
    recorded: list[Tensor] = []

    def record(values: Tensor) -> None:  # averaged at once: the next layer may write into its input
        recorded.append(values.float().flatten(2).mean(2) if values.dim() > 2 else values.float())

    module = classifier.module
    if layer == HEAD:
        head = module.get_submodule(find_head(classifier.name))
        hook = head.register_forward_pre_hook(lambda _, inputs: record(inputs[0]))
    else:
        hook = module.get_submodule(layer).register_forward_hook(lambda _, inputs, output: record(output))
    try:
        yield recorded
    finally:
        hook.remove()


def write_features(file: BinaryIO, features: Features, description: Mapping[str, str]) -> None:
    """Write features as a .npz file: `numpy.load` reads it without pickles.

    It has `files` (N,) str, `features` (N, C) float32, and the description's texts.

    Args:
        file: open for writing.
        features: of the images.
        description: texts by name: how the features were computed.
    """
    arrays: dict[str, Any] = {name: np.array(text) for name, text in description.items()}
    np.savez(file, files=np.array(features.files, dtype=np.str_), features=features.vectors, **arrays)
