"""Trained networks that give each pixel a class."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from os import PathLike
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from torch import nn

from resnest_imagenet.compute import place
from resnest_imagenet.data.scenes import make_palette
from resnest_imagenet.distributed import choose_device
from resnest_imagenet.errors import CheckpointError, ConfigError
from resnest_imagenet.evaluation.regions import RegionProtocol
from resnest_imagenet.inference.options import take_network
from resnest_imagenet.models.folding import fold_batch_norms
from resnest_imagenet.recipe import RegionProtocolOptions
from resnest_imagenet.weights.load import Weights, read_weights
from resnest_imagenet.weights.segmentation import SEGMENTATION, restore_deeplab


@dataclass(frozen=True)
class Segmenter:
    """A network that is not trained any further.

    Attributes:
        weights: what their source tells; the tensors themselves are the module's.
        name: of the backbone.
        classes: of its outputs, in order.
        palette: uint8 (K, 3), red, green and blue of each class: the data set's own, or those of `make_palette`.
        data_kind: the layout of the scenes that it was trained on.
        protocol: how it sees scenes.
        module: maps normalised images (B, 3, H, W) to logits (B, K, H, W).
    """

    weights: Weights
    name: str
    classes: tuple[str, ...]
    palette: np.ndarray
    data_kind: str
    protocol: RegionProtocol
    module: nn.Module

    @property
    def source(self) -> str:
        """Where its weights are from, as the user gave it."""
        return self.weights.source

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return next(self.module.parameters()).device


def open_segmenter(
    source: Weights | str | PathLike[str],
    choice: str = "auto",
    protocol: RegionProtocolOptions | Mapping[str, Any] | None = None,
    device: str | torch.device = "auto",
) -> Segmenter:
    """Read a network to evaluate or predict with.

    Args:
        source: a checkpoint of a run of this task, or what `read_weights` has made of it.
        choice: "model", "ema" (the moving average), or "auto": the moving average where there is one.
        protocol: how it is to see scenes: name, and what is not the recipe's of crop, base, scales and flip; None: as
            in its run's evaluation after each epoch.
        device: where it computes: "auto", "cpu", "cuda", "cuda:1", "mps", or torch's own.

    Returns:
        The network, whose parameters need no gradients.

    Raises:
        UserError: the weights cannot be read or do not fit, the protocol is not valid, or there is no such device.
    """
    place_on = choose_device(device)
    weights = source if isinstance(source, Weights) else read_weights(source, choice, (SEGMENTATION,))
    model = restore_deeplab(weights)
    assert weights.model and weights.classes
    shown, data_kind = read_protocol(weights, protocol)
    classes = tuple(weights.classes)
    palette = make_palette(classes) if weights.palette is None else np.array(weights.palette, np.uint8)
    module = place(fold_batch_norms(model).requires_grad_(False), place_on)
    described = replace(weights, tensors={})
    return Segmenter(described, weights.model, classes, palette, data_kind, shown, module)


def take_segmenter(network: Segmenter | str | PathLike[str]) -> Segmenter:
    """Return the network that a library function was given; see `take_network`."""
    return take_network(network, Segmenter, open_segmenter)


def read_protocol(
    weights: Weights, protocol: RegionProtocolOptions | Mapping[str, Any] | None = None
) -> tuple[RegionProtocol, str]:
    """Return how a run's network sees scenes, and the layout of those that it was trained on.

    Args:
        weights: of the run's checkpoint.
        protocol: as `open_segmenter` takes it.

    Raises:
        CheckpointError: its configuration does not tell.
        ConfigError: the protocol is not valid.
    """
    assert weights.run and weights.training
    try:
        own = RegionProtocolOptions.model_validate(weights.run["protocol"])
        shown = choose_protocol(_fill(own, protocol), weights.training["crop"], weights.training["base"])
        return shown, weights.run["data"]["kind"]
    except (KeyError, TypeError, ValidationError) as error:
        raise CheckpointError(f"{weights.source}: not a configuration of this project") from error


def _fill(own: RegionProtocolOptions, given: RegionProtocolOptions | Mapping[str, Any] | None) -> RegionProtocolOptions:
    """Return a protocol that is given with some of its options, or the network's own."""
    if given is None or isinstance(given, RegionProtocolOptions):
        return given or own
    defaults = {"crop": None, "base": None, "scales": [1.0], "flip": False}
    try:
        return RegionProtocolOptions.model_validate({**defaults, **given})
    except ValidationError as error:
        place = ".".join(map(str, error.errors()[0]["loc"]))
        raise ConfigError(f"protocol: {place}: {error.errors()[0]['msg']}") from error


def choose_protocol(options: RegionProtocolOptions, crop: int, base: int) -> RegionProtocol:
    """Return a protocol with what it takes from a recipe: the crop, and for "published" the base.

    Args:
        options: of the protocol.
        crop: the recipe's.
        base: the recipe's.

    Raises:
        ConfigError: the options do not go together.
    """
    needs_crop, needs_base = options.name != "whole", options.name == "published"
    return RegionProtocol(
        options.name,
        options.crop or (crop if needs_crop else None),
        options.base or (base if needs_base else None),
        tuple(options.scales),
        options.flip,
    )
