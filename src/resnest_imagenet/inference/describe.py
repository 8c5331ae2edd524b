"""How images become a network's input, told to another program."""

from collections.abc import Mapping
from typing import Any

from resnest_imagenet.data.transforms import MEAN, STD
from resnest_imagenet.inference.classifier import choose_transforms
from resnest_imagenet.inference.options import check_arguments
from resnest_imagenet.inference.segmenter import read_protocol
from resnest_imagenet.weights.card import INPUT, ImageInput, to_texts
from resnest_imagenet.weights.load import Weights


def describe_input(
    weights: Weights, name: str, crop: int | None = None, protocol: Mapping[str, Any] | None = None
) -> ImageInput:
    """Return how images are brought to the crop; with the first two arguments it is what the exports ask for.

    Args:
        weights: of the network.
        name: of the network.
        crop: side of the images in pixels; None: the weights' own.
        protocol: what is to differ from the weights' own protocol, as `EvalTransform` has it.

    Raises:
        ConfigError: crop or protocol is not valid.
    """
    asked = check_arguments(crop=crop, protocol=protocol)
    (transform,) = choose_transforms(weights, name, asked.crop, asked.changes)
    mean, std = _scale_normalisation()
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
    """Return what another program needs to use a network of segmentation, as texts: numbers and lists in JSON.

    Args:
        weights: of a run's checkpoint.
        crop: side of the images that the network was tried with, in pixels.

    Raises:
        CheckpointError: its configuration does not tell.
    """
    mean, std = _scale_normalisation()
    return to_texts(
        {
            "model": f"DeepLabV3 on {weights.model}",
            "input": INPUT,
            "output": "logits (batch, classes, height, width): a pixel has the class of its highest",
            "crop": crop,
            "protocol": read_protocol(weights)[0].text,
            "mean": mean,
            "std": std,
            "classes": weights.classes,
            "palette": weights.palette,
        }
    )


def _scale_normalisation() -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation of red, green and blue in 0..1."""
    mean, std = (tuple(round(value / 255, 3) for value in values) for values in (MEAN, STD))
    return mean, std
