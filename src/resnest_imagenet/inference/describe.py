"""Describes for other programs how images become a network's input."""

from collections.abc import Mapping
from typing import Any

from resnest_imagenet.data.transforms import MEAN, STD, Colour, EvalTransform
from resnest_imagenet.inference.classifier import choose_transforms
from resnest_imagenet.inference.options import check_arguments
from resnest_imagenet.inference.segmenter import read_protocol
from resnest_imagenet.weights.card import INPUT, ImageInput, to_texts
from resnest_imagenet.weights.load import Weights


def describe_input(
    weights: Weights, name: str, crop: int | None = None, protocol: Mapping[str, Any] | None = None
) -> ImageInput:
    """Return how images become the network's input; with the first two arguments it is the exports' `describe`.

    Args:
        weights: of the network.
        name: of the network.
        crop: side of the images in pixels; None: the weights' own.
        protocol: changes to the weights' own protocol, by the names of `EvalTransform`.

    Raises:
        ConfigError: crop or protocol is not valid.
    """
    arguments = check_arguments(crop=crop, protocol=protocol)
    (transform,) = choose_transforms(weights, name, arguments.crop, arguments.changes)
    return describe_transform(transform)


def describe_transform(transform: EvalTransform) -> ImageInput:
    """Return in other programs' words what a transform makes of an image."""
    mean, std = _scale_normalisation(transform.mean, transform.std)
    return ImageInput(
        transform.crop,
        transform.resolved_ratio,
        transform.resolved_interpolation,
        transform.order,
        transform.antialias,
        transform.protocol,
        mean,
        std,
    )


def describe_scene_input(weights: Weights, crop: int) -> dict[str, str]:
    """Describe a network of segmentation for other programs, as texts: numbers and lists in JSON.

    Args:
        weights: of a run's checkpoint.
        crop: side of the images with which the network was tried, in pixels.

    Raises:
        CheckpointError: its configuration is not of this project.
    """
    mean, std = _scale_normalisation()
    return to_texts(
        {
            "model": f"DeepLabV3 on {weights.model}",
            "input": INPUT,
            "output": "logits (batch, classes, height, width): a pixel's class has its highest logit",
            "crop": crop,
            "protocol": read_protocol(weights)[0].text,
            "mean": mean,
            "std": std,
            "classes": weights.classes,
            "palette": weights.palette,
        }
    )


def _scale_normalisation(mean: Colour = MEAN, std: Colour = STD) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation of red, green and blue in 0..1."""
    scaled = [tuple(round(value / 255, 6) for value in values) for values in (mean, std)]
    return scaled[0], scaled[1]
