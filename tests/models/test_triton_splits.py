"""The Triton kernels against torch's operators: on a GPU, or in Triton's interpreter; and compiled for GPUs."""

import os
import subprocess
import sys

import pytest
import torch

from resnest_imagenet.models import fused_attention
from resnest_imagenet.models.split_attention import SplitAttention
from resnest_imagenet.models.splits import Splits, Statistics

pytest.importorskip("triton", reason="torch brings Triton on Linux only")
from resnest_imagenet.models import triton_splits as kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


KINDS = ["statistics of the batch", "running statistics", "normalised already"]


# What is normalised and how many splits there are meet nowhere in the kernels: each kind once, each radix once.
@pytest.mark.slow
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    ("radix", "width", "height", "kind"),
    [*((2, 80, 6, kind) for kind in KINDS), (1, 24, 5, KINDS[0]), (4, 40, 3, KINDS[0])],
)
def test_equals_torchs_operators(monkeypatch, radix, width, height, kind, memory_format):
    monkeypatch.setattr(kernels, "STEPS", 2)  # several programs for each sum
    torch.manual_seed(0)
    y = torch.randn(2, radix * width, height, 11).contiguous(memory_format=memory_format)
    gradient = torch.randn(2, width, height, 11).contiguous(memory_format=memory_format)
    weights, pooled = torch.randn(2, radix, width).softmax(1), torch.randn(2, width)
    bn = (None, None, None)
    if kind != "normalised already":
        variance, mean = torch.var_mean(y, (0, 2, 3), correction=0)
        bn = torch.randn(radix * width), torch.randn(radix * width), (mean, variance, kind[0] == "s", 1e-5)

    def compute(implementation, dtype, device):
        def to(tensor):
            return None if tensor is None else tensor.to(device, dtype)

        statistics = bn[2] and Statistics(to(bn[2][0]), to(bn[2][1]), *bn[2][2:])
        splits = implementation(to(y), to(bn[0]), to(bn[1]), statistics, radix)
        splits.rectify()
        values = [splits.pool(), splits.sum_weighted(to(weights)), splits.weight_gradient(to(gradient))]
        return *values, *splits.input_gradient(to(gradient), to(weights), to(pooled))

    ours = compute(kernels.TritonSplits, torch.float32, DEVICE)
    expected = compute(Splits, torch.float64, "cpu")
    assert ours[1].is_contiguous(memory_format=memory_format)
    names = ("pool", "sum", "of weights", "of y", "of weight", "of bias")
    for name, value, exact in zip(names, ours, expected, strict=True):
        assert (value is None) == (exact is None), name
        if exact is not None:
            assert (value.cpu() - exact).abs().max() < 1e-6 * exact.abs().max(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.slow
def test_the_whole_operator(monkeypatch, dtype):
    """Through the gate and its gradients, and with an expanded gradient, as that of a mean is."""
    torch.manual_seed(0)
    module = SplitAttention(48, implementation="fused").to(DEVICE)
    x = torch.randn(3, 48, 5, 7, device=DEVICE).requires_grad_()

    def differentiate(implementation):
        monkeypatch.setattr(fused_attention, "choose_splits", lambda device, dtype: implementation)
        with torch.autocast(DEVICE, torch.bfloat16, enabled=dtype == torch.bfloat16):
            out = module(x)
        assert out.dtype == dtype
        return [out.detach(), *torch.autograd.grad(out.float().mean((2, 3)).square().sum(), [x, *module.parameters()])]

    for ours, theirs in zip(differentiate(kernels.TritonSplits), differentiate(Splits), strict=True):
        tolerance = 1e-5 if dtype == torch.float32 else 2**-5
        assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max() + 1e-5


@pytest.mark.slow
def test_nan_passes_through():
    y = torch.randn(1, 32, 4, 4, device=DEVICE)
    y[0, 0, 0, 0] = torch.nan
    splits = kernels.TritonSplits(y, None, None, None, 2)
    assert splits.pool()[0, 0].isnan()
    assert splits.sum_weighted(torch.ones(1, 2, 16, device=DEVICE))[0, 0, 0, 0].isnan()


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from resnest_imagenet.models import triton_splits

TYPES = {"norm": "*fp32", "partial": "*fp32", "weights": "*fp32", "pooled": "*fp32", "scales": "*fp32"}
VALUES = {"NORMALISES": True, "R": 2, "STEPS": triton_splits.STEPS}
VALUES |= {"P": triton_splits.PIXELS, "C": triton_splits.CHANNELS}
VALUES |= {"y_c": 1, "g_c": 1, "out_c": 1}  # channels_last
for name in ("_pool", "_sum_weighted", "_sum_products", "_write_gradient"):
    kernel = getattr(triton_splits, name)
    types = {"y": "*bf16", "gradient": "*bf16", "out": "*bf16", **TYPES}
    values = {name: value for name, value in VALUES.items() if name in kernel.arg_names}
    signature = {name: types.get(name, "constexpr" if name in values else "i32") for name in kernel.arg_names}
    whole = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if name not in values}
    for capability in (80, 90):
        source = ASTSource(fn=kernel, signature=signature, constexprs=values, attrs=whole)
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
        assert len(compiled.asm["cubin"]) > 0
        assert "ld.global.v4" in compiled.asm["ptx"], "loads 16 bytes at a time"
print("compiled")
"""


@pytest.mark.process
def test_the_kernels_compile_for_gpus(tmp_path):
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    result = subprocess.run(
        [sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, check=False
    )
    assert result.stdout.strip().endswith("compiled"), result.stderr[-2000:]
