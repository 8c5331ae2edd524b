"""The fused operator against the formula, which test_split_attention.py holds against the paper."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from resnest_imagenet.models.split_attention import SplitAttention
from resnest_imagenet.models.zoo import build_model

SETTINGS = [(1, 1), (2, 1), (4, 1), (2, 2), (3, 4)]
FORMATS = [torch.contiguous_format, torch.channels_last]


def build_pair(radix=2, cardinality=1, dtype=torch.float64):
    """Return a fused module, the same one as reference, and images (3, C, 7, 6)."""
    torch.manual_seed(0)
    channels = 24 * radix * cardinality
    fused = SplitAttention(channels, radix, cardinality, implementation="fused").to(dtype)
    for bn in (fused.bn0, fused.bn1):
        nn.init.normal_(bn.weight)
        nn.init.normal_(bn.bias)
        nn.init.uniform_(bn.running_var)
    reference = copy.deepcopy(fused)
    reference.implementation = "reference"
    return fused, reference, torch.randn(3, channels, 7, 6, dtype=dtype)


def differentiate(module, x):
    """Return the output and the gradients of x and of each trained parameter, by name."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    out = module(x)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    inputs = {"x": x, **{name: p for name, p in module.named_parameters() if p.requires_grad}}
    gradients = torch.autograd.grad((out * weights.to(out.dtype)).sum(), list(inputs.values()))
    return {"out": out.detach(), **dict(zip(inputs, gradients, strict=True))}


def assert_equal(fused, reference, x, atol=1e-10):
    ours, expected = differentiate(fused, x), differentiate(reference, x)
    assert ours.keys() == expected.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=atol, msg=lambda m, name=name: f"{name}: {m}")
    for (name, ours), theirs in zip(fused.named_buffers(), reference.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=name)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("radix", "cardinality"), SETTINGS)
def test_equals_the_formula(radix, cardinality, training, memory_format):
    fused, reference, x = build_pair(radix, cardinality)
    x = x.contiguous(memory_format=memory_format)
    for module in (fused, reference):
        module.train(training).to(memory_format=memory_format)
    assert_equal(fused, reference, x)
    assert fused(x).is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize(
    "change", ["a bn0 that is folded", "another bn0", "a momentum of none", "a frozen gate", "a frozen bn0"]
)
def test_equals_the_formula_with(change):
    fused, reference, x = build_pair()
    for module in (fused, reference):
        if change == "a bn0 that is folded":
            module.bn0 = nn.Identity()
        elif change == "another bn0":
            module.bn0 = nn.GroupNorm(4, module.bn0.num_features).double()
        elif change == "a momentum of none":
            module.bn0.momentum = None
        elif change == "a frozen gate":
            module.fc1.requires_grad_(False)
            module.bn1.bias.requires_grad_(False)
        elif change == "a frozen bn0":
            module.bn0.eval()
    assert_equal(fused, reference, x)


def test_is_as_exact_as_the_formula_under_autocast():
    fused, reference, x = build_pair(dtype=torch.float32)
    exact = differentiate(copy.deepcopy(reference).double(), x.double())
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = differentiate(fused, x), differentiate(reference, x)
    assert ours["out"].dtype == torch.bfloat16

    def error(found, name):
        return ((found[name] - exact[name]).norm() / exact[name].norm()).item()

    for name in ours.keys() - {"fc1.bias"}:  # a batch norm takes it out again: its exact gradient is 0
        assert error(ours, name) < max(1.5 * error(theirs, name), 2**-8), name


def test_keeps_the_output_of_the_convolution_and_nothing_else_of_its_size():
    fused, reference, x = build_pair(dtype=torch.float32)
    y = fused.conv(x)

    def count_kept(module):
        kept = {}
        parameters = {p.data_ptr() for p in module.parameters()}

        def keep(tensor):
            if tensor.data_ptr() not in parameters:
                kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            module(x.requires_grad_())
        return sum(size >= y.nbytes / 2 for size in kept.values())

    assert count_kept(fused) == 2  # x, of half y's size, and y
    assert count_kept(reference) > 2


def test_the_graph_can_be_used_twice_and_checkpointed():
    fused, _, x = build_pair()
    fused.eval()  # else each pass would move the statistics
    x.requires_grad_()
    out = fused(x).square().sum()
    inputs = [x, *fused.parameters()]
    first = torch.autograd.grad(out, inputs, retain_graph=True)
    again = torch.autograd.grad(out, inputs)
    recomputed = torch.autograd.grad(checkpoint(fused, x, use_reentrant=False).square().sum(), inputs)
    for a, b, c in zip(first, again, recomputed, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


def test_nan_passes_through():
    fused, _, x = build_pair()
    fused.eval()
    x[1, 0, 0, 0] = torch.nan
    assert fused(x)[1].isnan().any() and not fused(x)[0].isnan().any()
    assert differentiate(fused, x)["x"][1].isnan().any()


@pytest.mark.slow
def test_auto_is_fused_in_eager_mode_and_the_formula_elsewhere():
    module = SplitAttention(32).eval()
    x = torch.randn(2, 32, 8, 8)
    assert "Attend" in module(x).grad_fn.name()
    module.implementation = "reference"
    assert "Attend" not in module(x).grad_fn.name()
    module.implementation = "fused"
    exported = torch.export.export(module, (x,)).module()
    assert not torch.jit.trace(module, x).training
    for program in (exported, torch.jit.trace(module, x)):
        torch.testing.assert_close(program(x), module(x))


@pytest.mark.parametrize("implementation", ["auto", "fused"])
@pytest.mark.slow
def test_compiles(implementation):
    torch.compiler.reset()
    x = torch.randn(2, 128, 8, 8, dtype=torch.float64)
    # A block is enough: the networks' code around them does not depend on how the attention is computed.
    model = build_model("resnest14_half", 10, zero_gamma=False, split_attention=implementation).layer2.double()
    compiled = copy.deepcopy(model)
    compiled.compile(backend="aot_eager", fullgraph=implementation == "auto")
    losses = [m(x).square().mean() for m in (model, compiled)]
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.backward()
    for (name, ours), theirs in zip(model.named_parameters(), compiled.parameters(), strict=True):
        assert (ours.grad - theirs.grad).norm() <= 1e-9 * ours.grad.norm() + 1e-9, name


@pytest.mark.slow
def test_reaches_every_block():
    model = build_model("resnest14", split_attention="reference")
    modules = [m for m in model.modules() if isinstance(m, SplitAttention)]
    assert [m.implementation for m in modules] == ["reference"] * 4
