import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from resnest_imagenet.models.pointwise import PointwiseConv2d


def build_pair(groups=1, bias=False):
    """Return ours and torch's convolution with the same weights, in channels_last."""
    torch.manual_seed(0)
    ours, torchs = PointwiseConv2d(8, 12, groups, bias), nn.Conv2d(8, 12, 1, groups=groups, bias=bias)
    torchs.load_state_dict(ours.state_dict())
    return ours.to(memory_format=torch.channels_last), torchs.to(memory_format=torch.channels_last)


def differentiate(module, x):
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    out = module(x)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    return [out, *torch.autograd.grad((out * weights).sum(), [x, *module.parameters()])]


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_equals_torchs_convolution(memory_format, bias, groups):
    ours, torchs = (module.double() for module in build_pair(groups, bias))
    x = torch.randn(3, 8, 5, 6, dtype=torch.float64).contiguous(memory_format=memory_format)
    for mine, theirs in zip(differentiate(ours, x), differentiate(torchs, x), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)
        assert mine.stride() == theirs.stride()
    vectors = x.mean((2, 3))
    torch.testing.assert_close(ours.project(vectors), torchs(vectors[..., None, None])[..., 0, 0])


def test_gradients_have_the_strides_of_the_weight():
    ours, _ = build_pair()
    ours(torch.randn(3, 8, 5, 6).contiguous(memory_format=torch.channels_last)).sum().backward()
    assert ours.weight.grad.stride() == ours.weight.stride()


@pytest.mark.parametrize(
    ("side", "low_precision", "trains", "is_product"),
    [(14, False, True, True), (15, False, True, False), (15, True, True, True), (14, True, False, False)],
)
def test_is_a_product_where_that_is_faster(side, low_precision, trains, is_product):
    ours, torchs = build_pair()
    x = torch.randn(3, 8, side, side).contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16, enabled=low_precision), torch.set_grad_enabled(trains):
        with FlopCounterMode(display=False) as counter:
            out = ours(x)
        torch.testing.assert_close(out, torchs(x), rtol=2**-7, atol=2**-7)
    operators = {str(operator) for operator in counter.get_flop_counts()["Global"]}
    assert operators == ({"aten.mm"} if is_product else {"aten.convolution"})


@pytest.mark.slow
def test_what_is_exported_is_a_convolution():
    ours, _ = build_pair()
    x = torch.randn(3, 8, 5, 6).contiguous(memory_format=torch.channels_last)
    graph = torch.export.export(ours, (x,)).graph
    assert [node.target.__name__ for node in graph.nodes if node.op == "call_function"] == ["conv2d.default"]
    assert "convolution" in str(torch.jit.trace(ours, x).inlined_graph)
