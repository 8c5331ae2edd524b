"""The names of a detector's tensors in other programs, and the options that names and shapes imply.

detectron2   and detectron2-ResNeSt: backbone.bottom_up.*, backbone.fpn_*, proposal_generator.*, roi_heads.*
torchvision  backbone.body.*, backbone.fpn.*, rpn.*, roi_heads.*

Here the background is the first class, as in torchvision; in detectron2 it is the last. In both each class of objects
has its own box and mask; detectron2 has none for the background.
"""

import re
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from resnest_imagenet.weights.layouts import rename

Tensors = Mapping[str, Tensor]

BACKBONES = {"detectron2": "backbone.bottom_up.", "torchvision": "backbone.body."}
# The blocks of a backbone, by stage and number.
BLOCKS = {
    "detectron2": r"backbone\.bottom_up\.res(\d)\.(\d+)\.conv1\.weight",
    "torchvision": r"backbone\.body\.layer(\d)\.(\d+)\.conv1\.weight",
}


def recognise_rcnn(keys: Collection[str]) -> str | None:
    """Return the layout of another program's detector with a feature pyramid; None for any other network."""
    if any(key.startswith("backbone.bottom_up.") for key in keys):
        return "detectron2"
    return "torchvision" if any(key.startswith("backbone.body.") for key in keys) else None


def infer_options(tensors: Tensors, layout: str) -> dict[str, Any]:
    """Return the options of `build_rcnn` that names and shapes imply, and those in which each program differs."""
    return _infer_detectron2(tensors) if layout == "detectron2" else _infer_torchvision(tensors)


def _infer_detectron2(tensors: Tensors) -> dict[str, Any]:
    cascade = _count(tensors, r"roi_heads\.box_head\.0\..*") > 0
    stage = "0." if cascade else ""
    head, predictor = f"roi_heads.box_head.{stage}", f"roi_heads.box_predictor.{stage}"
    mask_convs = _count(tensors, r"roi_heads\.mask_head\.mask_fcn\d+\.weight")
    options = {
        "cascade": cascade,
        "masks": _count(tensors, r"roi_heads\.mask_head\..*") > 0,
        "head_norm": "bn" if _count(tensors, r"backbone\.fpn_\w+\.norm\..*") else "none",
        "channels": _count_rows(tensors, "backbone.fpn_output2.weight", 256),
        "box_convs": _count(tensors, rf"{re.escape(head)}conv\d+\.weight"),
        "box_fcs": max(_count(tensors, rf"{re.escape(head)}fc\d+\.weight"), 1),
        "box_width": _count_rows(tensors, f"{head}fc1.weight", 1024),
        "mask_convs": mask_convs,
    }
    outputs, rows = (_count_rows(tensors, f"{predictor}{name}.weight", 0) for name in ("cls_score", "bbox_pred"))
    return options | {"class_agnostic": cascade or (rows == 4 and outputs > 2)}


def _infer_torchvision(tensors: Tensors) -> dict[str, Any]:
    convs = _count(tensors, r"roi_heads\.box_head\.\d+\.0\.weight")
    return {
        "masks": _count(tensors, r"roi_heads\.mask_head\..*") > 0,
        "head_norm": "bn" if _count(tensors, r"backbone\.fpn\.\w+\.\d\.1\..*") else "none",
        "channels": _count_rows(tensors, "backbone.fpn.layer_blocks.0.0.weight", 256),
        "rpn_convs": max(_count(tensors, r"rpn\.head\.conv\.\d+\.0\.weight"), 1),
        "box_convs": convs,
        "box_fcs": max(_count(tensors, r"roi_heads\.box_head\.\d+\.weight"), 1),
        "box_width": _count_rows(tensors, f"roi_heads.box_head.{convs + 1}.weight", 1024),
        "mask_convs": _count(tensors, r"roi_heads\.mask_head\.\d+\.0\.weight"),
        # Its own, see RCNNOptions.
        "anchors_rounded": True,
        "aligned": False,
        "sampling": 2,
    }


def _count(tensors: Tensors, pattern: str) -> int:
    return sum(re.fullmatch(pattern, key) is not None for key in tensors)


def _count_rows(tensors: Tensors, key: str, default: int) -> int:
    tensor = tensors.get(key)
    return len(tensor) if tensor is not None and tensor.ndim else default


