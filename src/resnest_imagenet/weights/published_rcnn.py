"""Converts detectors that other programs trained to weights of this project."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from resnest_imagenet.errors import CheckpointError
from resnest_imagenet.instances import Pixels
from resnest_imagenet.models.coco_classes import NOTHING, coco_categories, coco_classes
from resnest_imagenet.models.rcnn_options import RCNNOptions, title_detector
from resnest_imagenet.models.resnest import ResNeStSpec
from resnest_imagenet.models.zoo import ARCHITECTURES, find_pixels
from resnest_imagenet.weights.layouts import recognise
from resnest_imagenet.weights.load import Weights
from resnest_imagenet.weights.rcnn_layouts import BACKBONES, BLOCKS, infer_options, recognise_rcnn, rename_rcnn

DETECTION = "detection"  # the task of the checkpoints that hold a detector

_BUFFER = re.compile(r"pixel_mean|pixel_std|proposal_generator\.anchor_generator\.cell_anchors\.\d")
_RESNETS = {(3, 4, 6, 3): "resnet50", (3, 4, 23, 3): "resnet101"}


def adopt_rcnn(weights: Weights) -> Weights:
    """Convert a detector of another program to ours; return any other weights unchanged.

    It converts Faster, Cascade, Mask and Cascade Mask R-CNN with a feature pyramid, of detectron2 and of
    detectron2-ResNeSt, and torchvision's second versions (fasterrcnn_resnet50_fpn_v2, maskrcnn_resnet50_fpn_v2). Names
    and shapes imply which network it is; networks with COCO's classes get their names. Of torchvision's 91 outputs, ten
    belong to no class and are dropped.

    Returns:
        Weights of task "detection" with tensors of our names, model, rcnn_options, and COCO's classes and category_ids
        (None where they are not COCO's).

    Raises:
        CheckpointError: it names the first key that is missing, unexpected or of another shape, or another difference.
    """
    layout = recognise_rcnn(weights.tensors)
    if layout is None:
        return weights
    if "roi_heads.box_head.fc6.weight" in weights.tensors:
        raise CheckpointError(
            f"{weights.source}: of torchvision's first version of its detectors, whose frozen norms divide without an "
            "epsilon: take fasterrcnn_resnet50_fpn_v2 or maskrcnn_resnet50_fpn_v2"
        )
    tensors = dict(weights.tensors)
    buffers = {key: tensors.pop(key) for key in weights.tensors if _BUFFER.fullmatch(key)}
    tensors = _move_background(tensors) if layout == "detectron2" else _drop_nothing(tensors)
    options = infer_options(tensors, layout)
    name, matched = _choose_backbone(replace(weights, tensors=tensors), layout, options, buffers)
    num_classes = len(matched["roi_heads.stages.0.classify.bias"]) - 1
    _check_buffers(weights.source, name, buffers)
    adopted = replace(weights, tensors=matched, model=name, task=DETECTION, rcnn_options=options)
    if num_classes != len(coco_classes()):
        return adopted
    numbers = [number for number, category in enumerate(coco_categories(), 1) if category != NOTHING]
    return replace(adopted, classes=coco_classes(), category_ids=numbers)


def _move_background(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return detectron2's tensors with the background first among the classes."""
    classifier = re.compile(r"roi_heads\.box_predictor\.(\d\.)?cls_score\.(weight|bias)")
    return {
        key: torch.cat((tensor[-1:], tensor[:-1])) if classifier.fullmatch(key) and tensor.ndim else tensor
        for key, tensor in tensors.items()
    }


def _drop_nothing(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return torchvision's tensors without boxes and masks of the background, and without outputs of no class."""
    predictor, masks = "roi_heads.box_predictor", "roi_heads.mask_predictor.mask_fcn_logits"
    counts = {len(tensors[key]) for key in (f"{predictor}.cls_score.bias",) if key in tensors and tensors[key].ndim}
    (count,) = counts or (0,)
    categories = coco_categories()
    are_cocos = count == 1 + len(categories)
    outputs = [k for k in range(1, count) if not are_cocos or categories[k - 1] != NOTHING]
    taken = dict(tensors)
    for kind in ("weight", "bias"):
        rows = {f"{predictor}.cls_score.{kind}": [0, *outputs], f"{masks}.{kind}": outputs}
        rows[f"{predictor}.bbox_pred.{kind}"] = [4 * output + side for output in outputs for side in range(4)]
        for key, chosen in rows.items():
            expected = 4 * count if "bbox_pred" in key else count
            if key in taken and taken[key].shape[:1] == (expected,):
                taken[key] = taken[key][chosen]
    return taken


def _choose_backbone(
    weights: Weights, layout: str, options: Mapping[str, Any], buffers: Mapping[str, Tensor]
) -> tuple[str, dict[str, Tensor]]:
    """Return the first network of the zoo that the weights fit as a backbone, and the tensors by our names."""
    problems: list[tuple[int, str]] = []
    kind = title_detector(bool(options.get("cascade")), bool(options.get("masks")))
    for name in _list_candidates(weights, layout, buffers):
        problem, matched = _match(weights, name, layout, options)
        if not problem:
            return name, matched
        problems.append((len(matched), f"{problem}: not all the weights of a {kind} on {name}"))
    if not problems:
        raise CheckpointError(f"{weights.source}: a detector on a backbone that is not one of this project's networks")
    _, nearest = max(problems, key=lambda problem: problem[0])
    raise CheckpointError(f"{weights.source}: {nearest}")


def _list_candidates(weights: Weights, layout: str, buffers: Mapping[str, Tensor]) -> Iterator[str]:
    """Yield the networks with as many blocks as a file's backbone."""
    blocks: dict[int, int] = {}
    for key in weights.tensors:
        if match := re.fullmatch(BLOCKS[layout], key):
            blocks[int(match[1])] = 1 + max(int(match[2]), blocks.get(int(match[1]), 0) - 1)
    layers = tuple(count for _, count in sorted(blocks.items()))
    if recognise(_take_backbone(weights.tensors, layout)) == "detectron2":
        for name, spec in ARCHITECTURES.items():
            if isinstance(spec, ResNeStSpec) and spec.layers == layers:
                yield name
    elif layers in _RESNETS:
        # detectron2's ResNets are MSRA's, except those whose pixels are normalised like torchvision's.
        std = buffers.get("pixel_std")
        is_msra = layout == "detectron2" and (std is None or bool((std == 1).all()))
        yield _RESNETS[layers] + ("_msra" if is_msra else "")


def _take_backbone(tensors: Mapping[str, Tensor], layout: str) -> dict[str, Tensor]:
    prefix = BACKBONES[layout]
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def _match(
    weights: Weights, name: str, layout: str, options: Mapping[str, Any]
) -> tuple[str | None, dict[str, Tensor]]:
    """Return the first mismatch, or None, and the tensors before it by our names."""
    from resnest_imagenet.models.rcnn import build_rcnn  # late: torchvision's detectors take time to import

    classifier = next((value for key, value in weights.tensors.items() if key.endswith("cls_score.bias")), None)
    num_classes = len(classifier) - 1 if classifier is not None and classifier.ndim and len(classifier) > 1 else 1
    with torch.device("meta"):
        expected = build_rcnn(name, num_classes, **{**options, "norm": "bn"}).state_dict()
    names = rename_rcnn(expected, layout, recognise(_take_backbone(weights.tensors, layout)), options)
    unused, matched = dict(weights.tensors), dict[str, Tensor]()
    for key, own in expected.items():
        tensor = unused.pop(names[key], None)
        if tensor is None and key.endswith(".num_batches_tracked"):
            tensor = torch.zeros((), dtype=torch.int64)
        if tensor is None:
            return f"{names[key]} is missing", matched
        if tensor.shape != own.shape:
            return f"{names[key]} has shape {tuple(tensor.shape)}, not {tuple(own.shape)}", matched
        if own.is_floating_point() and not tensor.is_floating_point():
            return f"{names[key]} is no tensor of floating-point numbers", matched
        matched[key] = tensor
    return (f"unexpected key {min(unused)}" if unused else None), matched


def _check_buffers(source: str, name: str, buffers: Mapping[str, Tensor]) -> None:
    """Compare a file's pixels and anchors with this network's."""
    from resnest_imagenet.models.proposals import Anchors

    pixels: Pixels = find_pixels(name)
    options = RCNNOptions()
    cells = Anchors(options.anchor_sizes, options.anchor_ratios, ()).cells
    own: dict[str, Any] = {"pixel_mean": pixels.mean, "pixel_std": pixels.std}
    own |= {f"proposal_generator.anchor_generator.cell_anchors.{k}": cell for k, cell in enumerate(cells)}
    for key, value in buffers.items():
        expected = torch.tensor(own.get(key, ()), dtype=torch.float64)
        if value.numel() != expected.numel() or not torch.allclose(
            value.double().flatten(), expected.flatten(), atol=1e-2
        ):
            raise CheckpointError(f"{source}: {key} is not that of a detector on {name}: another network")
