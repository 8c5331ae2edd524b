"""Faster R-CNN on ResNeSt-50 side by side with torchvision's on timm's: a training step, an evaluation, kept memory.

python tools/benchmarks/bench_detection.py [--batch 2] [--size 512] [--rounds 7] [--threads 2] [--out FILE.json]
python tools/benchmarks/bench_detection.py --report FILE.json   (the tables, for docs/performance_detection.md)

Rounds are interleaved; a figure is the median over the rounds of the ratio to "ours", with the range of the rounds.
Both have the same layers: norms in pyramid and box head, 4 convolutions in it, stem and layer1 frozen.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

# Before torch, and as users run it: the Makefile's policy is for processes that share cores.
os.environ.pop("OMP_WAIT_POLICY", None)

import timm
import torch
from bench import Round, begin_page, clock, describe_machine, in_percent, measure, profile_steps, report_part
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead
from torchvision.models.detection.rpn import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from resnest_imagenet.compute import keep_freed_memory, place
from resnest_imagenet.instances import Target
from resnest_imagenet.models.cost import count_rcnn
from resnest_imagenet.models.folding import fold_batch_norms
from resnest_imagenet.models.rcnn import build_rcnn

CLASSES = 80
CPU = torch.device("cpu")
OTHERS = {"torchvision's": torch.contiguous_format, "torchvision's, channels_last": torch.channels_last}
OBJECTS = 8  # in an image


class TimmPyramid(nn.Module):
    """Timm's ResNeSt-50 with a feature pyramid, as torchvision's detectors want a backbone."""

    out_channels = 256

    def __init__(self) -> None:
        super().__init__()
        self.body = timm.create_model("resnest50d", features_only=True, out_indices=(1, 2, 3, 4))
        self.fpn = FeaturePyramidNetwork([256, 512, 1024, 2048], 256, LastLevelMaxPool(), nn.BatchNorm2d)
        self.frozen = [module for name, module in self.body.named_children() if name in ("conv1", "bn1", "layer1")]
        for module in self.frozen:
            module.requires_grad_(False)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return self.fpn(dict(zip("0123", self.body(images), strict=True)))

    def train(self, mode: bool = True) -> "TimmPyramid":
        super().train(mode)
        for module in self.frozen:
            module.eval()
        return self


def build_other(size: int) -> nn.Module:
    """Build torchvision's Faster R-CNN on timm's ResNeSt-50; with our head and numbers of boxes."""
    return FasterRCNN(
        TimmPyramid(),
        CLASSES + 1,
        min_size=size,
        max_size=size,
        rpn_anchor_generator=AnchorGenerator([(s,) for s in (32, 64, 128, 256, 512)], ((0.5, 1.0, 2.0),) * 5),
        box_head=FastRCNNConvFCHead((256, 7, 7), [256] * 4, [1024], nn.BatchNorm2d),
        rpn_post_nms_top_n_train=1000,
    )


def make_batch(batch: int, size: int, device: torch.device = CPU) -> tuple[Tensor, list[Target]]:
    """Return random images and boxes of a quarter of their side and more."""
    corners = torch.rand(batch, OBJECTS, 2, device=device) * size / 2
    sides = size / 4 * (1 + torch.rand(batch, OBJECTS, 2, device=device))
    boxes = torch.cat((corners, corners + sides), dim=2)
    labels = torch.randint(CLASSES, (batch, OBJECTS), device=device)
    targets = [Target(k, (size, size), (size, size), boxes[k], labels[k]) for k in range(batch)]
    return torch.rand(batch, 3, size, size, device=device), targets


def arrange(network: nn.Module, images: Tensor, targets: list[Target], layout: torch.memory_format) -> tuple[Any, Any]:
    """Return what a detector takes: a batch and its targets, or lists."""
    if isinstance(network, FasterRCNN):
        return list(images), [{"boxes": target.boxes, "labels": target.labels + 1} for target in targets]
    return images.contiguous(memory_format=layout), targets


def count_kept(network: nn.Module, images: Any, targets: Any) -> float:
    """Return the MiB of the tensors, parameters aside, that a training step's forward pass keeps."""
    parameters = {p.untyped_storage().data_ptr() for p in network.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        losses = network(images, targets)
    del losses
    return sum(kept.values()) / 2**20


def bench_step(batch: int, size: int, device: torch.device = CPU) -> tuple[dict[str, Round], dict[str, float]]:
    """A training step with SGD, and the MiB that it keeps."""
    images, targets = make_batch(batch, size, device)
    networks = {"ours": (place(build_rcnn("resnest50", CLASSES, norm="bn"), device), torch.channels_last)}
    networks |= {name: (build_other(size).to(device, memory_format=layout), layout) for name, layout in OTHERS.items()}
    rounds: dict[str, Round] = {}
    kept: dict[str, float] = {}
    for name, (network, layout) in networks.items():
        x, wanted = arrange(network.train(), images, targets, layout)
        trained = [p for p in network.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(trained, 1e-4, 0.9, weight_decay=1e-4, fused=True)

        def step(
            network: nn.Module = network, x: Any = x, wanted: Any = wanted, optimizer: torch.optim.SGD = optimizer
        ) -> float:
            torch.manual_seed(0)
            with clock(device) as seconds:
                optimizer.zero_grad(set_to_none=True)
                sum(network(x, wanted).values()).backward()
                optimizer.step()
            return seconds[0]

        kept[name] = count_kept(network, x, wanted)
        rounds[name] = step
    return rounds, kept


def bench_evaluation(batch: int, size: int) -> dict[str, Round]:
    """Detections of images."""
    images, targets = make_batch(batch, size)
    network = fold_batch_norms(place(build_rcnn("resnest50", CLASSES, norm="bn"), CPU))
    networks = {"ours": (network, torch.channels_last)}
    networks |= {name: (build_other(size).eval().to(memory_format=layout), layout) for name, layout in OTHERS.items()}
    rounds: dict[str, Round] = {}
    for name, (network, layout) in networks.items():
        x, _ = arrange(network, images, targets, layout)
        second = [None if name != "ours" else [target.size for target in targets]]

        def evaluate(network: nn.Module = network, x: Any = x, second: list[Any] = second) -> float:
            with clock(CPU) as seconds, torch.no_grad():
                network(x, *second)
            return seconds[0]

        rounds[name] = evaluate
    return rounds


def describe_arithmetic(size: int) -> str:
    """Return the multiply-adds of an image, and those of torchvision's fasterrcnn_resnet50_fpn_v2."""
    ours = sum(cost.multiply_adds for cost in count_rcnn("resnest50", CLASSES, (size, size), norm="bn")) / 1e9
    other = count_rcnn("resnet50", CLASSES + 11, (size, size), norm="bn", rpn_convs=2)
    torchvisions = sum(cost.multiply_adds for cost in other) / 1e9
    return (
        f"Multiply-adds of an image of {size} x {size} with 1000 proposals: {ours:.1f} billion; those of torchvision's "
        f"fasterrcnn_resnet50_fpn_v2 {torchvisions:.1f} billion, a ratio of {torchvisions / ours:.2f}."
    )


def report(result: dict) -> str:
    """Return docs/performance_detection.md."""
    text = [
        "Made by `make bench-detection` (tools/benchmarks/bench_detection.py): Faster R-CNN on ResNeSt-50 with a",
        f"feature pyramid, {CLASSES} classes, against torchvision's FasterRCNN of the same layers on timm's,",
        "interleaved rounds in one process. A ratio is the competitor's time over ours, above 1 ours is faster: the",
        "median of the rounds, and their range. `kept` is what a forward pass and its losses keep for the backward",
        "pass.",
        "",
        result["arithmetic"],
    ]
    lines = begin_page("Speed of detection, side by side", text, result["machine"])
    for part in result["parts"]:
        lines += report_part(part)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--part", choices=("step", "evaluation"), nargs="+", default=["step", "evaluation"])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--report", type=Path)
    args = parser.parse_args()
    if args.report:
        print(report(json.loads(args.report.read_text())), end="")
        return
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    torch.manual_seed(0)
    result: dict = {"machine": describe_machine(CPU), "arithmetic": describe_arithmetic(args.size), "parts": []}
    size = f"batch {args.batch}, {args.size} x {args.size}, fp32"
    if "step" in args.part:
        rounds, kept = bench_step(args.batch, args.size)
        seconds = measure(rounds, args.rounds)
        part = {"title": f"Training step of Faster R-CNN, {size}", "seconds": seconds, "kept": kept}
        result["parts"].append(part | {"profile": in_percent(profile_steps(rounds, CPU))})
        del rounds
    if "evaluation" in args.part:
        seconds = measure(bench_evaluation(args.batch, args.size), args.rounds)
        result["parts"].append(
            {"title": f"Evaluation of Faster R-CNN, {size}", "seconds": seconds, "kept": {}, "profile": {}}
        )
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(report(result))


if __name__ == "__main__":
    main()
