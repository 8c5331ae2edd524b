"""The products against torch's convolution, and where they are used."""

import copy

import pytest
import torch
from torch import nn

from resnest_imagenet.models.taps import TapConv2d, use_taps


def build(dilation, dtype=torch.float64, bias=False):
    torch.manual_seed(0)
    return TapConv2d(6, 4, dilation, bias).to(dtype).to(memory_format=torch.channels_last)


def make_images(height=9, width=7, batch=3, dtype=torch.float64):
    return torch.randn(batch, 6, height, width, dtype=dtype).contiguous(memory_format=torch.channels_last)


def uses_products(out):
    return "_Convolve" in type(out.grad_fn).__name__


# Dilations from where all weights meet the map to where only the middle one does.
@pytest.mark.parametrize("dilation", [1, 2, 5, 7, 8, 9, 30])
@pytest.mark.parametrize(("height", "width", "batch"), [(9, 7, 3), (1, 8, 1)])
@pytest.mark.parametrize(("is_first", "bias"), [(True, False), (False, False), (False, True)])
def test_equals_the_convolution(dilation, height, width, batch, is_first, bias):
    ours, images = build(dilation, bias=bias), make_images(height, width, batch)
    theirs = nn.Conv2d(6, 4, 3, padding=dilation, dilation=dilation, bias=bias).double()
    theirs.load_state_dict(ours.state_dict())
    results = []
    for module in (ours, theirs):
        x = images.clone(memory_format=torch.preserve_format).requires_grad_(not is_first)
        out = module(x)
        assert uses_products(out) == (module is ours)
        out.square().sum().backward()
        gradients = [*([] if is_first else [x.grad]), *([module.bias.grad] if bias else [])]
        results.append([out, module.weight.grad, *gradients])
    for mine, expected in zip(*results, strict=True):
        torch.testing.assert_close(mine, expected, rtol=0, atol=1e-10)
    assert ours.weight.grad.is_contiguous(memory_format=torch.channels_last)


def test_elsewhere_it_is_torchs_convolution():
    module, images = build(2, torch.float32), make_images(dtype=torch.float32)
    assert uses_products(module(images))
    assert not uses_products(module(images.contiguous()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert module(images).dtype == torch.bfloat16
    with torch.no_grad():
        assert module(images).grad_fn is None
    frozen = copy.deepcopy(module).requires_grad_(False)
    assert not uses_products(frozen(images.requires_grad_()))


def test_convolutions_in_a_module_are_replaced():
    """Those of 3x3 that keep the size, whatever holds them; parameters stay the same objects."""
    convolutions = [
        nn.Conv2d(6, 4, 3, padding=2, dilation=2, bias=False),
        nn.Conv2d(4, 4, 3, padding=1),
        nn.Conv2d(4, 4, 3, padding=1, stride=2),
        nn.Conv2d(4, 4, 3, padding=1, groups=2),
        nn.Conv2d(4, 4, 3),
        nn.Conv2d(4, 4, 1),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
    ]
    module = nn.Sequential(convolutions[0], nn.ModuleList(convolutions[1:])).double()
    parameters = dict(module.named_parameters())
    use_taps(module)
    assert [type(m) is TapConv2d for m in (module[0], *module[1])] == [True, True, *[False] * 5]
    assert all(parameter is parameters[name] for name, parameter in module.named_parameters())
    images = make_images()
    assert torch.equal(module[0](images), convolutions[0](images))