def rename_rcnn(keys: Collection[str], layout: str, backbone_layout: str, options: Mapping[str, Any]) -> dict[str, str]:
    """Return the name in a layout of each of our detector's tensors.

    Args:
        keys: ours.
        layout: "detectron2" or "torchvision".
        backbone_layout: of the backbone's part, see `rename`.
        options: of `infer_options`.
    """
    modules = _pair_detectron2(options) if layout == "detectron2" else _pair_torchvision(options)
    names = {}
    for key in keys:
        module, _, tensor = key.rpartition(".")
        if key.startswith("backbone."):
            names[key] = f"{BACKBONES[layout]}{rename(key.removeprefix('backbone.'), backbone_layout)}"
        else:
            names[key] = f"{modules[module]}.{tensor}"
    return names


def _pair_detectron2(options: Mapping[str, Any]) -> dict[str, str]:
    """Return detectron2's name of each of our modules outside of the backbone."""
    rpn, mask_head = "proposal_generator.rpn_head", "roi_heads.mask_head"
    names = {
        "rpn.head.conv.0.0": f"{rpn}.conv",
        "rpn.head.cls_logits": f"{rpn}.objectness_logits",
        "rpn.head.bbox_pred": f"{rpn}.anchor_deltas",
        "roi_heads.masks.predictor.conv5_mask": f"{mask_head}.deconv",
        "roi_heads.masks.predictor.mask_fcn_logits": f"{mask_head}.predictor",
    }
    blocks = {}  # a convolution and its norm
    for level in range(4):
        blocks[f"fpn.inner_blocks.{level}"] = f"backbone.fpn_lateral{level + 2}"
        blocks[f"fpn.layer_blocks.{level}"] = f"backbone.fpn_output{level + 2}"
    convs = options["box_convs"]
    for stage in range(3 if options["cascade"] else 1):
        ours, number = f"roi_heads.stages.{stage}", f".{stage}" if options["cascade"] else ""
        blocks |= {f"{ours}.body.{conv}": f"roi_heads.box_head{number}.conv{conv + 1}" for conv in range(convs)}
        for fc in range(options["box_fcs"]):  # behind the convolutions and what flattens their map; a ReLU after each
            names[f"{ours}.body.{convs + 1 + 2 * fc}"] = f"roi_heads.box_head{number}.fc{fc + 1}"
        names[f"{ours}.classify"] = f"roi_heads.box_predictor{number}.cls_score"
        names[f"{ours}.regress"] = f"roi_heads.box_predictor{number}.bbox_pred"
    for conv in range(options["mask_convs"]):
        blocks[f"roi_heads.masks.body.{conv}"] = f"{mask_head}.mask_fcn{conv + 1}"
    for ours, block in blocks.items():
        names |= {f"{ours}.0": block, f"{ours}.1": f"{block}.norm"}
    return names


def _pair_torchvision(options: Mapping[str, Any]) -> dict[str, str]:
    """Return torchvision's name of each of our modules outside of the backbone: we use its parts."""
    names = {f"rpn.head.{part}": f"rpn.head.{part}" for part in ("cls_logits", "bbox_pred")}
    names |= {f"rpn.head.conv.{conv}.0": f"rpn.head.conv.{conv}.0" for conv in range(options["rpn_convs"])}
    for part in ("inner_blocks", "layer_blocks"):
        names |= {f"fpn.{part}.{k}.{m}": f"backbone.fpn.{part}.{k}.{m}" for k in range(4) for m in range(2)}
    convs = options["box_convs"]
    body = [f"{conv}.{part}" for conv in range(convs) for part in range(2)]
    body += [str(convs + 1 + 2 * fc) for fc in range(options["box_fcs"])]
    names |= {f"roi_heads.stages.0.body.{part}": f"roi_heads.box_head.{part}" for part in body}
    names["roi_heads.stages.0.classify"] = "roi_heads.box_predictor.cls_score"
    names["roi_heads.stages.0.regress"] = "roi_heads.box_predictor.bbox_pred"
    masks = [f"{conv}.{part}" for conv in range(options["mask_convs"]) for part in range(2)]
    names |= {f"roi_heads.masks.body.{part}": f"roi_heads.mask_head.{part}" for part in masks}
    for part in ("conv5_mask", "mask_fcn_logits"):
        names[f"roi_heads.masks.predictor.{part}"] = f"roi_heads.mask_predictor.{part}"
    return names
