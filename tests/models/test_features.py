"""Backbones against the classification networks that they come from, and in the frameworks' heads."""

import copy
from collections import OrderedDict

import pytest
import torch
from torch import nn

from resnest_imagenet import build_model
from resnest_imagenet.errors import CheckpointError, ConfigError
from resnest_imagenet.models.features import STAGES
from resnest_imagenet.models.folding import fold_batch_norms
from resnest_imagenet.weights.layouts import rename
from resnest_imagenet.weights.load import load_backbone

# The demo's network, and the peer that has timm's batch norms with activations within beside plain ones.
NETWORKS = ["resnest14_half", pytest.param("skresnext50_32x4d", marks=pytest.mark.slow)]
NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)  # timm's derive from them


def build_pair(name="resnest14_half", output_stride=32, **options):
    """Return a classification network with statistics of its own, and a backbone with the same weights; float64."""
    torch.manual_seed(0)
    model = build_model(name, 10, zero_gamma=False, output_stride=output_stride).double()
    for module in model.modules():
        if isinstance(module, NORMS):
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.running_var, 0.8, 1.2)
            nn.init.uniform_(module.bias, -0.1, 0.1)
    backbone = build_model(name, output_stride=output_stride, features_only=True, **options).double()
    missing, left = backbone.load_state_dict(model.state_dict(), strict=False)
    assert not missing and all(key.startswith(("fc.", "layer")) for key in left)
    return model, backbone


def collect_features(model, images):
    """Return what the stages of a classification network put out: "stem" is what goes into the max pool."""
    found = {}
    model.maxpool.register_forward_pre_hook(lambda module, inputs: found.update(stem=inputs[0].clone()))
    for name in ("layer1", "layer2", "layer3", "layer4"):
        getattr(model, name).register_forward_hook(
            lambda module, inputs, output, name=name: found.update({name: output.clone()})
        )
    model(images)
    return found


