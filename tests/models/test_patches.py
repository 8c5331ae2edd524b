"""The gradient of 3x3 weights as products, against torch's."""

import pytest
import torch
from torch import nn

from resnest_imagenet.models import patches
from resnest_imagenet.models.patches import differentiate_weight, differentiates_faster


# 200 values: a row at a time; 2,000: some rows, the last part smaller; 20,000: some images, the last part smaller.
@pytest.mark.parametrize("limit", [200, 2_000, 20_000, 2**20])
def test_equals_torchs_gradient(limit, monkeypatch):
    monkeypatch.setattr(patches, "_PATCHES", limit)
    torch.manual_seed(0)
    for groups, memory_format in ((1, torch.contiguous_format), (2, torch.channels_last), (4, torch.channels_last)):
        x = torch.randn(5, 8, 7, 9, dtype=torch.float64).contiguous(memory_format=memory_format)
        weight = torch.randn(12, 8 // groups, 3, 3, dtype=torch.float64, requires_grad=True)
        out = torch.nn.functional.conv2d(x, weight, padding=1, groups=groups)
        gradient = torch.randn_like(out)
        (expected,) = torch.autograd.grad(out, [weight], gradient)
        ours = differentiate_weight(x, gradient, groups)
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)
        assert ours.is_contiguous(memory_format=torch.channels_last)


def test_which_convolutions_it_is_for(monkeypatch):
    x = torch.randn(2, 8, 6, 6).contiguous(memory_format=torch.channels_last)
    conv = nn.Conv2d(8, 8, 3, padding=1, groups=2, bias=False)
    others = [
        nn.Conv2d(8, 8, 1),
        nn.Conv2d(8, 8, 3, 2, 1),
        nn.Conv2d(8, 8, 3, padding=2, dilation=2),
        nn.Conv2d(8, 8, 3),
    ]
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "AVX2")
    assert differentiates_faster(x, conv)
    assert not any(differentiates_faster(x, other) for other in others)
    assert not differentiates_faster(x.bfloat16(), conv) and not differentiates_faster(x.contiguous(), conv)
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "AVX512")
    assert not differentiates_faster(x, conv)
