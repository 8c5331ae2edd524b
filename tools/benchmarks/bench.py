"""ResNeSt-50 side by side with timm's and with the plain formula: split attention alone, a training step, inference.

python tools/benchmarks/bench.py [--batch 8] [--crop 224] [--rounds 9] [--device cpu] [--compile] [--out FILE.json]
python tools/benchmarks/bench.py --report FILE.json        (the tables, for docs/performance.md)

All competitors have the same weights and images. Before anything is timed, ours is compared with the plain formula.
Rounds are interleaved; a figure is the median over the rounds of the ratio to "ours", with the range of the rounds.
"""

import argparse
import copy
import json
import os
import platform
import re
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

# Before torch, and as users run it: the Makefile's policy is for processes that share cores.
os.environ.pop("OMP_WAIT_POLICY", None)

import timm
import torch
import torch.nn.functional as F
from timm.layers import SplitAttn
from torch import Tensor, nn

from resnest_imagenet import build_model
from resnest_imagenet.compute import autocast, keep_freed_memory, place
from resnest_imagenet.models.folding import fold_batch_norms
from resnest_imagenet.models.pointwise import PointwiseConv2d
from resnest_imagenet.models.rectified import AveragePool
from resnest_imagenet.models.split_attention import SplitAttention

# Split attention in ResNeSt-50 at crop 224: channels, side of the map, blocks.
BLOCKS = ((64, 56, 3), (128, 56, 1), (128, 28, 3), (256, 28, 1), (256, 14, 5), (512, 14, 1), (512, 7, 2))
OTHER = "timm's resnet50d, channels_last"  # what the physical aim is measured by
GENERATED = "torch.compile's kernels"  # the profiler names each graph by its hash
Round = Callable[[], float]  # returns seconds


