"""DeepLabV3 on ResNeSt-50 side by side with torchvision's on timm's: a training step, an evaluation, the memory kept.

python tools/benchmarks/bench_segmentation.py [--batch 2] [--crop 480] [--rounds 7] [--threads 2] [--profile]
       [--out FILE.json]
python tools/benchmarks/bench_segmentation.py --report FILE.json   (the tables, for docs/performance_segmentation.md)

Rounds are interleaved; a figure is the median over the rounds of the ratio to "ours", with the range of the rounds.
timm's dilated ResNeSt has no pool behind the attention: it computes a little less than ours.
"""

import argparse
import json
import os
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path

# Before torch, and as users run it: the Makefile's policy is for processes that share cores.
os.environ.pop("OMP_WAIT_POLICY", None)

import timm
import torch
import torch.nn.functional as F
from bench import Round, begin_page, clock, describe_machine, in_percent, measure, profile_steps, report_part
from torch import Tensor, nn

from resnest_imagenet.compute import keep_freed_memory, place
from resnest_imagenet.models.deeplab import RATES, build_deeplab
from resnest_imagenet.models.folding import fold_batch_norms

CLASSES = 150
CPU = torch.device("cpu")
OTHERS = {"torchvision's": torch.contiguous_format, "torchvision's, channels_last": torch.channels_last}


class TimmBackbone(nn.Module):
    """Timm's ResNeSt-50 as torchvision's segmentation networks want a backbone."""

    def __init__(self) -> None:
        super().__init__()
        self.body = timm.create_model("resnest50d", features_only=True, out_indices=(3, 4), output_stride=8)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        layer3, layer4 = self.body(images)
        return OrderedDict(out=layer4, aux=layer3)


def build_other() -> nn.Module:
    """Build torchvision's DeepLabV3 on timm's ResNeSt-50."""
    from torchvision.models.segmentation import DeepLabV3
    from torchvision.models.segmentation.deeplabv3 import DeepLabHead
    from torchvision.models.segmentation.fcn import FCNHead

    return DeepLabV3(TimmBackbone(), DeepLabHead(2048, CLASSES, RATES), FCNHead(1024, CLASSES))


def compare(outputs: Tensor | tuple[Tensor, ...] | dict[str, Tensor], masks: Tensor) -> Tensor:
    """Return the loss of a training step."""
    logits, auxiliary = outputs.values() if isinstance(outputs, dict) else outputs
    return F.cross_entropy(logits, masks, ignore_index=255) + 0.5 * F.cross_entropy(auxiliary, masks, ignore_index=255)


def count_kept(network: nn.Module, images: Tensor, masks: Tensor) -> float:
    """Return the MiB of the tensors, parameters aside, that a forward pass and its loss keep for the backward pass."""
    parameters = {p.untyped_storage().data_ptr() for p in network.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = compare(network(images), masks)
    del loss
    return sum(kept.values()) / 2**20


def bench_step(
    batch: int, crop: int, names: Iterable[str], device: torch.device = CPU
) -> tuple[dict[str, Round], dict[str, float]]:
    """A training step with SGD, and the MiB that it keeps."""
    images = torch.randn(batch, 3, crop, crop, device=device)
    masks = torch.randint(CLASSES, (batch, crop, crop), device=device)
    rounds: dict[str, Round] = {}
    kept: dict[str, float] = {}
    for name in names:
        layout = OTHERS.get(name, torch.channels_last)
        model = (
            build_other().to(device, memory_format=layout) if name in OTHERS else build_deeplab("resnest50", CLASSES)
        )
        network = model if name in OTHERS else place(model, device)
        x = images.contiguous(memory_format=layout)
        optimizer = torch.optim.SGD(network.parameters(), 1e-4, 0.9, weight_decay=1e-4, fused=True)

        def step(network: nn.Module = network, x: Tensor = x, optimizer: torch.optim.SGD = optimizer) -> float:
            with clock(device) as seconds:
                optimizer.zero_grad(set_to_none=True)
                compare(network(x), masks).backward()
                optimizer.step()
            return seconds[0]

        kept[name] = count_kept(network, x, masks)
        rounds[name] = step
    return rounds, kept


def profile_each(batch: int, crop: int) -> dict[str, dict[str, float]]:
    """Return where the time of a step goes, of one network after another: together they need 24 GB."""
    profiles: dict[str, dict[str, float]] = {}
    for name in ("ours", *OTHERS):
        rounds, _ = bench_step(batch, crop, [name])
        rounds[name]()
        profiles |= profile_steps(rounds, CPU, tries=2)
    return in_percent(profiles)


def bench_evaluation(batch: int, crop: int) -> dict[str, Round]:
    """Classes of the pixels."""
    images = torch.randn(batch, 3, crop, crop)
    networks = {"ours": (fold_batch_norms(place(build_deeplab("resnest50", CLASSES), CPU)), torch.channels_last)}
    networks |= {name: (build_other().eval().to(memory_format=layout), layout) for name, layout in OTHERS.items()}
    rounds: dict[str, Round] = {}
    for name, (network, layout) in networks.items():
        x = images.contiguous(memory_format=layout)

        def evaluate(network: nn.Module = network, x: Tensor = x) -> float:
            with clock(CPU) as seconds, torch.no_grad():
                outputs = network(x)
                (outputs["out"] if isinstance(outputs, dict) else outputs).argmax(1)
            return seconds[0]

        rounds[name] = evaluate
    return rounds


def report(result: dict) -> str:
    """Return docs/performance_segmentation.md."""
    text = [
        "Made by `make bench-segmentation` (tools/benchmarks/bench_segmentation.py): DeepLabV3 on ResNeSt-50 at output",
        f"stride 8, {CLASSES} classes, against torchvision's DeepLabV3 on timm's ResNeSt-50, interleaved rounds in one",
        "process. A ratio is the competitor's time over ours, above 1 ours is faster: the median of the rounds, and",
        "their range. `kept` is what a forward pass and its loss keep for the backward pass.",
    ]
    lines = begin_page("Speed of segmentation, side by side", text, result["machine"])
    for part in result["parts"]:
        lines += report_part(part)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--crop", type=int, default=480)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--part", choices=("step", "evaluation"), nargs="+", default=["step", "evaluation"])
    parser.add_argument("--profile", action="store_true", help="list the operators of a step too: minutes more")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--report", type=Path)
    args = parser.parse_args()
    if args.report:
        print(report(json.loads(args.report.read_text())), end="")
        return
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    torch.manual_seed(0)
    result: dict = {"machine": describe_machine(CPU), "parts": []}
    size = f"batch {args.batch}, crop {args.crop}, fp32"
    if "step" in args.part:
        rounds, kept = bench_step(args.batch, args.crop, ["ours", *OTHERS])
        seconds = measure(rounds, args.rounds)
        del rounds
        part = {"title": f"Training step of DeepLabV3, {size}", "seconds": seconds, "kept": kept}
        result["parts"].append(part | {"profile": profile_each(args.batch, args.crop) if args.profile else {}})
    if "evaluation" in args.part:
        seconds = measure(bench_evaluation(args.batch, args.crop), args.rounds)
        result["parts"].append(
            {"title": f"Evaluation of DeepLabV3, {size}", "seconds": seconds, "kept": {}, "profile": {}}
        )
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(report(result))


if __name__ == "__main__":
    main()
