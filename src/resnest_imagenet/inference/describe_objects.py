"""Describes a detector's input and output for other programs."""

from resnest_imagenet.inference.detector import read_protocol
from resnest_imagenet.models.zoo import find_pixels
from resnest_imagenet.recipe import BoxProtocolOptions
from resnest_imagenet.weights.card import to_texts
from resnest_imagenet.weights.detection import name_rcnn
from resnest_imagenet.weights.load import Weights


def describe_object_input(weights: Weights, protocol: BoxProtocolOptions | None = None) -> dict[str, str]:
    """Return what another program must do to use a detector, as texts: numbers and lists are in JSON.

    Args:
        weights: of a run's checkpoint.
        protocol: how to show it images; None: its run's.

    Raises:
        CheckpointError: its configuration has no protocol.
    """
    shown = read_protocol(weights, protocol)
    assert weights.model and weights.training
    pixels = find_pixels(weights.model)
    masks = "; masks (n, 28, 28): the probability of each cell of a box" if weights.training["masks"] else ""
    return to_texts(
        {
            "model": name_rcnn(weights),
            "input": "images: float32 (1, 3, height, width), 0..255, minus mean, over std, with zeros at the right and "
            "at the bottom; size: int64 (2,), height and width without these",
            "output": f"boxes (n, 4): x1 y1 x2 y2 in pixels of the input; scores (n,); labels (n,){masks}",
            "channels": "BGR" if pixels.is_bgr else "RGB",
            "protocol": shown.text,
            "mean": pixels.mean,
            "std": pixels.std,
            "classes": weights.classes,
            "category_ids": weights.category_ids,
        }
    )