class PlainSplitAttention(nn.Module):
    """The formula of section 3.1, as one writes it down: the splits, their sum, its mean, the weights, the sum."""

    def __init__(self, ours: SplitAttention) -> None:
        super().__init__()
        self.conv, self.bn0, self.fc1, self.bn1, self.fc2 = ours.conv, ours.bn0, ours.fc1, ours.bn1, ours.fc2
        self.radix, self.cardinality = ours.radix, ours.cardinality

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn0(self.conv(x)))
        splits = torch.split(x, x.shape[1] // self.radix, dim=1)
        pooled = F.adaptive_avg_pool2d(sum(splits), 1)
        logits = self.fc2(F.relu(self.bn1(self.fc1(pooled))))
        weights = logits.view(len(x), self.cardinality, self.radix, -1).transpose(1, 2).softmax(dim=1)
        weights = weights.reshape(len(x), -1, 1, 1).split(x.shape[1] // self.radix, dim=1)
        return sum(weight * split for weight, split in zip(weights, splits, strict=True))


def make_plain(network: nn.Module) -> nn.Module:
    """Return a copy of a ResNeSt with the plain formula and torch's modules in place of ours; its keys stay."""
    plain = copy.deepcopy(network)
    plain.conv1 = nn.Sequential(*plain.conv1)
    for parent in list(plain.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, SplitAttention):
                setattr(parent, name, PlainSplitAttention(child))
            elif isinstance(child, AveragePool):
                child.forward = partial(nn.AvgPool2d.forward, child)
    return plain


@contextmanager
def clock(device: torch.device) -> Iterator[list[float]]:
    """Put the seconds that the body takes, on the device, into the list."""
    seconds: list[float] = []
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    yield seconds
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds.append(time.perf_counter() - started)


def compare_with_plain() -> dict[str, float]:
    """Return the largest difference from the plain formula, of the output and all gradients, over the largest value.

    float64: between the two. bf16: of each from float64, ours over plain's.
    """
    torch.manual_seed(0)
    ours = SplitAttention(32)
    x = torch.randn(4, 32, 14, 14)

    def differentiate(module: nn.Module, dtype: torch.dtype, precision: str) -> list[Tensor]:
        module, leaf = copy.deepcopy(module).to(dtype), x.to(dtype).requires_grad_()
        with autocast(x.device, precision):
            out = module(leaf)
        weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
        values = [out, *torch.autograd.grad((out * weights).sum(), [leaf, *module.parameters()])]
        return [value.detach().double() for value in values]

    def distance(these: list[Tensor], those: list[Tensor]) -> float:
        # The gradient of a bias before a BN is 0 but for rounding: small ones count as a hundredth of the largest.
        smallest = 0.01 * max(value.abs().max() for value in those)
        pairs = zip(these, those, strict=True)
        return max(float((a - b).abs().max() / b.abs().max().clamp(min=smallest)) for a, b in pairs)

    plain = PlainSplitAttention(ours)
    exact = differentiate(plain, torch.float64, "fp32")
    found = distance(differentiate(ours, torch.float64, "fp32"), exact)
    low, low_plain = (distance(differentiate(m, torch.float32, "bf16"), exact) for m in (ours, plain))
    assert found < 1e-10 and low < 2 * low_plain, (found, low, low_plain)
    return {"float64": found, "bf16": low / low_plain}


def bench_core(batch: int, precision: str, device: torch.device) -> dict[str, Round]:
    """Forward and backward pass of everything between bn0 and conv3, in all blocks."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    calls: dict[str, list[tuple[nn.Module, Tensor, Tensor, int]]] = {}
    for channels, side, blocks in BLOCKS:
        ours = SplitAttention(channels)
        theirs = SplitAttn(channels, norm_layer=nn.BatchNorm2d)
        theirs.load_state_dict(ours.state_dict())
        y = torch.randn(batch, 2 * channels, side, side, device=device, dtype=dtype)
        gradient = torch.randn(batch, channels, side, side, device=device, dtype=dtype)
        for name, module in (
            ("ours", ours),
            ("plain formula", PlainSplitAttention(ours)),
            ("timm, NCHW", theirs),
            ("timm, channels_last", theirs),
        ):
            core = copy.deepcopy(module).to(device)
            core.conv, core.bn0 = nn.Identity(), nn.Identity()
            in_format = torch.channels_last if name in ("ours", "timm, channels_last") else torch.contiguous_format
            tensors = (tensor.clone(memory_format=in_format) for tensor in (y, gradient))
            calls.setdefault(name, []).append((core.to(memory_format=in_format), *tensors, blocks))

    def run(name: str) -> float:
        total = 0.0
        for module, y, gradient, blocks in calls[name]:
            best = []
            for _ in range(3):
                copied = y.requires_grad_().clone()  # as a convolution's output: some write into it
                with clock(device) as seconds:
                    with autocast(device, precision):
                        out = module(copied)
                    torch.autograd.grad(out, [y, *module.parameters()], gradient)
                best += seconds
            total += blocks * min(best)
        return total

    return {name: lambda name=name: run(name) for name in calls}


def bench_convolution(batch: int, precision: str, device: torch.device) -> dict[str, Round]:
    """Forward and backward pass of the 3x3 convolutions in two groups, in all blocks; other ways to compute them."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32

    def convolve_twice(x: Tensor, weight: Tensor) -> Tensor:
        halves = zip(x.chunk(2, 1), weight.chunk(2), strict=True)
        return torch.cat([F.conv2d(half, its, padding=1) for half, its in halves], 1)

    def convolve_block_diagonal(x: Tensor, weight: Tensor) -> Tensor:
        half = weight.shape[1]
        above, below = weight.chunk(2)
        dense = torch.cat([F.pad(above, (0, 0, 0, 0, 0, half)), F.pad(below, (0, 0, 0, 0, half, 0))])
        return F.conv2d(x, dense.contiguous(memory_format=torch.channels_last), padding=1)

    ways: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "ours": lambda x, weight: F.conv2d(x, weight, padding=1, groups=2),
        "two dense convolutions": convolve_twice,
        "a block-diagonal dense one": convolve_block_diagonal,
    }
    operands = []
    for channels, side, blocks in BLOCKS:
        shapes = (batch, channels, side, side), (2 * channels, channels // 2, 3, 3), (batch, 2 * channels, side, side)
        tensors = [torch.randn(shape, device=device, dtype=dtype) for shape in shapes]
        operands.append(([t.contiguous(memory_format=torch.channels_last) for t in tensors], blocks))

    def run(name: str) -> float:
        total = 0.0
        for (x, weight, gradient), blocks in operands:
            best = []
            for _ in range(3):
                with clock(device) as seconds:
                    out = ways[name](x.requires_grad_(), weight.requires_grad_())
                    torch.autograd.grad(out, [x, weight], gradient)
                best += seconds
            total += blocks * min(best)
        return total

    return {name: lambda name=name: run(name) for name in ways}


def make_step(
    network: nn.Module,
    images: Tensor,
    labels: Tensor,
    precision: str,
    see: Callable[[Tensor], object] = lambda loss: None,
) -> Round:
    """Return what takes a training step, with SGD; `see` gets each loss."""
    optimizer = torch.optim.SGD(network.parameters(), 1e-4, 0.9, nesterov=True, weight_decay=1e-4, fused=True)

    def step() -> float:
        with clock(images.device) as seconds:
            optimizer.zero_grad(set_to_none=True)
            with autocast(images.device, precision):
                loss = F.cross_entropy(network(images).float(), labels)
            loss.backward()
            optimizer.step()
        see(loss.detach())
        return seconds[0]

    return step


def bench_step(
    batch: int, crop: int, precision: str, device: torch.device, compiles: bool
) -> tuple[dict[str, Round], dict[str, float]]:
    """A training step with SGD; besides, the MiB that each keeps for its backward pass, on CUDA its peak memory."""
    ours = place(build_model("resnest50"), device)
    weights = copy.deepcopy(ours.state_dict())
    networks = {
        "ours": ours,
        "plain formula": make_plain(ours).to(memory_format=torch.contiguous_format),
        "timm, NCHW": timm.create_model("resnest50d").to(device),
        "timm, channels_last": place(timm.create_model("resnest50d"), device),
        OTHER: place(timm.create_model("resnet50d"), device),
    }
    if device.type == "cpu":  # elsewhere ours are convolutions too
        networks["ours, 1x1 as convolutions"] = place(build_model("resnest50"), device)
        for module in networks["ours, 1x1 as convolutions"].modules():
            if isinstance(module, PointwiseConv2d):
                module.forward = partial(nn.Conv2d.forward, module)
    if compiles:
        networks["ours, compiled"] = place(build_model("resnest50"), device)
        networks["timm, channels_last, compiled"] = place(timm.create_model("resnest50d"), device)
    images, labels = torch.randn(batch, 3, crop, crop, device=device), torch.randint(1000, (batch,), device=device)
    rounds: dict[str, Round] = {}
    kept: dict[str, float] = {}
    losses: dict[str, float] = {}
    for name, network in networks.items():
        if name != OTHER:
            network.load_state_dict(weights)
        is_nchw = name in ("plain formula", "timm, NCHW")
        x = images.contiguous(memory_format=torch.contiguous_format if is_nchw else torch.channels_last)
        if "compiled" in name:
            network.compile()
        step = make_step(network, x, labels, precision, lambda loss, name=name: losses.setdefault(name, float(loss)))
        with clock(device) as seconds:
            step()
        if "compiled" in name:
            print(f"{name}, {precision}: first step {seconds[0]:.0f} s", flush=True)
        if device.type == "cuda":
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            step()
            kept[name] = (torch.cuda.max_memory_allocated() - before) / 2**20
        elif "compiled" not in name:
            kept[name] = count_kept(network, x, precision)
        rounds[name] = step
    del losses[OTHER]
    spread = max(losses.values()) - min(losses.values())
    assert spread < (1e-3 if precision == "fp32" else 0.1), losses
    return rounds, kept


def count_kept(network: nn.Module, images: Tensor, precision: str) -> float:
    """Return the MiB of the tensors, parameters aside, that a forward pass keeps for the backward pass."""
    parameters = {p.untyped_storage().data_ptr() for p in network.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in parameters:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast(images.device, precision):
        out = network(images)
    del out
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) / 2**20


def bench_inference(batch: int, crop: int, precision: str, device: torch.device, compiles: bool) -> dict[str, Round]:
    """Logits of a batch."""
    ours = place(build_model("resnest50"), device).eval()
    theirs = place(timm.create_model("resnest50d"), device).eval()
    theirs.load_state_dict(ours.state_dict())
    networks = {"ours": fold_batch_norms(ours), "plain formula": make_plain(ours), "timm, channels_last": theirs}
    if compiles:
        networks["ours, compiled and frozen"] = build_model("resnest50", split_attention="reference").eval()
        networks["ours, compiled and frozen"].load_state_dict(ours.state_dict())
        networks["ours, compiled and frozen"] = place(fold_batch_norms(networks["ours, compiled and frozen"]), device)
        networks["timm, channels_last, compiled"] = copy.deepcopy(theirs)
    images = torch.randn(batch, 3, crop, crop, device=device)
    rounds: dict[str, Round] = {}
    expected: Tensor | None = None
    for name, network in networks.items():
        is_nchw = name == "plain formula"
        x = images.contiguous(memory_format=torch.contiguous_format if is_nchw else torch.channels_last)
        if is_nchw:
            network.to(memory_format=torch.contiguous_format)
        if "compiled" in name:
            network.compile()

        def infer(network: nn.Module = network, x: Tensor = x) -> tuple[float, Tensor]:
            with clock(device) as seconds, torch.no_grad(), autocast(device, precision):
                logits = network(x)
            return seconds[0], logits

        with torch._inductor.config.patch(freezing="frozen" in name):
            _, logits = infer()
        expected = logits.float() if expected is None else expected
        assert (logits - expected).abs().max() < (1e-3 if precision == "fp32" else 0.1) * expected.abs().max(), name
        rounds[name] = lambda infer=infer: infer()[0]
    return rounds


def measure(rounds: dict[str, Round], count: int, warm_up: int = 1) -> dict[str, list[float]]:
    """Return seconds by competitor and round; the rounds are interleaved, and come after some that warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in rounds}
    for number in range(count + warm_up):
        for name, run in rounds.items():
            value = run()
            if number >= warm_up:
                seconds[name].append(value)
    return seconds


def profile_steps(rounds: dict[str, Round], device: torch.device, tries: int = 5) -> dict[str, dict[str, float]]:
    """Return the time of each operator in a step, in microseconds.

    Args:
        rounds: a step of each competitor.
        device: where they run.
        tries: steps of each; the fastest counts.
    """
    profiles: dict[str, dict[str, float]] = {}
    for name, step in rounds.items():
        profiled = []
        for _ in range(tries):
            with torch.profiler.profile() as profiler:
                step()
            on_device = "self_cpu_time_total" if device.type == "cpu" else "self_device_time_total"
            times: Counter[str] = Counter()
            for event in profiler.key_averages():
                times[GENERATED if "CompiledFxGraph" in event.key else event.key] += float(getattr(event, on_device))
            profiled.append({key: value for key, value in times.items() if value > 0})
        profiles[name] = min(profiled, key=lambda times: sum(times.values()))
    return profiles


def in_percent(profiles: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """Return the operators' times in percent of our step, without those under a thousandth of it."""
    whole = sum(profiles["ours"].values())
    return {
        name: {key: round(100 * time / whole, 2) for key, time in times.items() if time > whole / 1000}
        for name, times in profiles.items()
    }


def tabulate(profiles: dict[str, dict[str, float]]) -> list[str]:
    """Return a table of the five largest operators of each competitor."""
    largest = {key for times in profiles.values() for key in sorted(times, key=lambda k: -times[k])[:5]}
    lines = ["Where the time goes, in percent of our step (torch.profiler; the five largest operators of each):", ""]
    lines += [f"| | {' | '.join(profiles)} |", "|---|" + "---:|" * len(profiles)]
    for key in sorted(largest, key=lambda k: -profiles["ours"].get(k, 0.0)):
        lines.append(f"| {key} | " + " | ".join(f"{times.get(key, 0):.1f}" for times in profiles.values()) + " |")
    lines.append("| all | " + " | ".join(f"{sum(times.values()):.0f}" for times in profiles.values()) + " |")
    return [*lines, ""]


def report(result: dict) -> str:
    """Return docs/performance.md."""
    text = [
        "Made by `make bench` (tools/benchmarks/bench.py): ResNeSt-50, the same weights and images, interleaved rounds",
        "in one process. A ratio is the competitor's time over ours, above 1 ours is faster: the median of the rounds,",
        "and their range. `kept` is what a forward pass keeps for the backward pass; on a GPU, the peak of a step.",
    ]
    lines = [
        *begin_page("Speed, side by side", text, result["machine"]),
        "Difference of our operator from the plain formula, output and all gradients, over the largest value: "
        f"{result['equality']['float64']:.1e} in float64; under bf16 autocast its distance from float64 is "
        f"{result['equality']['bf16']:.2f} of the plain formula's.",
        "",
    ]
    for part in result["parts"]:
        lines += report_part(part)
    return "\n".join(lines)


def begin_page(title: str, text: Sequence[str], machine: dict[str, str], note: str = "") -> list[str]:
    """Return the head of a page: its title, what is measured and how, and the machine with a note about it."""
    return [f"# {title}", "", *text, "", f"{format_machine(machine)}{note}.", ""]


def format_machine(machine: dict[str, str]) -> str:
    """Return the result of `describe_machine` in one line."""
    return ", ".join(f"{key} {value}" for key, value in machine.items())


def report_part(part: dict) -> list[str]:
    """Return the section of one comparison."""
    ours, kept = part["seconds"]["ours"], part["kept"]
    lines = [
        f"## {part['title']}",
        "",
        "| against | ours is faster by | rounds |" + (" kept, MiB |" if kept else ""),
        "|---|---:|---:|" + ("---:|" if kept else ""),
    ]
    pairs = {name: (seconds, ours) for name, seconds in part["seconds"].items()}
    compiled = {name.split(",")[0]: seconds for name, seconds in part["seconds"].items() if "compiled" in name}
    if compiled:
        pairs["timm compiled, against ours compiled"] = compiled["timm"], compiled["ours"]
    for name, (seconds, mine) in pairs.items():
        ratios = sorted(other / our for other, our in zip(seconds, mine, strict=True))
        row = f"| {name} | {statistics.median(ratios):.2f} | {ratios[0]:.2f} to {ratios[-1]:.2f} |"
        lines.append(row + (f" {kept[name]:.0f} |" if name in kept else " |" if kept else ""))
    return [*lines, "", *(tabulate(part["profile"]) if part["profile"] else [])]


def describe_machine(device: torch.device) -> dict[str, str]:
    """Return what the figures depend on."""
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    capability, threads = torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()
    name = f"{cpu[1] if cpu else platform.machine()} with {capability}, {threads} threads"
    if device.type == "cuda":
        name = torch.cuda.get_device_name()
    return {"device": name, "torch": torch.__version__, "timm": timm.__version__, "Python": platform.python_version()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--crop", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--precision", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true", help="the compiled competitors too: minutes more on a CPU")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--report", type=Path)
    args = parser.parse_args()
    if args.report:
        print(report(json.loads(args.report.read_text())), end="")
        return
    device = torch.device(args.device)
    if device.type == "cpu":
        keep_freed_memory()
        torch.ones(2**31, dtype=torch.uint8)  # fetches it: in a run, a step finds what the one before has left
    torch.manual_seed(0)
    result: dict = {"machine": describe_machine(device), "equality": compare_with_plain(), "parts": []}

    def add(title: str, rounds: dict[str, Round], kept: dict[str, float] | None = None) -> None:
        part = {"title": title, "seconds": measure(rounds, args.rounds), "kept": kept or {}}
        result["parts"].append(part | {"profile": in_percent(profile_steps(rounds, device)) if kept else {}})
        if args.out:
            args.out.write_text(json.dumps(result, indent=1) + "\n")

    print("differences from the plain formula:", result["equality"], flush=True)
    for precision in args.precision:
        size = f"batch {args.batch}, crop {args.crop}, {precision}"
        add(f"Split attention alone, {size}", bench_core(args.batch, precision, device))
        add(f"The 3x3 convolution in two groups, {size}", bench_convolution(args.batch, precision, device))
        rounds, kept = bench_step(args.batch, args.crop, precision, device, args.compile)
        add(f"Training step, {size}", rounds, kept)
        del rounds
        if precision == "fp32" or device.type == "cuda":
            add(f"Inference, {size}", bench_inference(args.batch, args.crop, precision, device, args.compile))
    print(report(result))


if __name__ == "__main__":
    main()
