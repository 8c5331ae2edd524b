"""How others name a ResNeSt's tensors, and a DeepLabV3's.

official        zhanghang1989/ResNeSt, and this project's own names; timm's are the same
mmpretrain      backbone.*, head.fc.*
mmsegmentation  backbone.*, with stem.0 to stem.7; beside it decode_head.*, auxiliary_head.*
mmdetection     backbone.*, as mmsegmentation
detectron2      stem.*, res2..res5.*; no classifier
encoding        of a DeepLabV3 in PyTorch-Encoding: pretrained.* (official), head.*, auxlayer.*
"""

import re
from collections.abc import Callable, Collection

# Beginnings of official names and what replaces them; the first that fits is taken.
Rules = list[tuple[str, Callable[[re.Match[str]], str]]]

_MMPRETRAIN: Rules = [
    (r"conv1\.([036])\.", lambda m: f"stem.{int(m[1]) // 3}.conv."),
    (r"conv1\.([14])\.", lambda m: f"stem.{int(m[1]) // 3}.bn."),
    (r"bn1\.", lambda m: "stem.2.bn."),
    # No pool where the stride is 1: the convolution and its BN move up by one.
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
    """Return the name of an official key in a layout, or None where the layout has no such tensor."""
    if layout == "mmpretrain":
        return f"head.{key}" if key.startswith("fc.") else f"backbone.{_apply(_MMPRETRAIN, key)}"
    if layout in ("mmsegmentation", "mmdetection"):
        return None if key.startswith("fc.") else f"backbone.{_apply(_MMSEGMENTATION, key)}"
    if layout == "detectron2":
        return None if key.startswith("fc.") else _apply(_DETECTRON2, key)
    return key


def recognise(keys: Collection[str]) -> str:
    """Return the layout of a file by a key that no other layout has; official where none is found."""
    if "backbone.stem.0.conv.weight" in keys:
        return "mmpretrain"
    if "backbone.stem.0.weight" in keys:
        return "mmsegmentation"
    return "detectron2" if "stem.conv1_1.weight" in keys else "official"


def rename_deeplab(key: str, layout: str) -> str:
    """Return the name of a tensor of our DeepLabV3 in a layout, "official" (ours) or "encoding"."""
    return _apply(_ENCODING, key) if layout == "encoding" else key


def recognise_deeplab(keys: Collection[str]) -> str | None:
    """Return the layout of a DeepLabV3 with heads as ours; None of any other network."""
    if any(key.startswith("pretrained.") for key in keys):
        return "encoding"
    return "official" if "head.classify.weight" in keys else None


def _apply(rules: Rules, key: str) -> str:
    for pattern, replace in rules:
        match = re.match(pattern, key)
        if match:
            return replace(match) + key[match.end() :]
    return key
