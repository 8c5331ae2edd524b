"""Weights into a DeepLabV3 from every kind of file, and each way in which they do not fit."""

import re

import pytest
import torch
from torch import nn

from resnest_imagenet import build_model
from resnest_imagenet.checkpoint import save_checkpoint
from resnest_imagenet.errors import CheckpointError, ConfigError
from resnest_imagenet.models.deeplab import build_deeplab
from resnest_imagenet.weights.layouts import rename, rename_deeplab
from resnest_imagenet.weights.load import read_weights
from resnest_imagenet.weights.segmentation import SEGMENTATION, load_deeplab, start_deeplab

NAME = "resnest14_half"
CLASSES = ["wall", "tree", "car"]


def build(num_classes=3, seed=0, **options):
    """Return a network each of whose tensors is different from those of other seeds."""
    torch.manual_seed(seed)
    model = build_deeplab(NAME, num_classes, channels=32, **options).eval()
    for value in model.state_dict().values():
        if value.ndim == 1:
            nn.init.uniform_(value, 0.5, 1.5)
    return model


@pytest.fixture
def save(tmp_path):
    """Write a state dict and return its path."""

    def write(content):
        save_checkpoint(content, tmp_path / "weights.pth")
        return str(tmp_path / "weights.pth")

    return write


def run_of(state, task, classes):
    """As a run of this project has it."""
    config = {"model": {"name": NAME}, "train": {}}
    return {"model": state, "ema": None, "config": config, "classes": classes, "epoch": 1, "task": task}


def of_encoding(state):
    return {rename_deeplab(key, "encoding"): value for key, value in state.items()}


def of_mmsegmentation(state):
    """The backbone, and a head of other layers."""
    backbone = {
        rename(key.removeprefix("backbone."), "mmsegmentation"): value
        for key, value in state.items()
        if key.startswith("backbone.")
    }
    assert "backbone.stem.7.bias" in backbone
    heads = ("decode_head.bottleneck.conv.weight", "decode_head.conv_seg.bias", "auxiliary_head.conv_seg.bias")
    return {**backbone, **dict.fromkeys(heads, torch.ones(3))}


def assert_taken(model, source, state, parts):
    """Weights of the parts are the source's, all others a new network's."""
    own = build(seed=1).state_dict()
    message = start_deeplab(model, NAME, CLASSES, source)
    for key, value in model.state_dict().items():
        expected = state if key.startswith(parts) else own
        assert torch.equal(value, expected[key]) or key.endswith("num_batches_tracked"), key
    return message


HEADS = ("backbone.", "head.b", "head.p", "auxiliary.block.")  # all but the classifiers
ALL = ("backbone.", "head.", "auxiliary.")


@pytest.mark.parametrize(
    ("wrap", "parts", "message"),
    [
        (lambda s: {f"module.{k}": v for k, v in of_encoding(s).items()}, ALL, "its backbone, heads and classes"),
        (lambda s: {"state_dict": of_encoding(s), "epoch": 3}, ALL, "its backbone, heads and classes"),
        (lambda s: {k: v for k, v in of_encoding(s).items() if "num_batches" not in k}, ALL, "its backbone, heads and"),
        (of_mmsegmentation, ("backbone.",), "its backbone"),
        (lambda s: {"state_dict": of_mmsegmentation(s), "meta": {"iter": 160000}}, ("backbone.",), "its backbone"),
        (lambda s: run_of(s, SEGMENTATION, CLASSES), ALL, "its backbone, heads and classes"),
        (lambda s: run_of(s, SEGMENTATION, ["a", "b", "c"]), HEADS, "its backbone and heads"),
    ],
)
def test_a_segmentation_network_starts_a_run(wrap, parts, message, save):
    state = build().state_dict()
    assert assert_taken(build(seed=1), save(wrap(state)), state, parts).startswith(message)


@pytest.mark.parametrize(
    ("layout", "as_run"), [("official", False), ("official", True), ("mmpretrain", False), ("detectron2", False)]
)
def test_a_classification_network_starts_the_backbone(layout, as_run, save):
    torch.manual_seed(2)
    network = build_model(NAME, 10)
    state = {rename(key, layout): value for key, value in network.state_dict().items()}
    state = {key: value for key, value in state.items() if key}
    source = save(run_of(state, "classification", ["x"] * 10) if as_run else state)
    expected = {f"backbone.{key}": value for key, value in network.state_dict().items()}
    assert assert_taken(build(seed=1), source, expected, ("backbone.",)) == "its backbone"


@pytest.mark.slow
def test_published_weights_start_the_backbone_of_their_network(tmp_path, monkeypatch):
    """Timm's names of Table 7's ResNets are known; what the hub would send is a file here."""
    from resnest_imagenet.weights import published

    network, source = build_model("resnet50s"), "timm:resnet50s.gluon_in1k"
    save_checkpoint(network.state_dict(), tmp_path / "a.pth")
    monkeypatch.setattr(published, "_fetch_timm", lambda *_: tmp_path / "a.pth")
    model = build_deeplab("resnet50s", 3)
    assert start_deeplab(model, "resnet50s", CLASSES, source) == "its backbone"
    assert all(torch.equal(value, network.state_dict()[key]) for key, value in model.backbone.state_dict().items())
    with pytest.raises(ConfigError, match=rf"^model={NAME}, but {source} holds a resnet50s$"):
        start_deeplab(build(), NAME, CLASSES, source)


