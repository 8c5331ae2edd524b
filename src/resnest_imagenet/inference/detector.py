"""Opens trained detectors."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from os import PathLike
from typing import Any

import torch
from pydantic import ValidationError

from resnest_imagenet.compute import place
from resnest_imagenet.distributed import choose_device
from resnest_imagenet.errors import CheckpointError, ConfigError
from resnest_imagenet.inference.options import take_network
from resnest_imagenet.models.rcnn import RCNN
from resnest_imagenet.models.rcnn_options import name_detector
from resnest_imagenet.recipe import BoxProtocolOptions
from resnest_imagenet.weights.detection import DETECTION, PUBLISHED_PROTOCOL, restore_rcnn
from resnest_imagenet.weights.load import Weights, read_weights
from resnest_imagenet.weights.published_rcnn import adopt_rcnn


@dataclass(frozen=True)
class Detector:
    """A trained detector, for evaluation and prediction.

    Attributes:
        weights: their description; the module has the tensors.
        name: of the backbone.
        classes: of its outputs, in order.
        protocol: how images are shown to it, and which of its detections count.
        module: maps normalised images (B, 3, H, W) and their sizes without padding to `Detections`.
    """

    weights: Weights
    name: str
    classes: tuple[str, ...]
    protocol: BoxProtocolOptions
    module: RCNN

    @property
    def source(self) -> str:
        """The source of its weights, as the user gave it."""
        return self.weights.source

    @property
    def device(self) -> torch.device:
        """The device of its parameters."""
        return next(self.module.parameters()).device

    @property
    def category_ids(self) -> tuple[int, ...]:
        """The numbers of the classes in files in COCO's form: the data set's own, or 1 to K."""
        return tuple(self.weights.category_ids or range(1, len(self.classes) + 1))

    @property
    def finds_masks(self) -> bool:
        """Whether it finds masks too."""
        return self.module.roi_heads.masks is not None

    @property
    def kind(self) -> str:
        """Its kind, of `models.rcnn_options.name_detector`."""
        return name_detector(len(self.module.roi_heads.stages) > 1, self.finds_masks)


def open_detector(
    source: Weights | str | PathLike[str],
    choice: str = "auto",
    protocol: BoxProtocolOptions | Mapping[str, Any] | None = None,
    device: str | torch.device = "auto",
) -> Detector:
    """Open a detector for evaluation or prediction.

    Args:
        source: a checkpoint of a run of detection, a file of another program's detector (`adopt_rcnn`), or the result
            of `read_weights` for one.
        choice: "model", "ema" (the moving average), or "auto": the moving average if there is one.
        protocol: how to show it images; a mapping has those of short_side, longest, min_score, nms and detections that
            differ from its run. None: as in its run's evaluation after each epoch, or as published detectors are
            tested.
        device: "auto", "cpu", "cuda", "cuda:1", "mps", or a torch.device.

    Returns:
        The detector, in evaluation mode, without gradients.

    Raises:
        UserError: the weights cannot be read or do not fit, the protocol is not valid, or there is no such device.
    """
    chosen = choose_device(device)
    weights = source if isinstance(source, Weights) else read_weights(source, choice, (DETECTION,))
    weights = adopt_rcnn(weights)
    options = read_protocol(weights, protocol)
    module = restore_rcnn(weights, options.model_dump()).eval().requires_grad_(False)
    place(module, chosen)
    assert weights.model and weights.classes
    described = replace(weights, tensors={})
    return Detector(described, weights.model, tuple(weights.classes), options, module)


def take_detector(network: Detector | str | PathLike[str]) -> Detector:
    """Return the detector that a library function was called with, opened; see `take_network`."""
    return take_network(network, Detector, open_detector)


def read_protocol(
    weights: Weights, protocol: BoxProtocolOptions | Mapping[str, Any] | None = None
) -> BoxProtocolOptions:
    """Return how images are shown to a run's detector, and which of its detections count.

    Args:
        weights: of the run's checkpoint.
        protocol: as `open_detector` takes it.

    Raises:
        CheckpointError: its configuration has no protocol.
        ConfigError: the protocol is not valid.
    """
    if isinstance(protocol, BoxProtocolOptions):
        return protocol
    published = {"protocol": PUBLISHED_PROTOCOL} if weights.rcnn_options else {}
    try:
        own = BoxProtocolOptions.model_validate((weights.run or published)["protocol"]).model_dump()
    except (KeyError, TypeError, ValidationError) as error:
        raise CheckpointError(f"{weights.source}: not a configuration of this project") from error
    try:
        return BoxProtocolOptions.model_validate({**own, **(protocol or {})})
    except ValidationError as error:
        detail = error.errors()[0]
        raise ConfigError(f"protocol.{'.'.join(map(str, detail['loc']))}: {detail['msg'].lower()}") from error
