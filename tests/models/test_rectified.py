"""The operators that keep less, against the same modules called one after the other."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from resnest_imagenet.models import rectified
from resnest_imagenet.models.dropblock import DropBlock
from resnest_imagenet.models.rectified import AveragePool, can_recompute, convolve_rectified, pool_rectified
from resnest_imagenet.models.zoo import build_model

FORMATS = [torch.contiguous_format, torch.channels_last]
CONVOLUTIONS = [
    {"groups": 2, "kernel_size": 3, "padding": 1},
    {"groups": 1, "kernel_size": 3, "padding": 2, "dilation": 2},
    {"groups": 4, "kernel_size": 1, "stride": 2},
]


def build_norm(training=True, dtype=torch.float64):
    bn = nn.BatchNorm2d(8).to(dtype).train(training)
    for values in (bn.weight, bn.bias, bn.running_mean):
        nn.init.normal_(values)
    nn.init.uniform_(bn.running_var, 0.5, 2)
    return bn


def differentiate(run, y, *modules):
    """Return the output, and the gradients of y and of all parameters that are trained."""
    y = y.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    out = run(y)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    inputs = [y, *(p for module in modules for p in module.parameters() if p.requires_grad)]
    return [out, *torch.autograd.grad((out * weights.to(out.dtype)).sum(), inputs)]


def list_cases():
    """Yield (operator, module that follows the norm)."""
    for options in CONVOLUTIONS:
        yield convolve_rectified, nn.Conv2d(8, 16, bias=False, dtype=torch.float64, **options)
    yield pool_rectified, nn.MaxPool2d(3, stride=2, padding=1)
    yield pool_rectified, nn.MaxPool2d(2, ceil_mode=True)


@pytest.mark.parametrize("training", [True, False])
def test_equals_the_modules(training):
    torch.manual_seed(0)
    for memory_format in FORMATS:
        y = torch.randn(3, 8, 7, 6, dtype=torch.float64).contiguous(memory_format=memory_format)
        for operator, following in list_cases():
            ours, theirs = build_norm(training), None
            theirs = copy.deepcopy(ours)
            assert can_recompute(y, ours, following)
            values = differentiate(lambda x, o=operator, f=following, n=ours: o(x, n, f), y, ours, following)
            expected = differentiate(lambda x, f=following, n=theirs: f(F.relu(n(x))), y, theirs, following)
            for value, other in zip(values, expected, strict=True):
                torch.testing.assert_close(value, other, rtol=0, atol=1e-12)
                assert value.stride() == other.stride()
            for value, other in zip(ours.buffers(), theirs.buffers(), strict=True):
                assert torch.equal(value, other)


def test_gradients_are_those_of_finite_differences():
    torch.manual_seed(0)
    y = torch.randn(2, 8, 4, 4, dtype=torch.float64, requires_grad=True)
    for operator, following in list_cases():
        bn = build_norm()
        assert torch.autograd.gradcheck(lambda x, o=operator, f=following, n=bn: o(x, n, f), (y,))


def test_average_pools_equal_torchs_and_keep_nothing():
    torch.manual_seed(0)
    for memory_format in FORMATS:
        x = torch.randn(2, 4, 7, 6, dtype=torch.float64).contiguous(memory_format=memory_format)
        for options in ({"kernel_size": 3, "stride": 2, "padding": 1}, {"kernel_size": 2, "ceil_mode": True}):
            ours, theirs = (differentiate(pool(**options), x) for pool in (AveragePool, nn.AvgPool2d))
            assert all(torch.equal(a, b) and a.stride() == b.stride() for a, b in zip(ours, theirs, strict=True))
            assert list_kept(AveragePool(**options), x.requires_grad_()) == []


def list_kept(run, x):
    """Return the tensors that a forward pass keeps."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        run(x)
    return kept


def test_only_the_norms_input_is_kept():
    bn, conv = build_norm(), nn.Conv2d(8, 8, 3, padding=1, bias=False, dtype=torch.float64)
    y = torch.randn(2, 8, 9, 9, dtype=torch.float64, requires_grad=True)
    kept = list_kept(lambda x: convolve_rectified(x, bn, conv), y)
    assert [tensor.data_ptr() for tensor in kept if tensor.dim() == 4] == [y.data_ptr(), conv.weight.data_ptr()]


