"""The trial of the fused split attention: what is equal passes; what is wrong, raises or is slow does not."""

import time
from collections import Counter

import pytest
import torch

from resnest_imagenet import build_model
from resnest_imagenet.errors import ConfigError
from resnest_imagenet.models import fused_attention, proving
from resnest_imagenet.models.deeplab import build_deeplab
from resnest_imagenet.models.proving import Block, find_blocks, needs_proof, prove, try_fused
from resnest_imagenet.models.split_attention import SplitAttention
from resnest_imagenet.models.splits import Splits

CPU = torch.device("cpu")
BLOCKS = Counter([Block(24, 2, 1, 5, 7, "batch")])
METHODS = ("pool", "sum_weighted", "weight_gradient", "input_gradient")


@pytest.fixture
def use_splits(monkeypatch):
    """Give the fused operator another implementation."""
    return lambda splits: monkeypatch.setattr(fused_attention, "choose_splits", lambda device, dtype: splits)


def make_splits(method, change, base=Splits):
    """Return splits of which one method returns something else."""

    class Changed(base):
        pass

    def changed(self, *arguments):
        return change(getattr(base, method)(self, *arguments))

    setattr(Changed, method, changed)
    return Changed


def spoil_last(result):
    """Change the last value of a result, or of the last of several: as a kernel that misses the end of its tile."""
    values = list(result) if isinstance(result, tuple) else [result]
    last = max(number for number, value in enumerate(values) if value is not None)
    values[last] = values[last].clone(memory_format=torch.preserve_format)
    values[last][(-1,) * values[last].ndim] += 0.5 * values[last].abs().max()
    return tuple(values) if isinstance(result, tuple) else values[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_operator_passes(dtype):
    """With every kind of norm, radix 1 and 4 and several groups, and maps of a single pixel."""
    blocks = Counter([Block(24, 2, 1, 5, 7, norm) for norm in ("batch", "running", "before")])
    blocks.update([Block(32, 1, 1, 6, 6, "batch"), Block(32, 4, 2, 4, 6, "running"), Block(48, 2, 1, 1, 1, "batch")])
    for trains in (True, False):
        assert prove(blocks, CPU, dtype, trains) is None


@pytest.mark.parametrize("method", METHODS)
def test_one_wrong_value_is_found(use_splits, method):
    use_splits(make_splits(method, spoil_last))
    fault = prove(BLOCKS, CPU, torch.float32, trains=True)
    assert fault is not None
    assert fault.startswith("differs from the formula: ") and fault.endswith("(fp32, 24 channels of 5 x 7)")
    # An evaluation uses no gradient: only the forward pass counts.
    assert (prove(BLOCKS, CPU, torch.float32, trains=False) is None) == (method in METHODS[2:])


def test_nan_is_found(use_splits):
    use_splits(make_splits("sum_weighted", lambda out: out * torch.nan))
    assert "differs" in prove(BLOCKS, CPU, torch.float32, trains=False)


def test_what_is_wrong_in_the_runs_precision_alone_is_found(use_splits):
    use_splits(make_splits("pool", lambda out: out * 1.5))
    monkeyed = fused_attention.choose_splits(CPU, torch.bfloat16)

    class OnlyHalf(monkeyed):
        def pool(self):
            return super().pool() if self._x.dtype == torch.bfloat16 else Splits.pool(self)

    use_splits(OnlyHalf)
    assert prove(BLOCKS, CPU, torch.float32, trains=True) is None
    assert "(bf16, " in prove(BLOCKS, CPU, torch.bfloat16, trains=True)


def test_what_raises_is_named(use_splits):
    def fail(out):
        raise RuntimeError("Failed to find C compiler.\nmore")

    use_splits(make_splits("weight_gradient", fail))
    expected = "fails: Failed to find C compiler. (fp32, 24 channels of 5 x 7)"
    assert prove(BLOCKS, CPU, torch.float32, trains=True) == expected


def test_short_memory_is_not_the_operators_fault(use_splits):
    def fail(out):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    use_splits(make_splits("pool", fail))
    with pytest.raises(torch.OutOfMemoryError):
        prove(BLOCKS, CPU, torch.float32, trains=True)


def test_a_broken_device_is_an_error_of_one_line(use_splits, monkeypatch):
    """After an illegal access no kernel runs in that process any more, the formula's neither."""

    def fail(*arguments):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", fail)
    with pytest.raises(
        ConfigError, match=r"has broken cuda:0 .* illegal memory .* set model.split_attention=reference"
    ):
        proving._require_device(RuntimeError("an illegal memory access"), torch.device("cuda", 0))


def test_what_is_slow_is_not_used(use_splits):
    network = build_model("resnest14_half", 10)
    size = (2, 16, 16)

    def wait(out):
        time.sleep(0.02)
        return out

    use_splits(make_splits("pool", wait))
    finding = try_fused(network, size, CPU, torch.float32, trains=True)
    assert finding.fault.startswith("is slower than the formula in 3 rounds: ") and finding.ratio < 1
    finding = try_fused(network, size, CPU, torch.float32, trains=True, is_timed=False)
    assert (finding.fault, finding.ratio) == (None, None)


def test_a_slower_formula_keeps_the_operator(monkeypatch):
    weigh = SplitAttention._weigh

    def wait(module, pooled):
        time.sleep(0.02 * (module.implementation == "reference"))
        return weigh(module, pooled)

    monkeypatch.setattr(SplitAttention, "_weigh", wait)
    finding = try_fused(build_model("resnest14_half", 10), (2, 16, 16), CPU, torch.float32, trains=False)
    assert finding.fault is None and finding.ratio > 1 and finding.seconds > 0


def test_the_blocks_of_a_network():
    network = build_model("resnest14_half", 10)
    sizes = {(32, 16): 1, (64, 16): 1, (128, 8): 1, (256, 4): 1}  # channels and side at 64 x 64
    expected = {Block(channels, 2, 1, side, side, "batch"): count for (channels, side), count in sizes.items()}
    assert find_blocks(network, 64, 64) == expected
    expected = {Block(channels, 2, 1, side, 2 * side, "running"): count for (channels, side), count in sizes.items()}
    assert find_blocks(network.eval(), 64, 128) == expected
    # Of a network of segmentation the backbone: at output stride 8, with frozen norms.
    sizes = {(32, 16): 1, (64, 16): 1, (128, 8): 1, (256, 8): 1}
    expected = {Block(channels, 2, 1, side, side, "running"): count for (channels, side), count in sizes.items()}
    deeplab = build_deeplab("resnest14_half", 3, norm="frozen")
    assert find_blocks(deeplab, 64, 64) == expected


def test_a_trial_changes_nothing():
    network = build_model("resnest14_half", 10, split_attention="fused")
    network.layer1.eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    modes, state = [module.training for module in network.modules()], torch.get_rng_state()
    with torch.inference_mode():
        try_fused(network, (2, 32, 32), CPU, torch.bfloat16, trains=True)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in network.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    attentions = [module for module in network.modules() if isinstance(module, SplitAttention)]
    assert {module.implementation for module in attentions} == {"fused"}
    assert not any(module._forward_hooks for module in attentions)


def test_only_kernels_need_proof():
    network = build_model("resnest14_half", 10)
    pytest.importorskip("triton", reason="torch brings Triton on Linux only")
    assert not needs_proof(network, CPU)
    assert needs_proof(network, torch.device("cuda", 0))
    assert not needs_proof(torch.nn.Linear(2, 2), torch.device("cuda", 0))


@pytest.mark.slow
def test_the_kernels_in_tritons_interpreter(use_splits, monkeypatch):
    """Right ones pass; each kernel that is made wrong is found, and so is one that does not compile."""
    pytest.importorskip("triton", reason="torch brings Triton on Linux only")
    from resnest_imagenet.models import triton_splits

    device = torch.device("cuda", 0) if torch.cuda.is_available() else CPU
    monkeypatch.setattr(proving, "_COMPARED_IMAGES", 2)  # the interpreter takes milliseconds for each
    blocks = Counter([Block(4, 2, 1, 2, 3, "batch")])
    use_splits(triton_splits.TritonSplits)
    assert prove(blocks, device, torch.bfloat16, trains=True) is None
    for method in ("pool", "input_gradient"):
        use_splits(make_splits(method, spoil_last, triton_splits.TritonSplits))
        assert prove(blocks, device, torch.float32, trains=True).startswith("differs from the formula"), method
    use_splits(triton_splits.TritonSplits)
    monkeypatch.setattr(triton_splits, "PIXELS", 3)  # a tile must have a power of two
    assert prove(blocks, device, torch.float32, trains=True).startswith("fails: ")
