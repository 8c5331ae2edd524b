"""Bottlenecks in the form for graphs compute what the network does."""

import pytest
import torch

from resnest_imagenet.models.folding import fold_batch_norms
from resnest_imagenet.models.graph_blocks import DividedBottleneck, divide_bottlenecks
from resnest_imagenet.models.resnest import ResNeSt, ResNeStSpec
from resnest_imagenet.models.split_attention import SplitAttention


def build(**changes):
    """Return a small network in float64 whose batch norms and biases are those of no identity."""
    torch.manual_seed(0)
    spec = ResNeStSpec(layers=(1, 2, 1, 1), stem_width=8, planes=16, **changes)
    model = ResNeSt(spec, num_classes=5, zero_gamma=False).double().eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_mean, -0.5, 0.5)
            torch.nn.init.uniform_(module.running_var, 0.5, 2)
            torch.nn.init.uniform_(module.weight, 0.5, 2)
            torch.nn.init.uniform_(module.bias, -0.5, 0.5)
        elif isinstance(module, SplitAttention):
            torch.nn.init.normal_(module.fc2.weight)  # the splits' weights differ
    return model


@pytest.mark.parametrize("changes", [{}, {"cardinality": 2, "width": 40}, {"avd_first": True}])
def test_divided_bottlenecks_compute_the_same(changes):
    model = build(**changes)
    images = torch.randn(2, 3, 65, 47, dtype=torch.float64)
    divided = divide_bottlenecks(fold_batch_norms(model))
    assert sum(isinstance(module, DividedBottleneck) for module in divided.modules()) == 5
    with torch.no_grad():
        expected = model(images)
        torch.testing.assert_close(divided(images), expected, rtol=1e-11, atol=1e-11)
        assert (expected[0] - expected[1]).abs().max() > 1e-5  # the images matter


def test_other_blocks_stay():
    for model in (fold_batch_norms(build(radix=1)), fold_batch_norms(build(radix=4)), build()):
        modules = [*model.modules()]
        assert [*divide_bottlenecks(model).modules()] == modules
