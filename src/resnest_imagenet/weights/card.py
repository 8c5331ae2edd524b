"""What another program needs to use a network: how images go in, and what its outputs are called."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from os import PathLike
from typing import Any

from torch import nn

from resnest_imagenet.models.imagenet_classes import class_words
from resnest_imagenet.models.zoo import count_outputs
from resnest_imagenet.weights.load import Weights, list_classes, read_weights, restore_network

INPUT = "float32 (batch, 3, height, width): RGB in 0..1, minus mean, over std"


@dataclass(frozen=True)
class ImageInput:
    """How an image becomes a network's input: float32 (batch, 3, height, width), RGB in 0..1, minus mean, over std.

    Attributes:
        crop: side of the input in pixels.
        ratio: crop over the image's short side before it.
        interpolation: of the resize, "bilinear" or "bicubic".
        order: "resize_crop" or "crop_resize", as `EvalTransform` has it.
        antialias: of the resize.
        protocol: the rule in words.
        mean, std: of red, green and blue.
    """

    crop: int
    ratio: float
    interpolation: str
    order: str
    antialias: bool
    protocol: str
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def options(self) -> str:
        """The rule as resnest-eval takes it."""
        values = {"order": self.order, "ratio": self.ratio, "interpolation": self.interpolation}
        words = [f"protocol.{name}={value}" for name, value in values.items()]
        return " ".join([f"crop={self.crop}", *words, f"protocol.antialias={str(self.antialias).lower()}"])


DescribeInput = Callable[[Weights, str], ImageInput]
DescribeObjects = Callable[[Weights], dict[str, str]]  # of a detector
DescribeScenes = Callable[[Weights, int], dict[str, str]]  # of a network of segmentation, tried at a crop


@dataclass(frozen=True)
class Card:
    """A network's name, input and outputs.

    Attributes:
        model: its name in the zoo.
        images: its input.
        classes: of its outputs, in order; None where nothing tells them.
    """

    model: str
    images: ImageInput
    classes: tuple[str, ...] | None

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """The classes in words."""
        return tuple(class_words(self.classes)) if self.classes else None

    def to_metadata(self) -> dict[str, str]:
        """Return the card as texts: numbers and lists in JSON, without what is not known."""
        values = {
            "model": self.model,
            "input": INPUT,
            **asdict(self.images),
            "classes": self.classes,
            "class_names": self.class_names,
        }
        return to_texts(values)


def to_texts(values: Mapping[str, Any]) -> dict[str, str]:
    """Return values as texts: numbers and lists in JSON, without those that are None."""
    return {k: v if isinstance(v, str) else json.dumps(v) for k, v in values.items() if v is not None}


def open_network(
    source: Weights | str | PathLike[str], describe: DescribeInput, model: str | None = None, weights: str = "auto"
) -> tuple[nn.Module, Weights, Card]:
    """Read a network to be exported, on the CPU and in evaluation mode.

    Args:
        source: a checkpoint, a file of weights, or published weights; or what `read_weights` has made of one.
        describe: returns the input of weights and their network's name.
        model: name of the network; None where the weights tell.
        weights: "model", "ema" or "auto".

    Raises:
        UserError: the weights cannot be read or do not fit.
    """
    loaded = source if isinstance(source, Weights) else read_weights(source, weights)
    network, name = restore_network(loaded, model)
    classes = list_classes(loaded.classes, count_outputs(network, name))
    return network.eval(), loaded, Card(name, describe(loaded, name), tuple(classes) if classes else None)
