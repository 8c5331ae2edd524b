"""Proves the fused split attention on the device where it will run: equal to the formula, and not slower.

The cases are those of one network and one size of images: each of its blocks with another number of channels or another
map. The values are chosen so that no ReLU is near its edge: there rounding alone would change a gradient.
"""

import copy
import statistics
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from resnest_imagenet.errors import ConfigError, first_line, is_out_of_memory
from resnest_imagenet.models import fused_attention
from resnest_imagenet.models.features import Backbone
from resnest_imagenet.models.split_attention import Implementation, SplitAttention
from resnest_imagenet.models.splits import Splits

ROUNDS = 3  # interleaved; the operator that is slower in all of them is not used
# The largest difference from the formula in float64 that passes, over the largest value; or MARGIN times that of the
# formula in the same type, if that is larger.
BOUNDS = {torch.float32: 5e-4, torch.float16: 5e-3, torch.bfloat16: 4e-2}
MARGIN = 3
NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}

_COMPARED_IMAGES = 8  # whatever the batch: kernels treat images alike
_COMPARED_PIXELS = 4096  # more make no difference to a kernel
_TIMED_VALUES = 2**26  # of the largest tensor: 256 MiB in float32

# How y is normalised: in bn0 by the batch, in bn0 by running statistics, or before the operator.
Norm = Literal["batch", "running", "before"]


@dataclass(frozen=True)
class Block:
    """A split attention with the map that it computes: B images of (R C, height, width) become (C, height, width)."""

    channels: int
    radix: int
    cardinality: int
    height: int
    width: int
    norm: Norm

    def __str__(self) -> str:
        return f"{self.channels} channels of {self.height} x {self.width}"


@dataclass(frozen=True)
class Finding:
    """What a trial has found.

    Attributes:
        fault: why the operator must not be used, for people; None if it may be.
        ratio: the formula's time over the operator's, the median of the rounds; None if they were not timed.
        seconds: that the trial took.
    """

    fault: str | None
    ratio: float | None
    seconds: float


def needs_proof(network: nn.Module, device: torch.device) -> bool:
    """Return whether a network has split attention that kernels other than torch's would compute on a device."""
    has_attention = any(isinstance(module, SplitAttention) for module in network.modules())
    return has_attention and fused_attention.choose_splits(device, torch.float32) is not Splits


def use_implementation(network: nn.Module, implementation: Implementation) -> None:
    """Let all split attention of a network be computed by one implementation; see `SplitAttention`."""
    for module in network.modules():
        if isinstance(module, SplitAttention):
            module.implementation = implementation


