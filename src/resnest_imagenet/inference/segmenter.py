"""Trained networks of segmentation ready for use."""

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

USUAL_SIDE = 512  # of a scene whose protocol gives no crop, in pixels


@dataclass(frozen=True)
class Segmenter:
    """A trained network, for inference only.

    Attributes:
        weights: the description of its weights; the tensors themselves are in the module.
        name: of the backbone.
        classes: of its outputs, in order.
        palette: uint8 (K, 3), red, green and blue of each class: the data set's own, or those of `make_palette`.
        data_kind: the layout of the scenes on which it was trained.
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
        """The source of its weights, as the user gave it."""
        return self.weights.source

    @property
    def device(self) -> torch.device:
        """The device of its parameters."""
        return next(self.module.parameters()).device


def open_segmenter(
    source: Weights | str | PathLike[str],
    choice: str = "auto",
    protocol: RegionProtocolOptions | Mapping[str, Any] | None = None,
    device: str | torch.device = "auto",
) -> Segmenter:
    """Read a network to evaluate or predict.

    Args:
        source: a checkpoint of a run of segmentation, or the result of `read_weights` for one.
        choice: "model", "ema" (the moving average), or "auto": the moving average if there is one.
        protocol: how it sees scenes: name, and those of crop, base, scales and flip that differ from the recipe's;
            None: as in its run's evaluation after each epoch.
        device: of the computation: "auto", "cpu", "cuda", "cuda:1", "mps", or a torch.device.

    Returns:
        The network; its parameters need no gradients.

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
    """Return a library function's argument as a network; see `take_network`."""
    return take_network(network, Segmenter, open_segmenter)


def read_protocol(
    weights: Weights, protocol: RegionProtocolOptions | Mapping[str, Any] | None = None
) -> tuple[RegionProtocol, str]:
    """Return how a run's network sees scenes, and the layout of the scenes on which it was trained.

    Args:
        weights: of the run's checkpoint.
        protocol: see `open_segmenter`.

    Raises:
        CheckpointError: its configuration is not of this project.
        ConfigError: the protocol is not valid.
    """
    assert weights.run and weights.training
    try:
        own = RegionProtocolOptions.model_validate(weights.run["protocol"])
        shown = choose_protocol(_fill(own, protocol), weights.training["crop"], weights.training["base"])
        return shown, weights.run["data"]["kind"]
    except (KeyError, TypeError, ValidationError) as error:
        raise CheckpointError(f"{weights.source}: not a configuration of this project") from error


def _fill(
    own: RegionProtocolOptions, protocol: RegionProtocolOptions | Mapping[str, Any] | None
) -> RegionProtocolOptions:
    """Return a user's protocol with defaults for missing options, or the network's own."""
    if protocol is None or isinstance(protocol, RegionProtocolOptions):
        return protocol or own
    defaults = {"crop": None, "base": None, "scales": [1.0], "flip": False}
    try:
        return RegionProtocolOptions.model_validate({**defaults, **protocol})
    except ValidationError as error:
        place = ".".join(map(str, error.errors()[0]["loc"]))
        raise ConfigError(f"protocol: {place}: {error.errors()[0]['msg']}") from error


def choose_protocol(options: RegionProtocolOptions, crop: int, base: int) -> RegionProtocol:
    """Return a protocol; a missing crop, and for "published" a missing base, come from the recipe.

    Args:
        options: of the protocol.
        crop: the recipe's.
        base: the recipe's.

    Raises:
        ConfigError: the options contradict each other.
    """
    needs_crop, needs_base = options.name != "whole", options.name == "published"
    return RegionProtocol(
        options.name,
        options.crop or (crop if needs_crop else None),
        options.base or (base if needs_base else None),
        tuple(options.scales),
        options.flip,
    )