def test_a_backbone_that_expects_other_pixels_is_refused(save):
    """Scenes and images with objects are normalised by ImageNet's mean and deviation."""
    run = run_of(build_model(NAME, 10).state_dict(), "classification", ["x"] * 10)
    run["config"]["train"]["std"] = [0.2, 0.2, 0.3]
    model = build(seed=1)
    with pytest.raises(CheckpointError, match=r"trained with train.std=\[0.2, 0.2, 0.3\], which only task=class"):
        start_deeplab(model, NAME, "abc", save(run))


def test_classes_are_put_in_the_runs_order(save):
    state = build().state_dict()
    model = build(seed=1)
    start_deeplab(model, NAME, CLASSES, save(run_of(state, SEGMENTATION, ["car", "wall", "tree"])))
    for key in ("head.classify.weight", "auxiliary.classify.bias"):
        assert torch.equal(model.state_dict()[key], state[key][[1, 2, 0]])


def test_another_number_of_classes_starts_without_them(save):
    source = save(of_encoding(build(num_classes=7).state_dict()))
    assert start_deeplab(build(seed=1), NAME, CLASSES, source) == "its backbone and heads"


@pytest.mark.parametrize("auxiliary", [True, False])
@pytest.mark.parametrize("wrap", [of_encoding, lambda state: run_of(state, SEGMENTATION, CLASSES)])
def test_a_trained_network_is_restored(wrap, auxiliary, save):
    trained, model = build(), build(seed=1, auxiliary=auxiliary)
    load_deeplab(model, NAME, read_weights(save(wrap(trained.state_dict())), tasks=(SEGMENTATION,)))
    images = torch.randn(2, 3, 33, 50)
    with torch.no_grad():
        assert torch.equal(model(images), trained(images))


# Ours, PyTorch-Encoding's.
NAMES = [
    ("backbone.conv1.0.weight", "pretrained.conv1.0.weight"),
    ("backbone.layer4.2.bn3.running_mean", "pretrained.layer4.2.bn3.running_mean"),
    ("head.branches.0.0.weight", "head.aspp.b0.0.weight"),
    ("head.branches.3.1.bias", "head.aspp.b3.1.bias"),
    ("head.pooled.0.weight", "head.aspp.b4.gap.1.weight"),
    ("head.pooled.1.running_var", "head.aspp.b4.gap.2.running_var"),
    ("head.project.0.weight", "head.aspp.project.0.weight"),
    ("head.block.1.weight", "head.block.1.weight"),
    ("head.classify.bias", "head.block.4.bias"),
    ("auxiliary.block.0.weight", "auxlayer.conv5.0.weight"),
    ("auxiliary.classify.weight", "auxlayer.conv5.4.weight"),
]


def test_names_of_pytorch_encoding():
    keys = list(build().state_dict())
    assert {ours for ours, _ in NAMES if "layer4.2" not in ours} <= set(keys)
    assert [rename_deeplab(ours, "encoding") for ours, _ in NAMES] == [theirs for _, theirs in NAMES]
    assert len({rename_deeplab(key, "encoding") for key in keys}) == len(keys)


def test_names_of_mmsegmentation():
    names = {"conv1.0.weight": "stem.0.weight", "conv1.4.bias": "stem.4.bias", "bn1.bias": "stem.7.bias"}
    names |= {key: key for key in ("layer1.0.downsample.1.weight", "layer2.0.conv2.bn0.bias", "layer1.0.bn1.bias")}
    for ours, theirs in names.items():
        assert rename(ours, "mmsegmentation") == f"backbone.{theirs}"
    assert rename("fc.weight", "mmsegmentation") is None


def without(key):
    return lambda state: {k: v for k, v in of_encoding(state).items() if k != key}


def with_(key, value):
    return lambda state: {**of_encoding(state), key: value}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without("head.aspp.b2.0.weight"), "head.aspp.b2.0.weight is missing: not all the weights of this DeepLabV3"),
        (without("auxlayer.conv5.1.bias"), "auxlayer.conv5.1.bias is missing"),
        (without("pretrained.layer4.0.bn3.bias"), "layer4.0.bn3.bias is missing: not the weights of resnest14_half"),
        (with_("head.extra", torch.ones(1)), "unexpected key head.extra: not the weights of this DeepLabV3"),
        (
            with_("head.block.0.weight", torch.ones(64, 64, 3, 3)),
            r"head.block.0.weight has shape \(64, 64, 3, 3\), not \(32, 32, 3, 3\): of a DeepLabV3 with other channels",
        ),
        (
            lambda s: {k: v for k, v in of_mmsegmentation(s).items() if k != "backbone.layer3.0.conv1.weight"},
            "backbone.layer3.0.conv1.weight is missing: not the weights of resnest14_half",
        ),
        (
            lambda s: {**run_of(s, "detection", CLASSES)},
            "a checkpoint of task detection, not of classification or segm",
        ),
    ],
)
def test_what_does_not_fit_is_one_line_and_changes_nothing(damage, message, save):
    source, model = save(damage(build().state_dict())), build(seed=1)
    with pytest.raises(CheckpointError, match=f"^{re.escape(source)}: {message}") as error:
        start_deeplab(model, NAME, CLASSES, source)
    assert "\n" not in str(error.value)
    own = build(seed=1).state_dict()
    assert all(torch.equal(value, own[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (of_mmsegmentation, "not the weights of a DeepLabV3 of this project or of PyTorch-Encoding: start a run from"),
        (
            lambda s: of_encoding(build(num_classes=7).state_dict()),
            r"head.block.4.weight has shape \(7, 32, 1, 1\), not",
        ),
    ],
)
def test_what_cannot_be_restored_is_one_line(content, message, save):
    source = save(content(build().state_dict()))
    with pytest.raises(CheckpointError, match=f"^{re.escape(source)}: {message}"):
        load_deeplab(build(), NAME, read_weights(source))