@torch.no_grad()
def find_blocks(network: nn.Module, height: int, width: int) -> Counter[Block]:
    """Count the blocks of a network, by one pass of a blank image in evaluation mode. The network does not change.

    Args:
        network: on its device; of a detector or a network of segmentation, only the backbone runs.
        height: of the image in pixels.
        width: of the image in pixels.
    """
    blocks: Counter[Block] = Counter()
    modules = list(network.modules())
    modes = [module.training for module in modules]
    attentions = [module for module in modules if isinstance(module, SplitAttention)]
    norms: dict[nn.Module, Norm] = {module: _find_norm(module.bn0) for module in attentions}
    implementations = [module.implementation for module in attentions]

    def note(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(module, SplitAttention)
        _, channels, *size = output.shape
        blocks[Block(channels, module.radix, module.cardinality, size[0], size[1], norms[module])] += 1

    handles = [module.register_forward_hook(note) for module in attentions]
    try:
        network.eval()
        use_implementation(network, "reference")
        image = torch.zeros(1, 3, height, width, device=next(network.parameters()).device)
        backbone = getattr(network, "backbone", None)
        network_of_images = backbone if isinstance(backbone, Backbone) else network
        network_of_images(image.contiguous(memory_format=torch.channels_last))
    finally:
        for handle in handles:
            handle.remove()
        for attention, implementation in zip(attentions, implementations, strict=True):
            attention.implementation = implementation
        for module, is_training in zip(modules, modes, strict=True):
            module.training = is_training
    return blocks


def _find_norm(bn: nn.Module) -> Norm:
    if type(bn) is not nn.BatchNorm2d:
        return "before"
    return "batch" if bn.training else "running"


def prove(blocks: Counter[Block], device: torch.device, dtype: torch.dtype, trains: bool) -> str | None:
    """Compare the fused operator with the formula: the output, and in training all gradients.

    Args:
        blocks: of the network.
        device: where the operator would run.
        dtype: of the run; float32 is compared too.
        trains: whether the network is trained; otherwise only the forward pass is compared.

    Returns:
        Why the operator must not be used, for people; None if it is equal to the formula but for rounding.

    Raises:
        ConfigError: the operator has broken the device for this process.
        RuntimeError: the device's memory is full.
    """
    for block in blocks:
        for compared, norm, with_gradients in _list_uses(block.norm, dtype, trains):
            where = f"({NAMES[compared]}, {block})"
            try:
                difference = _find_difference(replace(block, norm=norm), device, compared, with_gradients)
            except Exception as error:  # a kernel, or its compiler, raises anything
                _require_device(error, device)
                return f"fails: {first_line(error)} {where}"
            if difference:
                return f"differs from the formula: {difference} {where}"
    return None


def _list_uses(norm: Norm, dtype: torch.dtype, trains: bool) -> Iterable[tuple[torch.dtype, Norm, bool]]:
    """Return how a block is used: the type, how y is normalised, and whether gradients are needed.

    The evaluations of a run may fold bn0 into the convolution, and then y is normalised before.
    """
    own: Norm = "before" if norm == "before" else "running"
    uses: list[tuple[torch.dtype, Norm, bool]] = [(torch.float32, norm if trains else own, trains)]
    uses += [(dtype, norm, True), (dtype, "before", False)] if trains else []
    return dict.fromkeys([*uses, (dtype, own, False)])


def time_both(
    blocks: Counter[Block], batch: int, device: torch.device, dtype: torch.dtype, trains: bool
) -> list[float]:
    """Return the formula's time over the fused operator's for all blocks of a network, for each of ROUNDS rounds.

    Args:
        blocks: of the network.
        batch: images at a time; fewer are taken where they would fill the memory.
        device: where both run.
        dtype: of the run.
        trains: whether to time the backward pass too.
    """
    totals: dict[Implementation, list[float]] = {"fused": [0.0] * ROUNDS, "reference": [0.0] * ROUNDS}
    for block, count in blocks.items():
        values = block.radix * block.channels * block.height * block.width
        images = max(2, min(batch, _TIMED_VALUES // values))
        core, y, gradient = _build_case(block, images, block.height, device, dtype)
        modules = {name: _copy_with(core, name) for name in totals}
        for number in range(-1, ROUNDS):  # the first is not timed: it allocates memory
            for name, seconds in totals.items():
                started = _read_clock(device)
                _compute(modules[name], y, gradient if trains else None)
                elapsed = _read_clock(device) - started
                if number >= 0:
                    seconds[number] += count * elapsed
    return [formula / fused for fused, formula in zip(*totals.values(), strict=True)]


def try_fused(
    network: nn.Module,
    size: tuple[int, int, int],
    device: torch.device,
    dtype: torch.dtype,
    trains: bool,
    is_timed: bool = True,
) -> Finding:
    """Compare the fused operator with the formula in all blocks of a network, and time both.

    Args:
        network: on its device; see `find_blocks`.
        size: images at a time, height and width in pixels.
        device: where the operator would run.
        dtype: of the run.
        trains: whether the network is trained.
        is_timed: whether the operator must not be slower than the formula in all rounds.

    Raises:
        ConfigError: the operator has broken the device for this process.
        RuntimeError: the device's memory is full.
    """
    started, (batch, height, width) = time.perf_counter(), size
    ratio = None
    with torch.inference_mode(False), torch.autocast(device.type, enabled=False):
        blocks = find_blocks(network, height, width)
        fault = prove(blocks, device, dtype, trains)
        if fault is None and is_timed:
            ratios, fault = _time_safely(blocks, batch, device, dtype, trains)
            ratio = statistics.median(ratios) if ratios else None
            if ratio and max(ratios) < 1:
                fault = f"is slower than the formula in {ROUNDS} rounds: {1 / ratio:.2f} times its time"
    if device.type == "cuda":
        torch.cuda.empty_cache()  # the run's tensors have other sizes
    return Finding(fault, ratio, time.perf_counter() - started)


def _time_safely(
    blocks: Counter[Block], batch: int, device: torch.device, dtype: torch.dtype, trains: bool
) -> tuple[list[float], str | None]:
    """Return the ratios of `time_both`, or none and the operator's fault: at its full size a kernel may fail yet."""
    try:
        return time_both(blocks, batch, device, dtype, trains), None
    except Exception as error:  # as above
        _require_device(error, device)
        return [], f"fails: {first_line(error)}"


def _require_device(error: Exception, device: torch.device) -> None:
    """Raise an error that is not the operator's: the memory is full, or the device can no longer be used."""
    if is_out_of_memory(error):
        raise error
    if device.type != "cuda":
        return
    try:
        torch.cuda.synchronize(device)
    except RuntimeError as broken:
        raise ConfigError(
            f"the fused split attention has broken {device} for this process ({first_line(error)}): set "
            "model.split_attention=reference in training, or device=cpu"
        ) from broken


def _find_difference(block: Block, device: torch.device, dtype: torch.dtype, with_gradients: bool) -> str | None:
    """Return in words which value of the fused operator is not the formula's; None if all are."""
    height = min(block.height, -(-_COMPARED_PIXELS // block.width))
    core, y, gradient = _build_case(block, _COMPARED_IMAGES, height, device, dtype)
    upstream = gradient if with_gradients else None
    fused, formula = (_compute(_copy_with(core, name), y, upstream) for name in ("fused", "reference"))
    exact = _compute(_copy_with(core, "reference").double(), y.double(), upstream)
    # Read all at once: each time the host would wait for the device.
    largest, apart, rounding = torch.stack(
        [
            torch.stack([values[name].double().sub(origin[name]).abs().max() for name in exact])
            for values, origin in ((exact, dict.fromkeys(exact, 0)), (fused, exact), (formula, exact))
        ]
    ).tolist()
    # The gradient of a bias before a batch norm is 0 but for rounding: a scale is a hundredth of the largest, or more.
    scales = [max(scale, 0.01 * max(largest)) for scale in largest]
    for name, scale, difference, own in zip(exact, scales, apart, rounding, strict=True):
        if not difference <= max(BOUNDS[dtype] * scale, MARGIN * own):  # NaN does not pass
            return f"{name} by {difference / scale:.2g} of the largest value"
    return None


def _copy_with(core: SplitAttention, implementation: Implementation) -> SplitAttention:
    module = copy.deepcopy(core)
    module.implementation = implementation
    return module


def _compute(module: SplitAttention, y: Tensor, gradient: Tensor | None) -> dict[str, Tensor]:
    """Return the output and, with a gradient of the output, all gradients and updated statistics, by name.

    Args:
        module: split attention without its convolution.
        y: (B, R C, H, W).
        gradient: (B, C, H, W), or None for the forward pass alone.
    """
    leaf = y.detach().requires_grad_(gradient is not None)
    with torch.set_grad_enabled(gradient is not None):
        out = module(leaf.clone())  # which the operator may overwrite, as a convolution's output
    if gradient is None:
        return {"the output": out}
    names, parameters = zip(*module.named_parameters(), strict=True)
    gradients = torch.autograd.grad(out, (leaf, *parameters), gradient.to(out.dtype))
    titles = (f"the gradient of {name}" for name in ("the input", *names))
    buffers = {f"bn0.{name}": buffer.clone() for name, buffer in module.bn0.named_buffers()}
    return {"the output": out.detach(), **dict(zip(titles, gradients, strict=True)), **buffers}


def _build_case(
    block: Block, images: int, height: int, device: torch.device, dtype: torch.dtype
) -> tuple[SplitAttention, Tensor, Tensor]:
    """Return split attention without its convolution, that convolution's output, and a gradient of the sum.

    y is 0.5 to 1.7 in absolute value, with signs like a chessboard's, so that each channel's mean is near 0: bn0's
    small shifts then change no sign. The gate is not under trial: rounding would decide where bn1's variance
    or output is near 0, so its epsilon is large, and its outputs are positive.
    """
    draw = torch.Generator(device).manual_seed(0)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(shape, generator=draw, device=device) * (high - low) + low

    with torch.device("meta"):  # whose first values need no random numbers: torch's own generator stays as it is
        core = SplitAttention(block.channels, block.radix, block.cardinality)
    core.conv = nn.Identity()  # type: ignore[assignment]
    if block.norm == "before":
        core.bn0 = nn.Identity()  # type: ignore[assignment]
    core.to_empty(device=device)
    ranges = {"weight": (0.5, 1.0), "bias": (-0.1, 0.1), "running_mean": (-0.1, 0.1), "running_var": (0.8, 1.2)}
    with torch.no_grad():
        for name, values in (*core.named_parameters(), *core.named_buffers()):
            low, high = ranges.get(name.rpartition(".")[2], (0.0, 0.0))
            values.copy_(uniform(low, high, *values.shape))
        for layer in (core.fc1, core.fc2):
            spread = 1.7 / layer.weight.shape[1] ** 0.5
            layer.weight.copy_(uniform(-spread, spread, *layer.weight.shape))
        core.bn1.bias.add_(3)
        core.bn1.eps = 0.1
    core.train(block.norm == "batch")
    shape = (images, block.radix * block.channels, height, block.width)
    places = [torch.arange(count, device=device).view([-1 if axis == i else 1 for i in range(4)])
              for axis, count in enumerate(shape)]  # fmt: skip
    signs = 1 - 2 * (sum(places[1:], places[0]) % 2)
    y = uniform(0.7, 1.3, *shape) * uniform(0.7, 1.3, *shape[:2], 1, 1) * signs
    gradient = uniform(-1, 1, images, block.channels, height, block.width)
    y, gradient = (x.to(dtype).contiguous(memory_format=torch.channels_last) for x in (y, gradient))
    return core, y, gradient


def _read_clock(device: torch.device) -> float:
    """Return the time in seconds when the device has computed all that was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
