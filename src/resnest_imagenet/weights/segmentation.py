"""Loads weights into a DeepLabV3: those of a trained one, or of a network of the zoo into its backbone."""

from collections.abc import Sequence
from dataclasses import replace
from os import PathLike

import torch
from torch import Tensor

from resnest_imagenet.errors import CheckpointError
from resnest_imagenet.models.deeplab import DeepLabV3, build_deeplab
from resnest_imagenet.weights.layouts import recognise_deeplab, rename_deeplab
from resnest_imagenet.weights.load import (
    TASK,
    Weights,
    describe_other_task,
    match_tensors,
    read_weights,
    require_usual_pixels,
)

SEGMENTATION = "segmentation"  # the task of checkpoints with a DeepLabV3
_CLASSIFIERS = ("head.classify.", "auxiliary.classify.")


def start_deeplab(
    model: DeepLabV3, name: str, classes: Sequence[str], source: str | PathLike[str], choice: str = "auto"
) -> str:
    """Load the weights of a source into a new DeepLabV3; return in words which parts were loaded.

    The backbone takes weights from any classification network, from a checkpoint of a run of either task, and from
    files of a DeepLabV3 of PyTorch-Encoding or mmsegmentation. The heads take theirs from the same source if it has
    them, but not from mmsegmentation, whose head has other layers. Classifiers are loaded if they are for the same
    classes, in any order; a file without class names is taken to have the data set's classes if their number is equal.

    Args:
        model: it is changed.
        name: of its backbone.
        classes: in the order of its outputs.
        source: a file of weights, or published ones, as for `read_weights`.
        choice: "model", "ema" or "auto".

    Raises:
        UserError: the weights cannot be read, or are not those of this network.
    """
    weights = read_weights(source, choice, (TASK, SEGMENTATION))
    if recognise_deeplab(weights.tensors) is None:
        _load_backbone(model, name, weights)
        return "its backbone"
    heads = _match_heads(model, weights, has_classifiers=False)
    rows = _find_rows(weights, classes, len(heads["head.classify.weight"]))
    for key, initial in model.state_dict().items():
        if key.startswith(_CLASSIFIERS):
            heads[key] = initial if rows is None else heads[key][rows]
    _load_backbone(model, name, weights)
    model.load_state_dict(heads, strict=False)
    return "its backbone and heads" if rows is None else "its backbone, heads and classes"


def restore_deeplab(weights: Weights) -> DeepLabV3:
    """Build the network of a run's checkpoint, on the CPU, and load its weights.

    Args:
        weights: of `read_weights(source, choice, (SEGMENTATION, ...))`.

    Raises:
        CheckpointError: they are not of a run of segmentation, or do not fit its configuration.
    """
    # Bare weights have the task classification, because theirs is unknown.
    if weights.run is None or weights.training is None or weights.classes is None or weights.model is None:
        raise CheckpointError(f"{weights.source}: not the checkpoint of a run: start one from it, train.init_from=...")
    if weights.task != SEGMENTATION:
        raise CheckpointError(describe_other_task(weights.source, weights.task, (SEGMENTATION,)))
    recipe = weights.training
    try:
        model = build_deeplab(
            weights.model,
            len(weights.classes),
            output_stride=recipe["output_stride"],
            rates=recipe["rates"],
            channels=recipe["head_channels"],
            auxiliary=recipe["auxiliary_weight"] > 0,
        )
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{weights.source}: not a configuration of this project") from error
    load_deeplab(model, weights.model, weights)
    return model


def load_deeplab(model: DeepLabV3, name: str, weights: Weights) -> None:
    """Load all weights of a trained DeepLabV3, without reordering its classes.

    Args:
        model: built as it was trained, with or without the auxiliary head; it is changed.
        name: of its backbone.
        weights: of `read_weights(source, choice, (SEGMENTATION, ...))`, of a run or of PyTorch-Encoding.

    Raises:
        CheckpointError: a key is missing, unexpected or of another shape; names it.
        ConfigError: they are of another backbone.
    """
    if recognise_deeplab(weights.tensors) is None:
        raise CheckpointError(
            f"{weights.source}: not the weights of a DeepLabV3 of this project or of PyTorch-Encoding: "
            "start a run from them, train.init_from=..."
        )
    heads = _match_heads(model, weights, has_classifiers=True)
    _load_backbone(model, name, weights)
    model.load_state_dict(heads, strict=False)


def _load_backbone(model: DeepLabV3, name: str, weights: Weights) -> None:
    """Load the backbone's weights, from a classification network or from the backbone's part of the file."""
    require_usual_pixels(weights)
    layout, tensors = recognise_deeplab(weights.tensors), weights.tensors
    if layout is not None:
        prefix = rename_deeplab("backbone.", layout)
        tensors = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    elif any(key.startswith("decode_head.") for key in tensors):  # mmsegmentation's
        tensors = {key: value for key, value in tensors.items() if key.startswith("backbone.")}
    _, matched = match_tensors(replace(weights, tensors=tensors), name)
    model.backbone.load_state_dict({key: matched[key] for key in model.backbone.state_dict()})


def _match_heads(model: DeepLabV3, weights: Weights, has_classifiers: bool) -> dict[str, Tensor]:
    """Return the tensors of the heads by this project's names.

    Args:
        model: the network with the heads.
        weights: of a DeepLabV3.
        has_classifiers: whether the classifiers must have the model's number of classes.
    """
    source, layout = weights.source, recognise_deeplab(weights.tensors)
    assert layout is not None
    unused = {key for key in weights.tensors if not key.startswith(rename_deeplab("backbone.", layout))}
    matched = {}
    for key, value in model.state_dict().items():
        if key.startswith("backbone."):
            continue
        key_in_file = rename_deeplab(key, layout)
        tensor = weights.tensors.get(key_in_file)
        unused.discard(key_in_file)
        if tensor is None and key.endswith(".num_batches_tracked"):
            tensor = torch.zeros_like(value)
        if tensor is None:
            raise CheckpointError(f"{source}: {key_in_file} is missing: not all the weights of this DeepLabV3")
        skipped = 1 if key.startswith(_CLASSIFIERS) and not has_classifiers else 0
        if tensor.ndim != value.ndim or tensor.shape[skipped:] != value.shape[skipped:]:
            raise CheckpointError(
                f"{source}: {key_in_file} has shape {tuple(tensor.shape)}, not {tuple(value.shape)}: "
                "of a DeepLabV3 with other channels, rates or classes"
            )
        matched[key] = tensor
    if model.auxiliary is None:
        of_auxiliary = tuple(rename_deeplab(f"auxiliary.{part}.", layout) for part in ("block", "classify"))
        unused = {key for key in unused if not key.startswith(of_auxiliary)}
    if unused:
        raise CheckpointError(f"{source}: unexpected key {min(unused)}: not the weights of this DeepLabV3")
    return matched


def _find_rows(weights: Weights, classes: Sequence[str], num_outputs: int) -> Tensor | None:
    """Return the file's output for each class, or None if its outputs are not for the same classes."""
    if weights.classes is None:
        return torch.arange(num_outputs) if num_outputs == len(classes) else None
    output_of = {name: output for output, name in enumerate(weights.classes)}
    is_same = len(output_of) == num_outputs and output_of.keys() == set(classes)
    return torch.tensor([output_of[name] for name in classes]) if is_same else None