def test_frozen_parts_get_no_gradients():
    torch.manual_seed(0)
    y = torch.randn(2, 8, 5, 5, dtype=torch.float64)
    bn, conv = build_norm(training=False), nn.Conv2d(8, 8, 3, padding=1, bias=False, dtype=torch.float64)
    bn.requires_grad_(False)
    convolve_rectified(y, bn, conv).sum().backward()
    (expected,) = torch.autograd.grad(conv(F.relu(bn(y))).sum(), [conv.weight])
    torch.testing.assert_close(conv.weight.grad, expected)
    conv.requires_grad_(False)
    bn.requires_grad_(True)
    convolve_rectified(y, bn, conv).sum().backward()
    assert bn.bias.grad is not None and bn.weight.grad is not None


def test_the_graph_can_be_used_twice():
    y = torch.randn(2, 8, 5, 5, dtype=torch.float64, requires_grad=True)
    bn, conv = build_norm(), nn.Conv2d(8, 8, 3, padding=1, bias=False, dtype=torch.float64)
    out = convolve_rectified(y, bn, conv).square().sum()
    inputs = [y, bn.weight, conv.weight]
    first, again = (torch.autograd.grad(out, inputs, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_is_for_plain_modules_in_training():
    y = torch.randn(2, 8, 5, 5, requires_grad=True)
    bn, conv, pool = build_norm(dtype=torch.float32), nn.Conv2d(8, 8, 3, bias=False), nn.MaxPool2d(2)
    assert can_recompute(y, bn, conv) and can_recompute(y, bn, pool)
    with torch.no_grad():
        assert not can_recompute(y, bn, conv)
    with torch.autocast("cpu", torch.bfloat16):
        assert not can_recompute(y, bn, conv) and can_recompute(y.bfloat16(), bn, conv)
    others = [nn.Identity(), nn.SyncBatchNorm(8), nn.BatchNorm2d(8, momentum=None), nn.GroupNorm(2, 8)]
    assert not any(can_recompute(y, other, conv) for other in others)
    others = [nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3, bias=False, padding="same"), nn.MaxPool2d(2, return_indices=True)]
    assert not any(can_recompute(y, bn, other) for other in others)
    assert not can_recompute(y.detach().to("meta"), bn, conv)
    for module in (bn, conv):
        hook = module.register_forward_hook(lambda *values: None)
        assert not can_recompute(y, bn, conv)
        hook.remove()
    assert can_recompute(y, bn, conv)


def differentiate_network(network, images, precision, monkeypatch, plain):
    with monkeypatch.context() as patch:
        if plain:
            patch.setattr("resnest_imagenet.models.resnest.can_recompute", lambda *values: False)
            patch.setattr(rectified, "_is_trained_eagerly", lambda x: False)
        torch.manual_seed(1)  # DropBlock's
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = network(images).float().square().mean()
        loss.backward()
    gradients = {name: parameter.grad for name, parameter in network.named_parameters()}
    network.zero_grad(set_to_none=True)
    return loss.detach(), gradients


@pytest.mark.parametrize(
    "change", ["", "resnest50_fast_4s2x40d", "frozen stem", "frozen norms", "dropblock", "recomputed blocks", "bf16"]
)
@pytest.mark.slow
def test_a_network_equals_its_formula(change, monkeypatch):
    torch.manual_seed(0)
    name = "resnest50_fast_2s1x64d" if "fast" in change else "resnest14_half"
    is_backbone = change == "recomputed blocks"
    dtype = torch.float32 if change == "bf16" else torch.float64
    model = build_model(name, 5, zero_gamma=False).to(dtype, memory_format=torch.channels_last)
    if change == "frozen stem":
        model.conv1.requires_grad_(False).eval()
    if change == "frozen norms":
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
    if change == "dropblock":
        DropBlock(model).set_probability(0.2)
    if is_backbone:
        backbone = build_model(name, 5, zero_gamma=False, features_only=True, out_features=["layer4"]).double()
        backbone.recompute()
        model = nn.Sequential(backbone, nn.Module())
        model.forward = lambda images: backbone(images)[0]
    images = torch.randn(3, 3, 64, 64, dtype=dtype).contiguous(memory_format=torch.channels_last)
    other = copy.deepcopy(model) if not is_backbone else model
    loss, gradients = differentiate_network(model, images, change, monkeypatch, plain=False)
    expected_loss, expected = differentiate_network(other, images, change, monkeypatch, plain=True)
    assert gradients.keys() == expected.keys()
    bound = 0.05 if change == "bf16" else 1e-9
    assert abs(loss - expected_loss) <= bound * expected_loss
    largest = max(value.norm() for value in expected.values() if value is not None)
    for name, value in gradients.items():
        assert (value is None) == (expected[name] is None), name
        if value is not None:
            assert (value - expected[name]).norm() <= bound * max(expected[name].norm(), 0.01 * largest), name
