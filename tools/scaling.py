"""The arithmetic of docs/scaling.md: training on 64 to 512 GPUs. Everything is computed, nothing is timed.

python tools/scaling.py [docs/scaling.md]     prints the tables, and puts them in the document
"""

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from hydra import compose, initialize_config_dir
from torch import Tensor, nn

from resnest_imagenet.commands.launch import check_config, find_conf
from resnest_imagenet.config import TrainConfig
from resnest_imagenet.models.cost import count_cost
from resnest_imagenet.models.zoo import build_model
from resnest_imagenet.training.schedule import StepPlan, plan_steps

GPUS, PER_NODE = (64, 128, 256, 512), 8
IMAGES, TAR_BYTES = 1_281_167, 147_897_477_120  # of ImageNet's training archive
BUCKETS = (1 << 20, 25 << 20)  # DDP closes a bucket that has reached this: the first, the others
# Published images per second and GPU. A: NVIDIA's ResNet-50 on one A100 (AMP, DALI), scaled by multiply-adds. B: timm's
# resnest50d, and resnest101e at 256 pixels, scaled by pixels, on an RTX 3090 (AMP, NCHW).
A100_RESNET50, RTX3090 = 2470, {"resnest50": 534.66, "resnest101": 253.9 * (256 / 224) ** 2}
# Assumptions, in seconds and bytes.
BACKWARD = 2 / 3  # of a step's computing
GBIT, NVLINK = 0.8e9 / 8, 150e9  # usable per second: of each Gbit/s of a node's links; by each GPU inside its node
HOP, NVLINK_HOP, RESTART, DISK = 10e-6, 3e-6, 120, 1e9  # DISK: bytes of a checkpoint per second
LINKS = {"100 per node": 100, "200 per node": 200, "400 per node": 400, "200 per GPU": 1600, "400 per GPU": 3200}
NODE_MTBF = 54 * 86400 * 2048 / 419  # Llama 3's: 419 unexpected interruptions of 2048 nodes in 54 days


@dataclass(frozen=True)
class Network:
    """A network under its recipe; sizes in bytes."""

    name: str
    gradients: int
    buffers: int
    scenarios: list[tuple[float, int]]  # A and B: images per second and GPU, links of a node
    buckets: list[tuple[float, int]]  # the share of the backward pass after which it is ready, size
    plan: StepPlan

    def step(self, gpus: int, speed: float, gbits: int) -> tuple[float, float]:
        """Return the seconds of a step's computing, and of the communication that it does not hide."""
        compute, end = self.plan.global_batch / gpus / speed, 0.0
        for ready, size in self.buckets:
            end = max(end, compute * (1 - BACKWARD + BACKWARD * ready)) + all_reduce(size, gpus, gbits)
        # After the backward pass the ranks agree whether to apply the step: the GPUs wait for it, the hosts do not.
        return compute, end - compute + all_reduce(8 * gpus, gpus, gbits)


def all_reduce(size: int, gpus: int, gbits: int) -> float:
    """Return seconds: sums over NVLink inside the nodes, between them a ring for each GPU's share, and back."""
    nodes, inside, between = gpus // PER_NODE, 2 * (PER_NODE - 1), 2 * (gpus // PER_NODE - 1)
    return between * (size / nodes / (gbits * GBIT) + HOP) + inside * (size / PER_NODE / NVLINK + NVLINK_HOP)


