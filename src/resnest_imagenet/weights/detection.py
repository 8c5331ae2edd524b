"""Weights into a detector: a trained one's, or those of a network of the zoo into its backbone."""

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from os import PathLike
from typing import Any

import torch
from torch import Tensor

from resnest_imagenet.errors import CheckpointError
from resnest_imagenet.models.rcnn import RCNN, build_rcnn
from resnest_imagenet.models.rcnn_options import RCNNOptions
from resnest_imagenet.weights.load import TASK, Weights, describe_other_task, match_tensors, read_weights

DETECTION = "detection"  # the task of the checkpoints that hold a detector
_BACKBONE = "backbone."


def read_options(recipe: Mapping[str, Any], protocol: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a run has of the options of `build_rcnn`.

    Args:
        recipe: the values of its recipe.
        protocol: those of its evaluation.
    """
    values = {**recipe, **protocol}
    names = [option.name for option in fields(RCNNOptions)]
    return {name: values[name] for name in names if name in values}


def start_rcnn(
    model: RCNN, name: str, classes: Sequence[str], source: str | PathLike[str], choice: str = "auto"
) -> str:
    """Load the weights that a source has into a new detector; return which, in words.

    The backbone's come from any weights of a classification network, and from the checkpoint of a run of detection; the
    other parts come with those, but for layers of another shape or for other classes.

    Args:
        model: to be changed.
        name: of its backbone.
        classes: in the order of its outputs.
        source: a file of weights, or published ones, as of `read_weights`.
        choice: "model", "ema" or "auto".

    Raises:
        UserError: the weights cannot be read, or are not all of this network's backbone.
    """
    weights = recognise_own(read_weights(source, choice, (TASK, DETECTION)))
    _load_backbone(model, name, weights)
    if weights.task != DETECTION:
        return "its backbone"
    own = model.state_dict()
    is_same = weights.classes is not None and tuple(weights.classes) == tuple(classes)
    skipped = () if is_same else _list_classifiers(own)
    fitting = {
        key: tensor
        for key, tensor in weights.tensors.items()
        if key in own and not key.startswith(_BACKBONE) and key not in skipped and tensor.shape == own[key].shape
    }
    model.load_state_dict(fitting, strict=False)
    rest = [key for key in own if not key.startswith(_BACKBONE) and key not in fitting]
    return "all of it" if not rest else f"all of it but {len(rest)} tensors of other layers or classes"


def recognise_own(weights: Weights) -> Weights:
    """Return the weights; bare ones with the names of `RCNN`, a file of resnest-export, as those of a detector."""
    is_own = weights.run is None and {"fpn.inner_blocks.0.0.weight", "roi_heads.stages.0.classify.bias"} <= set(
        weights.tensors
    )
    return replace(weights, task=DETECTION) if is_own else weights


def name_rcnn(weights: Weights) -> str:
    """Return what a detector of a run's checkpoint is called: "Mask R-CNN on resnest50"."""
    recipe = weights.training or {}
    kind = f"{'Cascade ' if recipe.get('cascade') else ''}{'Mask ' if recipe.get('masks') else ''}R-CNN"
    return f"{'Faster R-CNN' if kind == 'R-CNN' else kind} on {weights.model}"


def restore_rcnn(weights: Weights, protocol: Mapping[str, Any] | None = None) -> RCNN:
    """Build the network of a run's checkpoint, on the CPU, and load its weights.

    Args:
        weights: of `read_weights(source, choice, (DETECTION, ...))`.
        protocol: how its detections are chosen, some options of `BoxProtocolOptions`; None: as in its run.

    Raises:
        CheckpointError: not those of a run of detection, or they do not fit its configuration.
    """
    # Bare weights have a classification's task: nothing tells theirs.
    if weights.run is None or weights.training is None or weights.classes is None or weights.model is None:
        raise CheckpointError(f"{weights.source}: not the checkpoint of a run: start one from it, train.init_from=...")
    if weights.task != DETECTION:
        raise CheckpointError(describe_other_task(weights.source, weights.task, (DETECTION,)))
    try:
        options = read_options(weights.training, {**weights.run["protocol"], **(protocol or {})})
        # Statistics over all ranks are a matter of training: in evaluation "bn" is the same.
        norms = {name: "bn" for name in ("norm", "head_norm") if options[name] == "sync"}
        model = build_rcnn(weights.model, len(weights.classes), **{**options, **norms})
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{weights.source}: not a configuration of this project") from error
    _require_equal_shapes(model.state_dict(), weights)
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


def _load_backbone(model: RCNN, name: str, weights: Weights) -> None:
    """Load the backbone's weights, those of a classification network or a detector's."""
    tensors = weights.tensors
    if weights.task == DETECTION:
        tensors = {key.removeprefix(_BACKBONE): tensors[key] for key in tensors if key.startswith(_BACKBONE)}
    _, matched = match_tensors(replace(weights, tensors=tensors), name)
    model.backbone.load_state_dict({key: matched[key] for key in model.backbone.state_dict()})


def _list_classifiers(own: Mapping[str, torch.Tensor]) -> set[str]:
    """Return the tensors whose rows are classes."""
    return {key for key in own if any(part in key for part in (".classify.", ".regress.", ".mask_fcn_logits."))}
