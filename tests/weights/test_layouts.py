"""Key names against the official list, and the other layouts against it."""

import functools

import pytest
import torch

from resnest_imagenet import build_model
from resnest_imagenet.models.resnest import ResNeStSpec
from resnest_imagenet.models.zoo import ARCHITECTURES
from resnest_imagenet.weights.layouts import recognise, rename

RESNESTS = [name for name, spec in ARCHITECTURES.items() if isinstance(spec, ResNeStSpec)]
LAYERS = {"resnest14": (1, 1, 1, 1), "resnest26": (2, 2, 2, 2), "resnest101": (3, 4, 23, 3)}
LAYERS |= {"resnest200": (3, 24, 36, 3), "resnest269": (3, 30, 48, 8), "resnest101_fast": (3, 4, 23, 3)}
LAYERS |= {"resnest14_half": (1, 1, 1, 1)}
BN = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


@functools.cache
def keys_of(name):
    with torch.device("meta"):
        return list(build_model(name).state_dict())


def list_official_keys(layers):
    """The official files' keys, from their description: stem, blocks of three convolutions, shortcut, classifier."""
    keys = [f"conv1.{i}.weight" for i in (0, 3, 6)]
    norms = ["conv1.1", "conv1.4", "bn1"]
    for layer, blocks in enumerate(layers, 1):
        for block in range(blocks):
            place = f"layer{layer}.{block}"
            keys += [f"{place}.{unit}.weight" for unit in ("conv1", "conv2.conv", "conv2.fc1", "conv2.fc2", "conv3")]
            keys += [f"{place}.conv2.{fc}.bias" for fc in ("fc1", "fc2")]
            norms += [f"{place}.{unit}" for unit in ("bn1", "conv2.bn0", "conv2.bn1", "bn3")]
        keys += [f"layer{layer}.0.downsample.1.weight"]
        norms += [f"layer{layer}.0.downsample.2"]
    return sorted([*keys, "fc.weight", "fc.bias", *(f"{norm}.{part}" for norm in norms for part in BN)])


@pytest.mark.parametrize("name", RESNESTS)
@pytest.mark.slow
def test_keys_are_the_official_ones(name):
    keys = keys_of(name)
    assert sorted(keys) == list_official_keys(LAYERS.get(name, (3, 4, 6, 3)))
    count = {"resnest50": 476, "resnest101": 935, "resnest50_fast_1s4x24d": 476}.get(name)
    assert count in (None, len(keys))


# Official, mmpretrain, detectron2.
NAMES = [
    ("conv1.0.weight", "backbone.stem.0.conv.weight", "stem.conv1_1.weight"),
    ("conv1.1.bias", "backbone.stem.0.bn.bias", "stem.conv1_1.norm.bias"),
    ("conv1.3.weight", "backbone.stem.1.conv.weight", "stem.conv1_2.weight"),
    ("conv1.4.running_var", "backbone.stem.1.bn.running_var", "stem.conv1_2.norm.running_var"),
    ("conv1.6.weight", "backbone.stem.2.conv.weight", "stem.conv1_3.weight"),
    ("bn1.weight", "backbone.stem.2.bn.weight", "stem.conv1_3.norm.weight"),
    ("layer1.0.conv1.weight", "backbone.layer1.0.conv1.weight", "res2.0.conv1.weight"),
    ("layer2.3.bn1.bias", "backbone.layer2.3.bn1.bias", "res3.3.conv1.norm.bias"),
    ("layer3.5.conv2.conv.weight", "backbone.layer3.5.conv2.conv.weight", "res4.5.conv2.conv.weight"),
    ("layer3.5.conv2.bn0.weight", "backbone.layer3.5.conv2.bn0.weight", "res4.5.conv2.bn0.weight"),
    ("layer3.5.conv2.bn1.weight", "backbone.layer3.5.conv2.bn1.weight", "res4.5.conv2.bn1.weight"),
    ("layer3.5.conv2.fc1.bias", "backbone.layer3.5.conv2.fc1.bias", "res4.5.conv2.fc1.bias"),
    ("layer4.2.bn3.running_mean", "backbone.layer4.2.bn3.running_mean", "res5.2.conv3.norm.running_mean"),
    ("layer1.0.downsample.1.weight", "backbone.layer1.0.downsample.0.weight", "res2.0.shortcut.weight"),
    ("layer1.0.downsample.2.bias", "backbone.layer1.0.downsample.1.bias", "res2.0.shortcut.norm.bias"),
    ("layer4.0.downsample.1.weight", "backbone.layer4.0.downsample.1.weight", "res5.0.shortcut.weight"),
    ("layer4.0.downsample.2.bias", "backbone.layer4.0.downsample.2.bias", "res5.0.shortcut.norm.bias"),
    ("fc.weight", "head.fc.weight", None),
]


@pytest.mark.parametrize(("official", "mmpretrain", "detectron2"), NAMES)
def test_names(official, mmpretrain, detectron2):
    assert rename(official, "official") == rename(official, "timm") == official
    assert rename(official, "mmpretrain") == mmpretrain
    assert rename(official, "detectron2") == detectron2


@pytest.mark.parametrize("layout", ["official", "mmpretrain", "detectron2"])
@pytest.mark.parametrize("name", ["resnest50", "resnest101"])
@pytest.mark.slow
def test_no_two_keys_get_one_name_and_the_layout_is_recognised(name, layout):
    keys = keys_of(name)
    renamed = [rename(key, layout) for key in keys if rename(key, layout)]
    assert len(set(renamed)) == len(keys) - (2 if layout == "detectron2" else 0)
    assert recognise(renamed) == layout