def read_network(name: str) -> Network:
    """Count a network without memory; its gradients are ready in the reverse order of the forward pass."""
    with torch.device("meta"):
        model, image = build_model(name).eval(), torch.empty(1, 3, 224, 224)
    layers: list[tuple[int, int]] = []  # multiply-adds, bytes of the gradients

    def note(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        work = output.numel() * next(module.parameters())[0].numel()  # once for each output of a BN
        layers.append((work, 4 * sum(p.numel() for p in module.parameters())))

    for module in model.modules():
        if not list(module.children()) and list(module.parameters()):
            module.register_forward_hook(note)
    model(image)
    parameters, total = count_cost(name, 224)
    assert [sum(column) for column in zip(*layers, strict=True)] == [total, 4 * parameters]
    buckets, done, size = list[tuple[float, int]](), 0, 0
    for work, gradients in reversed(layers):
        done, size = done + work, size + gradients
        if size >= BUCKETS[bool(buckets)] or done == total:
            buckets, size = [*buckets, (done / total, size)], 0
    with initialize_config_dir(str(find_conf()), version_base="1.3"):
        config = check_config(compose("train", [f"+experiment={name}", "data.root=/imagenet"]), TrainConfig)
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    scenarios = [(A100_RESNET50 * count_cost("resnet50", 224)[1] / total, 1600), (RTX3090[name], 100)]
    return Network(name, 4 * parameters, buffers, scenarios, buckets, plan_steps(IMAGES, config.train, GPUS[0]))


def show(form: str, values: list[float]) -> str:
    return " / ".join(f"{value:{form}}" for value in values)


def make_tables(networks: list[Network], decoded: list[float]) -> dict[str, list[str]]:
    """Return the rows of the document's tables, the header first; `decoded`: images per second and core."""
    tables = {
        "batch": ["model | global batch | peak LR | steps per epoch | per run | left out | 64 GPUs | 128 | 256 | 512"],
        "network": ["model | gradients MB | buckets MB | buffers kB | checkpoint MB | with a moving average"],
        "ring": [f"model | GPUs | MB sent per GPU | {' | '.join(LINKS)}"],
        "overlap": [f"model | GPUs | computing ms | {' | '.join(LINKS)}"],
        "loader": ["model | images/s | MB/s | GB/s of 64 nodes | cores: torchvision | DALI | DALI, no policy"],
        "run": ["model | GPUs | epoch s | run h | saving % | Young's s | lost s"],
    }
    for net in networks:
        plan, saved = net.plan, 2 * net.gradients + net.buffers  # weights, momentum, buffers
        row = f"{net.name} | {plan.global_batch} | {plan.peak_lr:g} | {plan.steps_per_epoch} | {plan.total_steps:,}"
        row += f" | {IMAGES % plan.global_batch:,} | "
        tables["batch"].append(row + " | ".join(f"{plan.global_batch / gpus:g}" for gpus in GPUS))
        row = f"{net.name} | {net.gradients / 1e6:.1f} | " + " + ".join(f"{size / 1e6:.1f}" for _, size in net.buckets)
        more = (saved + net.gradients + net.buffers) / 1e6
        tables["network"].append(f"{row} | {net.buffers / 1e3:.0f} | {saved / 1e6:.1f} | {more:.1f}")
        for gpus in (GPUS[0], GPUS[-1]):
            times = " | ".join(f"{1e3 * all_reduce(net.gradients, gpus, link):.1f} ms" for link in LINKS.values())
            tables["ring"].append(f"{net.name} | {gpus} | {2e-6 * (gpus - 1) / gpus * net.gradients:.1f} | {times}")
        epochs, saving, speeds = plan.total_steps // plan.steps_per_epoch, saved / DISK, [s for s, _ in net.scenarios]
        for gpus in GPUS:
            row = f"{net.name} | {gpus} | " + show(".1f", [1e3 * net.step(gpus, speed, 100)[0] for speed in speeds])
            for link in LINKS.values():
                pairs = [net.step(gpus, speed, link) for speed in speeds]
                row += f" | {show('.1f', [1e3 * r for _, r in pairs])} ms, "
                row += f"{show('.0f', [100 * c / (c + r) for c, r in pairs])} %"
            tables["overlap"].append(row)
            epoch = [plan.steps_per_epoch * sum(net.step(gpus, *scenario)) + saving for scenario in net.scenarios]
            mtbf = NODE_MTBF * PER_NODE / gpus
            row = f"{net.name} | {gpus} | {show('.1f', epoch)} | {show('.2f', [epochs * e / 3600 for e in epoch])}"
            row += f" | {show('.1f', [100 * saving / e for e in epoch])} | {(2 * saving * mtbf) ** 0.5:.0f}"
            tables["run"].append(f"{row} | {show('.2f', [epochs * e / mtbf * (e / 2 + RESTART) for e in epoch])}")
        nodes, image = [PER_NODE * speed for speed in speeds], TAR_BYTES / IMAGES
        reads = [n * image / 1e6 for n in nodes]
        row = f"{net.name} | {show(',.0f', nodes)} | {show(',.0f', reads)} | {show('.1f', [0.064 * r for r in reads])}"
        tables["loader"].append(" | ".join([row, *(show(".0f", [n / rate for n in nodes]) for rate in decoded)]))
    return tables


def main() -> None:
    loaders = json.loads((Path(__file__).parents[1] / "docs" / "data_speed.json").read_text())["loaders"]
    names = ("torchvision, recipe=resnest", "DALI, recipe=resnest", "DALI")
    decoded = [median(loaders[f"ours, {name}"]["images_per_second"]) / 2 for name in names]  # on 2 cores
    for name, rows in make_tables([read_network(name) for name in RTX3090], decoded).items():
        text = f"| {rows[0]} |\n|---{'|---:' * rows[0].count(' | ')}|\n" + "".join(f"| {row} |\n" for row in rows[1:])
        print(f"<!-- {name} -->\n{text}")
        for document in map(Path, sys.argv[1:]):
            document.write_text(re.sub(rf"(<!-- {name} -->\n)(\|.*\n)*", rf"\g<1>{text}", document.read_text()))


if __name__ == "__main__":
    main()
