"""The costs of stages against figures by hand, the golden totals, and a pass that is really run."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from conftest import CPU
from resnest_imagenet import build_model
from resnest_imagenet.compute import autocast, place
from resnest_imagenet.models.cost import StageCost, count_kept, count_kept_deeplab, count_stages
from resnest_imagenet.models.deeplab import build_deeplab
from resnest_imagenet.models.split_attention import SplitAttention

GOLDEN = json.loads(Path(__file__).with_name("golden.json").read_text())


@pytest.mark.parametrize("name", ["resnest14", "resnest50_fast_4s2x40d", "skresnext50_32x4d"])
@pytest.mark.slow
def test_the_stages_sum_to_the_totals(name):
    stages = count_stages(name, 224)
    assert [stage.stage for stage in stages] == ["stem", "layer1", "layer2", "layer3", "layer4", "head"]
    assert [sum(s.parameters for s in stages), sum(s.multiply_adds for s in stages)] == GOLDEN[name][:2]
    assert sum(stage.activations for stage in stages) == count_convolved(name)


def count_convolved(name):
    """Count the elements that convolutions put out, by module."""
    total = 0
    with torch.device("meta"):
        model, image = build_model(name).eval(), torch.empty(1, 3, 224, 224)

    def count(module, inputs, output):
        nonlocal total
        if isinstance(module, SplitAttention):  # which computes these two as products of matrices
            total += module.fc1.out_channels + module.fc2.out_channels
        elif isinstance(module, nn.Conv2d):
            total += output.numel()

    for module in model.modules():
        module.register_forward_hook(count)
    with torch.no_grad():
        model(image)
    return total


@pytest.mark.slow
def test_stages_by_hand():
    stem, layer1, layer2, layer3, layer4, head = count_stages("resnest50", 224)
    weights, channels = 9 * (3 * 32 + 32 * 32 + 32 * 64), 32 + 32 + 64
    assert stem == StageCost(
        "stem", (64, 112, 112), weights + 2 * channels, (weights + channels) * 112**2, channels * 112**2
    )
    assert head == StageCost("head", (1000,), 2048 * 1000 + 1000, 2048 * 1000, 0)
    assert [s.output for s in (layer1, layer2, layer3, layer4)] == [
        (256, 56, 56), (512, 28, 28), (1024, 14, 14), (2048, 7, 7),
    ]  # fmt: skip


@pytest.mark.parametrize(("name", "published"), [("resnet50", 11.1), ("resnet101", 16.2), ("resnext50_32x4d", 14.4)])
@pytest.mark.slow
def test_activations_are_those_published(name, published):
    """In millions, by pycls' model zoo."""
    assert sum(stage.activations for stage in count_stages(name, 224)) / 1e6 == pytest.approx(published, abs=0.06)


def count_really_kept(model, run):
    """Return the bytes that `run` leaves for the backward pass, without the model's own."""
    own = {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()}
    kept = {}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run()
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize(
    ("name", "precision", "tolerance"),
    [
        ("resnest14_half", "fp32", 0),
        ("resnest14_half", "bf16", 0.005),
        ("resnest50_fast_4s2x40d", "fp32", 0),
        ("skresnext50_32x4d", "fp32", 0),
    ],
)
@pytest.mark.slow
def test_what_is_kept_is_what_a_step_keeps(name, precision, tolerance):
    """In bf16 the real pass keeps the means of batch norms, some kilobytes, in float32, the one in name in bf16."""
    model = place(build_model(name), CPU)
    images = torch.randn(2, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    with autocast(CPU, precision):
        assert count_kept(name, 64, 2) == pytest.approx(count_really_kept(model, lambda: model(images)), rel=tolerance)


@pytest.mark.slow
def test_a_gpu_keeps_what_a_step_without_the_operators_for_a_cpu_keeps(monkeypatch):
    images = torch.randn(2, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    model = place(build_model("resnest14_half"), CPU)
    counted = count_kept("resnest14_half", 64, 2, torch.device("cuda"))
    assert counted > 1.2 * count_kept("resnest14_half", 64, 2)
    monkeypatch.setattr("resnest_imagenet.models.rectified._is_trained_eagerly", lambda x: False)
    assert counted == count_really_kept(model, partial(model, images))


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 0), ("bf16", 0.005)])
@pytest.mark.parametrize("options", [{"channels": 32}, {"channels": 32, "norm": "frozen", "auxiliary": False}])
@pytest.mark.slow
def test_what_is_kept_of_a_segmentation_network(options, precision, tolerance):
    """With the cross entropies: the larger part of the memory in small networks with many classes."""
    model = place(build_deeplab("resnest14_half", 20, **options), CPU)
    images = torch.randn(2, 3, 65, 65).contiguous(memory_format=torch.channels_last)
    masks = torch.full((2, 65, 65), 3)

    def run():
        logits = model(images)
        return [F.cross_entropy(x, masks) for x in (logits if isinstance(logits, tuple) else [logits])]

    with autocast(CPU, precision):
        counted = count_kept_deeplab("resnest14_half", 20, 65, 2, **options)
        assert counted == pytest.approx(count_really_kept(model, run), rel=tolerance)


@pytest.mark.slow
def test_what_is_kept_grows_with_the_batch():
    at_2, at_4 = (count_kept("resnest14_half", 64, batch_size) for batch_size in (2, 4))
    assert at_4 == pytest.approx(2 * at_2, rel=0.01)
