"""The grouped, radix-major form against the formulas of the paper, group by group."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resnest_imagenet.models.split_attention import SplitAttention, r_softmax

SETTINGS = [(1, 1), (2, 1), (4, 1), (1, 2), (2, 2), (4, 2), (1, 4), (3, 4)]


def batch_norm(x: Tensor, bn: nn.BatchNorm2d, channels: slice) -> Tensor:
    """Apply some channels of a batch norm, with batch statistics."""
    return F.batch_norm(x, None, None, bn.weight[channels], bn.bias[channels], training=True)


def attend_naively(module: SplitAttention, x: Tensor) -> Tensor:
    """Section 3.1, cardinal group by cardinal group: U_r, s = GAP(sum U_r), a = r-softmax(G(s)), V = sum a_r U_r."""
    radix, cardinality = module.radix, module.cardinality
    channels = x.shape[1]
    width, inner = channels // cardinality, module.fc1.out_channels // cardinality
    narrow = channels // (cardinality * radix)  # the 3x3 convolution has a group for each split of each cardinal group
    outputs = []
    for k in range(cardinality):
        splits = []
        for r in range(radix):
            group = r * cardinality + k  # radix-major
            out, into = slice(group * width, (group + 1) * width), slice(group * narrow, (group + 1) * narrow)
            u = F.conv2d(x[:, into], module.conv.weight[out], padding=1)
            splits.append(F.relu(batch_norm(u, module.bn0, out)))
        s = torch.stack(splits).sum(0).mean((2, 3), keepdim=True)
        hidden, here = slice(k * inner, (k + 1) * inner), slice(k * width, (k + 1) * width)
        z = F.conv2d(s, module.fc1.weight[hidden], module.fc1.bias[hidden])
        z = F.relu(batch_norm(z, module.bn1, hidden))
        logits = []
        for r in range(radix):
            rows = slice((k * radix + r) * width, (k * radix + r + 1) * width)  # cardinality-major
            logits.append(F.conv2d(z, module.fc2.weight[rows], module.fc2.bias[rows]))
        exponentials = [logit.exp() for logit in logits]
        total = torch.stack(exponentials).sum(0)
        weights = [e / total for e in exponentials] if radix > 1 else [1 / (1 + (-logits[0]).exp())]
        outputs.append(torch.stack([a * u for a, u in zip(weights, splits, strict=True)]).sum(0))
        assert s.shape[1] == x[:, here].shape[1]
    return torch.cat(outputs, dim=1)


@pytest.mark.parametrize("implementation", ["reference", "fused"])
@pytest.mark.parametrize(("radix", "cardinality"), SETTINGS)
def test_equals_the_formula_per_group(radix, cardinality, implementation):
    torch.manual_seed(0)
    channels = 24 * cardinality * radix
    module = SplitAttention(channels, radix, cardinality, implementation=implementation).double()
    for bn in (module.bn0, module.bn1):
        nn.init.uniform_(bn.weight)
        nn.init.uniform_(bn.bias)
    x = torch.randn(3, channels, 7, 6, dtype=torch.float64, requires_grad=True)
    ours, naive = module(x), attend_naively(module, x)
    torch.testing.assert_close(ours, naive, rtol=0, atol=1e-10)
    weights = torch.randn_like(ours)
    for ours_gradient, naive_gradient in zip(
        torch.autograd.grad((ours * weights).sum(), [x, *module.parameters()]),
        torch.autograd.grad((naive * weights).sum(), [x, *module.parameters()]),
        strict=True,
    ):
        torch.testing.assert_close(ours_gradient, naive_gradient, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("radix", "cardinality"), SETTINGS)
def test_weights_sum_to_one_over_the_splits(radix, cardinality):
    logits = torch.randn(2, radix * cardinality * 5)
    weights = r_softmax(logits, radix, cardinality)
    assert weights.shape == (2, radix, cardinality * 5)
    if radix == 1:
        torch.testing.assert_close(weights[:, 0], logits.sigmoid())
    else:
        torch.testing.assert_close(weights.sum(1), torch.ones(2, cardinality * 5))


def test_inner_width_has_a_floor_of_32():
    assert SplitAttention(32, radix=2).fc1.out_channels == 32
    assert SplitAttention(128, radix=2).fc1.out_channels == 64


def test_keeps_channels_last():
    x = torch.randn(2, 32, 8, 8).to(memory_format=torch.channels_last)
    module = SplitAttention(32).to(memory_format=torch.channels_last)
    assert module(x).is_contiguous(memory_format=torch.channels_last)


def test_autocast_output_has_the_low_precision():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert SplitAttention(32)(torch.randn(2, 32, 8, 8)).dtype == torch.bfloat16


def test_a_training_batch_of_one_says_why_not():
    module = SplitAttention(32)
    with pytest.raises(ValueError, match="at least 2 images per device"):
        module(torch.randn(1, 32, 8, 8))
    assert module.eval()(torch.randn(1, 32, 8, 8)).shape == (1, 32, 8, 8)
