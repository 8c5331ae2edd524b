"""The names that others give to the tensors of a ResNeSt, a ResNet and a DeepLabV3.

official        zhanghang1989/ResNeSt and this project; timm's names are the same
mmpretrain      backbone.*, head.fc.*
mmsegmentation  backbone.*, with stem.0 to stem.7; beside it decode_head.*, auxiliary_head.*
mmdetection     backbone.*, as in mmsegmentation
detectron2      stem.*, res2..res5.*; no classifier, except a ResNet's stem.fc.*
caffe2          conv1_w, res2_0_branch2a_w, ...: MSRA's ResNets in detectron2's files
encoding        a DeepLabV3 in PyTorch-Encoding: pretrained.* (official), head.*, auxlayer.*
"""

import re
from collections.abc import Callable, Collection

# Beginnings of official names and their replacements; the first that matches is used.
Rules = list[tuple[str, Callable[[re.Match[str]], str]]]

_MMPRETRAIN: Rules = [
    (r"conv1\.([036])\.", lambda m: f"stem.{int(m[1]) // 3}.conv."),
    (r"conv1\.([14])\.", lambda m: f"stem.{int(m[1]) // 3}.bn."),
    (r"bn1\.", lambda m: "stem.2.bn."),
    # There is no pool if the stride is 1, so the numbers of the convolution and its BN are lower by one.
    (r"layer1\.0\.downsample\.([12])\.", lambda m: f"layer1.0.downsample.{int(m[1]) - 1}."),
]
_MMSEGMENTATION: Rules = [
    (r"conv1\.([01346])\.", lambda m: f"stem.{m[1]}."),
    (r"bn1\.", lambda m: "stem.7."),
]
_DETECTRON2: Rules = [
    (r"conv1\.([036])\.", lambda m: f"stem.conv1_{int(m[1]) // 3 + 1}."),
    (r"conv1\.([14])\.", lambda m: f"stem.conv1_{int(m[1]) // 3 + 1}.norm."),
    (r"bn1\.", lambda m: "stem.conv1_3.norm."),
    (r"layer(\d)\.(\d+)\.bn([13])\.", lambda m: f"res{int(m[1]) + 1}.{m[2]}.conv{m[3]}.norm."),
    (r"layer(\d)\.0\.downsample\.1\.", lambda m: f"res{int(m[1]) + 1}.0.shortcut."),
    (r"layer(\d)\.0\.downsample\.2\.", lambda m: f"res{int(m[1]) + 1}.0.shortcut.norm."),
    (r"layer(\d)\.", lambda m: f"res{int(m[1]) + 1}."),
]
# For networks without split attention; this project then has torchvision's names.
_DETECTRON2_RESNET: Rules = [
    (r"(?=conv1\.|fc\.)", lambda m: "stem."),
    (r"bn1\.", lambda m: "stem.conv1.norm."),
    (r"layer(\d)\.(\d+)\.bn(\d)\.", lambda m: f"res{int(m[1]) + 1}.{m[2]}.conv{m[3]}.norm."),
    (r"layer(\d)\.0\.downsample\.0\.", lambda m: f"res{int(m[1]) + 1}.0.shortcut."),
    (r"layer(\d)\.0\.downsample\.1\.", lambda m: f"res{int(m[1]) + 1}.0.shortcut.norm."),
    (r"layer(\d)\.", lambda m: f"res{int(m[1]) + 1}."),
]
_OF_NORM = {"weight": "gamma", "bias": "beta"}
_CAFFE2: Rules = [
    (r"conv1\.weight", lambda m: "conv1_w"),
    (r"bn1\.(\w+)", lambda m: f"res_conv1_bn_{_OF_NORM.get(m[1], m[1])}"),
    (r"layer(\d)\.(\d+)\.conv(\d)\.weight", lambda m: f"{_name_branch(m)}_w"),
    (r"layer(\d)\.(\d+)\.bn(\d)\.(\w+)", lambda m: f"{_name_branch(m)}_bn_{_OF_NORM.get(m[4], m[4])}"),
    (r"layer(\d)\.0\.downsample\.0\.weight", lambda m: f"res{int(m[1]) + 1}_0_branch1_w"),
    (
        r"layer(\d)\.0\.downsample\.1\.(\w+)",
        lambda m: f"res{int(m[1]) + 1}_0_branch1_bn_{_OF_NORM.get(m[2], m[2])}",
    ),
    (r"fc\.(.)\w+", lambda m: f"fc1000_{m[1]}"),
]
# Other keys of a file: the optimiser's momentum, and a bias of the first convolution that detectron2 does not read.
_UNREAD = {"caffe2": re.compile(r".*_momentum|conv1_b")}


def _name_branch(match: re.Match[str]) -> str:
    return f"res{int(match[1]) + 1}_{match[2]}_branch2{'abc'[int(match[3]) - 1]}"


_ENCODING: Rules = [
    (r"backbone\.", lambda m: "pretrained."),
    (r"head\.branches\.", lambda m: "head.aspp.b"),
    (r"head\.pooled\.([01])\.", lambda m: f"head.aspp.b4.gap.{int(m[1]) + 1}."),
    (r"head\.project\.", lambda m: "head.aspp.project."),
    (r"head\.classify\.", lambda m: "head.block.4."),
    (r"auxiliary\.block\.", lambda m: "auxlayer.conv5."),
    (r"auxiliary\.classify\.", lambda m: "auxlayer.conv5.4."),
]


def rename(key: str, layout: str) -> str | None:
    """Return the name of an official key in a layout, or None if the layout has no such tensor."""
    if layout == "mmpretrain":
        return f"head.{key}" if key.startswith("fc.") else f"backbone.{_apply(_MMPRETRAIN, key)}"
    if layout in ("mmsegmentation", "mmdetection"):
        return None if key.startswith("fc.") else f"backbone.{_apply(_MMSEGMENTATION, key)}"
    if layout == "detectron2":
        return None if key.startswith("fc.") else _apply(_DETECTRON2, key)
    if layout in ("detectron2_resnet", "caffe2"):
        return _apply(_DETECTRON2_RESNET if layout == "detectron2_resnet" else _CAFFE2, key)
    return key


def is_unread(key: str, layout: str) -> bool:
    """Return whether a file of a layout may have this key in addition to a network's."""
    return layout in _UNREAD and _UNREAD[layout].fullmatch(key) is not None


def recognise(keys: Collection[str]) -> str:
    """Return the layout of a file, by a key that no other layout has; "official" without such a key."""
    if "backbone.stem.0.conv.weight" in keys:
        return "mmpretrain"
    if "backbone.stem.0.weight" in keys:
        return "mmsegmentation"
    if "res2_0_branch2a_w" in keys:
        return "caffe2"
    if "stem.conv1.weight" in keys:
        return "detectron2_resnet"
    return "detectron2" if "stem.conv1_1.weight" in keys else "official"


def rename_deeplab(key: str, layout: str) -> str:
    """Return the name of a tensor of this project's DeepLabV3 in a layout, "official" (its own) or "encoding"."""
    return _apply(_ENCODING, key) if layout == "encoding" else key


def recognise_deeplab(keys: Collection[str]) -> str | None:
    """Return the layout of a DeepLabV3 with the heads of this project; None for any other network."""
    if any(key.startswith("pretrained.") for key in keys):
        return "encoding"
    return "official" if "head.classify.weight" in keys else None


def _apply(rules: Rules, key: str) -> str:
    for pattern, replace in rules:
        match = re.match(pattern, key)
        if match:
            return replace(match) + key[match.end() :]
    return key