@pytest.mark.parametrize(
    ("name", "output_stride"),
    [
        ("resnest14_half", 32),
        pytest.param("resnest26", 16, marks=pytest.mark.slow),
        pytest.param("resnest26", 8, marks=pytest.mark.slow),
        pytest.param("resnet50d", 8, marks=pytest.mark.slow),
        pytest.param("skresnext50_32x4d", 32, marks=pytest.mark.slow),
    ],
)
def test_features_are_the_classification_networks(name, output_stride):
    model, backbone = build_pair(name, output_stride)
    images = torch.randn(2, 3, 33, 65, dtype=torch.float64)
    for training in (False, True):
        expected = collect_features(model.train(training), images)
        features = backbone.train(training)(images)
        assert backbone.names == tuple(expected) and backbone.strides[0] == 2
        for stage, feature, stride, channels in zip(
            backbone.names, features, backbone.strides, backbone.channels, strict=True
        ):
            torch.testing.assert_close(feature, expected[stage], rtol=0, atol=0)
            assert feature.shape == (2, channels, -(-33 // stride), -(-65 // stride))


@pytest.mark.parametrize(("output_stride", "strides"), [(32, (8, 16, 32)), (16, (8, 16, 16)), (8, (8, 8, 8))])
@pytest.mark.slow
def test_strides_follow_the_output_stride(output_stride, strides):
    with torch.device("meta"):
        backbone = build_model("resnest50", output_stride=output_stride, features_only=True).eval()
        features = backbone(torch.empty(1, 3, 64, 64))
    assert backbone.strides == (2, 4, *strides)
    assert [feature.shape[2] for feature in features] == [64 // stride for stride in backbone.strides]
    assert backbone.channels == (64, 256, 512, 1024, 2048)


# One of each kind of stem, block and shortcut; the others repeat them, more often or of another width.
KINDS = ["resnest14", "resnest50_fast_4s2x40d", "resnet50", "resnet50s", "seresnext50_32x4d", "skresnext50_32x4d"]


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_network_has_features(name):
    with torch.device("meta"):
        model, backbone = build_model(name), build_model(name, features_only=True).eval()
        features = backbone(torch.empty(1, 3, 64, 64))
    assert [feature.shape[1] for feature in features] == list(backbone.channels)
    assert [feature.shape[2] for feature in features] == [32, 16, 8, 4, 2]
    assert [*backbone.state_dict(), "fc.weight", "fc.bias"] == list(model.state_dict())


def test_what_is_not_asked_for_is_not_there():
    model, backbone = build_pair(out_features=("layer3", "stem"))
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    expected = collect_features(model.eval(), images)
    assert (backbone.names, backbone.strides, backbone.channels) == (("layer3", "stem"), (16, 2), (512, 32))
    for name, feature in zip(backbone.names, backbone.eval()(images), strict=True):
        assert torch.equal(feature, expected[name])
    assert [name for name, _ in backbone.named_children()] == ["conv1", "bn1", "maxpool", "layer1", "layer2", "layer3"]
    sum(feature.sum() for feature in backbone.train()(images)).backward()
    assert all(p.grad is not None for p in backbone.parameters())


def take_step(backbone, images):
    """Take a training step with a loss on all features; return the names of the entries of the state that moved."""
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    trained = [p for p in backbone.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, 0.1)
    sum(feature.square().mean() for feature in backbone(images)).backward()
    assert all(p.grad is not None for p in trained)
    assert all(p.grad is None for p in backbone.parameters() if not p.requires_grad)
    optimizer.step()
    return {key for key, value in backbone.state_dict().items() if not torch.equal(value, before[key])}


@pytest.mark.parametrize(
    ("name", "freeze_at"),
    [
        *(("resnest14_half", n) for n in range(5)),
        pytest.param("skresnext50_32x4d", 2, marks=pytest.mark.slow),
    ],
)
def test_frozen_stages_stay_as_they_are(name, freeze_at):
    _, backbone = build_pair(name, freeze_at=freeze_at)
    backbone.eval().train()  # as frameworks do
    moved = take_step(backbone, torch.randn(2, 3, 64, 64, dtype=torch.float64))
    frozen = tuple(f"{part}." for stage in list(STAGES)[:freeze_at] for part in STAGES[stage])
    stay = {key for key in backbone.state_dict() if key.startswith(frozen)}
    assert moved == backbone.state_dict().keys() - stay


def test_all_stages_can_be_frozen():
    _, backbone = build_pair(freeze_at=5)
    assert not any(p.requires_grad for p in backbone.parameters())
    assert not any(module.training for module in backbone.train().modules() if module is not backbone)


@pytest.mark.parametrize("name", NETWORKS)
def test_frozen_batch_norms_stay_as_they_are_and_nothing_else(name):
    model, backbone = build_pair(name, norm="frozen")
    backbone.eval().train()
    images = torch.randn(1, 3, 64, 64, dtype=torch.float64)  # one, as detectors train with
    expected = collect_features(model.eval(), images)
    for stage, feature in zip(backbone.names, backbone(images), strict=True):
        torch.testing.assert_close(feature, expected[stage])
    norms = tuple(f"{path}." for path, module in backbone.named_modules() if isinstance(module, NORMS))
    assert take_step(backbone, images) == {key for key in backbone.state_dict() if not key.startswith(norms)}


@pytest.mark.parametrize("options", [{"norm": "frozen"}, {"norm": "sync"}, {"norm": "sync", "freeze_at": 2}])
def test_fused_split_attention_equals_the_formula(options):
    """With batch norms that are frozen, and SyncBatchNorm, which is a plain one in a process alone."""
    _, fused = build_pair(**options)
    reference = copy.deepcopy(fused)
    for module in reference.modules():
        if hasattr(module, "implementation"):
            module.implementation = "reference"
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    for backbone in (fused.train(), reference.train()):
        sum(feature.square().mean() for feature in backbone(images)).backward()
    assert any("Attend" in type(node).__name__ for node in walk_graph(fused(images)[-1].grad_fn))
    for (name, ours), theirs in zip(fused.named_parameters(), reference.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None) == (not ours.requires_grad), name
        if ours.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, msg=name)


def walk_graph(node):
    """Yield every node of an autograd graph."""
    todo, seen = [node], set()
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            todo += [after for after, _ in node.next_functions]


@pytest.mark.parametrize("name", NETWORKS)
def test_synchronised_batch_norms(name):
    """Converted, all of them, with their activations; equal in evaluation, and in training in a process alone."""
    model, backbone = build_pair(name, norm="sync")
    count = sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    assert sum(isinstance(module, nn.SyncBatchNorm) for module in backbone.modules()) == count
    assert not any(isinstance(module, nn.BatchNorm2d) for module in backbone.modules())
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    for training in (False, True):
        expected = collect_features(model.train(training), images)
        for stage, feature in zip(backbone.names, backbone.train(training)(images), strict=True):
            torch.testing.assert_close(feature, expected[stage])
    state = model.state_dict()
    for key, value in backbone.state_dict().items():
        torch.testing.assert_close(value, state[key], msg=key)  # the running statistics moved alike


@pytest.mark.parametrize("options", [{}, {"norm": "sync"}, {"norm": "frozen", "freeze_at": 2}])
def test_can_be_folded(options):
    _, backbone = build_pair(**options)
    folded = fold_batch_norms(backbone)
    assert not any(isinstance(module, NORMS) for module in folded.modules())
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    for ours, expected in zip(folded(images), backbone.eval()(images), strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-7 * expected.abs().max().item())


@pytest.mark.parametrize(
    ("layout", "last"),
    [("official", "layer4"), ("official", "layer2"), ("mmpretrain", "layer4"), ("detectron2", "stem")],
)
def test_loads_any_file_of_the_network(layout, last, tmp_path):
    model, _ = build_pair()
    state = {rename(key, layout): value for key, value in model.state_dict().items()}
    torch.save({key: value for key, value in state.items() if key}, tmp_path / "a.pth")
    backbone = build_model("resnest14_half", features_only=True, out_features=[last], norm="sync").double()
    load_backbone(backbone, "resnest14_half", str(tmp_path / "a.pth"))
    for key, value in backbone.state_dict().items():
        assert torch.equal(value, model.state_dict()[key]), key


@pytest.mark.slow
def test_refuses_a_file_that_is_not_all_of_the_network(tmp_path):
    model, backbone = build_pair(out_features=["layer2"])
    state = model.state_dict()
    del state["layer4.0.bn3.bias"]
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match="layer4.0.bn3.bias is missing"):
        load_backbone(backbone, "resnest14_half", str(tmp_path / "a.pth"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"out_features": ("layer5",)}, r"unknown feature 'layer5'; did you mean 'layer\d'\?"),
        ({"out_features": ()}, "out_features is empty: choose from stem, layer1"),
        ({"freeze_at": 6}, "freeze_at is 0 to 5, not 6"),
        ({"norm": "syncbn"}, "norm=syncbn: bn, frozen, sync are valid"),
        ({"features_only": False, "freeze_at": 2}, "set features_only=True"),
        ({"features_only": False, "norm": "frozen"}, "set features_only=True"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ConfigError, match=message):
        build_model("resnest14_half", **{"features_only": True, **options})


@pytest.mark.slow
def test_trains_under_torchvisions_deeplab_head():
    from torchvision.models.segmentation.deeplabv3 import DeepLabHead

    torch.manual_seed(0)
    options = {"zero_gamma": False, "output_stride": 8, "out_features": ("layer4",)}
    backbone = build_model("resnest14_half", features_only=True, **options)
    head = DeepLabHead(backbone.channels[0], 5)
    (features,) = backbone(torch.randn(2, 3, 33, 65))
    logits = nn.functional.interpolate(head(features), size=(33, 65), mode="bilinear")
    nn.functional.cross_entropy(logits, torch.randint(5, (2, 33, 65))).backward()
    assert logits.shape == (2, 5, 33, 65) and backbone.strides == (8,)
    assert all(p.grad.isfinite().all() and p.grad.any() for p in backbone.layer1[0].conv2.conv.parameters())


class Pyramid(nn.Module):
    """Torchvision's feature pyramid on a backbone, as its detectors want it."""

    def __init__(self, backbone, out_channels=32):
        from torchvision import ops

        super().__init__()
        self.body, self.out_channels = backbone, out_channels
        self.fpn = ops.FeaturePyramidNetwork(backbone.channels, out_channels)

    def forward(self, images):
        return self.fpn(OrderedDict(zip(self.body.names, self.body(images), strict=True)))


@pytest.mark.slow
def test_trains_in_torchvisions_faster_rcnn():
    """A step with one image, frozen stages and frozen batch norms: detection as it is usually set up."""
    from torchvision import ops
    from torchvision.models.detection import FasterRCNN
    from torchvision.models.detection.rpn import AnchorGenerator

    torch.manual_seed(0)
    options = {"out_features": ("layer1", "layer2", "layer3", "layer4"), "freeze_at": 2, "norm": "frozen"}
    backbone = build_model("resnest14_half", zero_gamma=False, features_only=True, **options)
    anchors = AnchorGenerator(sizes=((16,), (32,), (64,), (128,)), aspect_ratios=((1.0,),) * 4)
    pool = ops.MultiScaleRoIAlign(backbone.names, output_size=7, sampling_ratio=2)
    detector = FasterRCNN(
        Pyramid(backbone), 3, min_size=96, max_size=128, rpn_anchor_generator=anchors, box_roi_pool=pool
    )
    target = {"boxes": torch.tensor([[8.0, 8.0, 60.0, 60.0]]), "labels": torch.tensor([1])}
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    losses = detector.train()([torch.rand(3, 96, 128)], [target])
    sum(losses.values()).backward()
    torch.optim.SGD([p for p in detector.parameters() if p.requires_grad], 0.1).step()
    moved = {key for key, value in backbone.state_dict().items() if not torch.equal(value, before[key])}
    assert moved == {key for key, p in backbone.named_parameters() if p.requires_grad}
    assert {key.partition(".")[0] for key in moved} == {"layer2", "layer3", "layer4"}
