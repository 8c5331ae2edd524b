"""How others name a ResNeSt's tensors.

official     zhanghang1989/ResNeSt, and this project's own names; timm's are the same
mmpretrain   backbone.*, head.fc.*
detectron2   stem.*, res2..res5.*; no classifier
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
_DETECTRON2: Rules = [
    (r"conv1\.([036])\.", lambda m: f"stem.conv1_{int(m[1]) // 3 + 1}."),
    (r"conv1\.([14])\.", lambda m: f"stem.conv1_{int(m[1]) // 3 + 1}.norm."),
    (r"bn1\.", lambda m: "stem.conv1_3.norm."),
    (r"layer(\d)\.(\d+)\.bn([13])\.", lambda m: f"res{int(m[1]) + 1}.{m[2]}.conv{m[3]}.norm."),
    (r"layer(\d)\.0\.downsample\.1\.", lambda m: f"res{int(m[1]) + 1}.0.shortcut."),
    (r"layer(\d)\.0\.downsample\.2\.", lambda m: f"res{int(m[1]) + 1}.0.shortcut.norm."),
    (r"layer(\d)\.", lambda m: f"res{int(m[1]) + 1}."),
]


def rename(key: str, layout: str) -> str | None:
    """Return the name of an official key in a layout, or None where the layout has no such tensor."""
    if layout == "mmpretrain":
        return f"head.{key}" if key.startswith("fc.") else f"backbone.{_apply(_MMPRETRAIN, key)}"
    if layout == "detectron2":
        return None if key.startswith("fc.") else _apply(_DETECTRON2, key)
    return key


def recognise(keys: Collection[str]) -> str:
    """Return the layout of a file by a key that no other layout has; official where none is found."""
    if "backbone.stem.0.conv.weight" in keys:
        return "mmpretrain"
    return "detectron2" if "stem.conv1_1.weight" in keys else "official"


def _apply(rules: Rules, key: str) -> str:
    for pattern, replace in rules:
        match = re.match(pattern, key)
        if match:
            return replace(match) + key[match.end() :]
    return key
