"""Loads weights into a detector: those of another detector, or of a classification network into its backbone."""

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from resnest_imagenet.errors import CheckpointError
from resnest_imagenet.models.rcnn_options import RCNNOptions, title_detector
from resnest_imagenet.weights.load import (
    TASK,
    Weights,
    describe_other_task,
    match_tensors,
    read_weights,
    require_usual_pixels,
)
from resnest_imagenet.weights.published_rcnn import DETECTION, adopt_rcnn

if TYPE_CHECKING:
    from resnest_imagenet.models.rcnn import RCNN

_BACKBONE = "backbone."
# How the published detectors are tested (detectron2-ResNeSt's and torchvision's configurations).
PUBLISHED_PROTOCOL = {"short_side": 800, "longest": 1333, "min_score": 0.05, "nms": 0.5, "detections": 100}


def read_options(recipe: Mapping[str, Any], protocol: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of `build_rcnn` that a run has.

    Args:
        recipe: the values of its recipe.
        protocol: those of its evaluation.
    """
    values = {**recipe, **protocol}
    names = [option.name for option in fields(RCNNOptions)]
    options = {name: values[name] for name in names if name in values}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}


def start_rcnn(
    model: "RCNN", name: str, classes: Sequence[str], source: str | PathLike[str], choice: str = "auto"
) -> str:
    """Load the weights of a source into a new detector; return in words which parts were loaded.

    The source is a classification network, whose weights go into the backbone; or a detector: the checkpoint of a run,
    or a file of another program (`adopt_rcnn`). Of a detector each other part is loaded too (pyramid, proposals, each
    box stage, masks) if it has the same layers. Rows of classes are loaded if the classes are the same, in any order. A
    file that does not name its classes is taken to have those of the data set if their number is equal.

    Args:
        model: to be changed.
        name: of its backbone.
        classes: in the order of its outputs.
        source: a file of weights, or published ones, as of `read_weights`.
        choice: "model", "ema" or "auto".

    Raises:
        UserError: the weights cannot be read, or do not have all of this network's backbone.
    """
    weights = adopt_rcnn(recognise_own(read_weights(source, choice, (TASK, DETECTION))))
    if weights.task != DETECTION:
        _load_backbone(model, name, weights)
        return "its backbone"
    own = model.state_dict()
    fitting = _list_fitting(own, weights.tensors)
    rows = _find_rows(weights, classes)
    for key in [key for key in fitting if _is_of_classes(key)]:
        tensor = None if rows is None else _order_classes(key, weights.tensors[key], rows)
        if tensor is None or tensor.shape != own[key].shape:
            del fitting[key]
        else:
            fitting[key] = tensor
    _load_backbone(model, name, weights)
    model.load_state_dict(fitting, strict=False)
    rest = [key for key in own if not key.startswith(_BACKBONE) and key not in fitting]
    return "all of it" if not rest else f"all of it but {len(rest)} tensors of other layers or classes"


def _list_fitting(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of the parts after the backbone that have the same layers; their classes may differ."""
    fitting: dict[str, Tensor] = {}
    for part in {_name_part(key) for key in own} - {"backbone"}:
        ours = {key: value.shape for key, value in own.items() if _name_part(key) == part}
        loaded = {key: value for key, value in tensors.items() if _name_part(key) == part}
        layers = {key: shape for key, shape in ours.items() if not _is_of_classes(key)}
        if layers == {key: value.shape for key, value in loaded.items() if not _is_of_classes(key)}:
            fitting |= {key: value for key, value in loaded.items() if key in ours}
    return fitting


def _name_part(key: str) -> str:
    """Return the part of a detector that has a tensor: backbone, fpn, rpn, roi_heads.masks or roi_heads.stages.K."""
    parts = key.split(".")
    return ".".join(parts[: {"roi_heads": 3 if parts[1] == "stages" else 2}.get(parts[0], 1)])


def _is_of_classes(key: str) -> bool:
    """Return whether a tensor's rows are classes."""
    return any(part in key for part in (".classify.", ".regress.", ".mask_fcn_logits."))


def _find_rows(weights: Weights, classes: Sequence[str]) -> Tensor | None:
    """Return the place of each class among the classes of the weights; None if these are not the same."""
    num_classes = len(weights.tensors.get("roi_heads.stages.0.classify.bias", ())) - 1
    if weights.classes is None:
        return torch.arange(num_classes) if num_classes == len(classes) else None
    index_of = {name: index for index, name in enumerate(weights.classes)}
    is_same = len(index_of) == num_classes and index_of.keys() == set(classes)
    return torch.tensor([index_of[name] for name in classes]) if is_same else None


def _order_classes(key: str, tensor: Tensor, rows: Tensor) -> Tensor:
    """Return a tensor with its rows, which are classes, in this order."""
    if ".classify." in key:
        return tensor[torch.cat((torch.zeros(1, dtype=torch.int64), 1 + rows))]
    if ".regress." in key:  # four rows for each class, or for all of them
        return tensor if len(tensor) == 4 else tensor.unflatten(0, (-1, 4))[rows].flatten(0, 1)
    return tensor[rows]


def recognise_own(weights: Weights) -> Weights:
    """Return the weights; bare weights with the names of `RCNN`, as resnest-export writes them, become a detector's."""
    is_own = weights.run is None and {"fpn.inner_blocks.0.0.weight", "roi_heads.stages.0.classify.bias"} <= set(
        weights.tensors
    )
    return replace(weights, task=DETECTION) if is_own else weights


def name_rcnn(weights: Weights) -> str:
    """Return the name of a detector: "Mask R-CNN on resnest50"."""
    recipe = weights.training or weights.rcnn_options or {}
    return f"{title_detector(bool(recipe.get('cascade')), bool(recipe.get('masks')))} on {weights.model}"


def restore_rcnn(weights: Weights, protocol: Mapping[str, Any] | None = None) -> "RCNN":
    """Build the network of a run's checkpoint, on the CPU, and load its weights.

    Args:
        weights: of `read_weights(source, choice, (DETECTION, ...))`.
        protocol: how its detections are chosen, some options of `BoxProtocolOptions`; None: as in its run.

    Raises:
        CheckpointError: the weights are not those of a detector, or do not fit their configuration.
    """
    from resnest_imagenet.models.rcnn import build_rcnn  # late: torchvision's detectors take time to import

    weights = adopt_rcnn(weights)
    if weights.rcnn_options is not None:
        return _restore_published(weights, weights.rcnn_options, {**PUBLISHED_PROTOCOL, **(protocol or {})})
    # Bare weights do not name their task, so they are read as those of a classification network.
    if weights.run is None or weights.training is None or weights.classes is None or weights.model is None:
        raise CheckpointError(f"{weights.source}: not the checkpoint of a run: start one from it, train.init_from=...")
    if weights.task != DETECTION:
        raise CheckpointError(describe_other_task(weights.source, weights.task, (DETECTION,)))
    try:
        options = read_options(weights.training, {**weights.run["protocol"], **(protocol or {})})
        # Only training needs statistics over all ranks; in evaluation "bn" is the same.
        norms = {name: "bn" for name in ("norm", "head_norm") if options[name] == "sync"}
        model = build_rcnn(weights.model, len(weights.classes), **{**options, **norms})
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{weights.source}: not a configuration of this project") from error
    _require_equal_shapes(model.state_dict(), weights)
    model.load_state_dict(weights.tensors)
    return model


def _restore_published(weights: Weights, options: Mapping[str, Any], protocol: Mapping[str, Any]) -> "RCNN":
    from resnest_imagenet.models.rcnn import build_rcnn

    assert weights.model is not None
    num_classes = len(weights.tensors["roi_heads.stages.0.classify.bias"]) - 1
    if weights.classes is None:
        raise CheckpointError(
            f"{weights.source}: it does not name its {num_classes} classes: start a run from it, train.init_from=..."
        )
    model = build_rcnn(weights.model, num_classes, norm="bn", **options, **read_options({}, protocol))
    model.load_state_dict(weights.tensors)
    return model


def _require_equal_shapes(own: Mapping[str, Tensor], weights: Weights) -> None:
    for key in sorted(own.keys() ^ weights.tensors.keys()):
        what = "is missing" if key in own else "is not of this detector"
        raise CheckpointError(f"{weights.source}: {key} {what}")
    for key, value in own.items():
        if value.shape != weights.tensors[key].shape:
            shapes = f"{tuple(weights.tensors[key].shape)}, not {tuple(value.shape)}"
            raise CheckpointError(f"{weights.source}: {key} has shape {shapes}")


def _load_backbone(model: "RCNN", name: str, weights: Weights) -> None:
    """Load the backbone's weights, from a classification network or a detector."""
    require_usual_pixels(weights)
    tensors = weights.tensors
    if weights.task == DETECTION:
        tensors = {key.removeprefix(_BACKBONE): tensors[key] for key in tensors if key.startswith(_BACKBONE)}
    _, matched = match_tensors(replace(weights, tensors=tensors), name)
    model.backbone.load_state_dict({key: matched[key] for key in model.backbone.state_dict()})
