"""A whole training step of ResNeSt-50, ours against timm's, with the same weights and the same images.

Rounds are interleaved; the figure is the median over rounds, the spread the range of the rounds. Before anything is
timed the two losses are compared.

python tools/bench_step.py [--batch 8] [--crop 224] [--rounds 5] [--precision fp32] [--device cpu] [--out FILE.json]
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resnest_imagenet import build_model
from resnest_imagenet.compute import autocast, place


def make_step(model: nn.Module, images: Tensor, labels: Tensor, precision: str) -> Callable[[], Tensor]:
    """Return a function that takes one SGD step and returns its loss."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9, nesterov=True, weight_decay=1e-4)

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        with autocast(images.device, precision):
            loss = F.cross_entropy(model(images).float(), labels)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def time_step(step: Callable[[], Tensor], steps: int) -> float:
    """Return seconds per step; reading the loss waits for the device."""
    started = time.perf_counter()
    for _ in range(steps):
        loss = step()
    float(loss)
    return (time.perf_counter() - started) / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--crop", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=1, help="per round")
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="fp32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()

    device = torch.device(args.device)
    torch.manual_seed(0)
    weights = build_model("resnest50").state_dict()
    networks = {
        "ours, channels_last": place(build_model("resnest50"), device),
        "timm, NCHW": timm.create_model("resnest50d").to(device),
        "timm, channels_last": place(timm.create_model("resnest50d"), device),
    }
    images, labels = torch.randn(args.batch, 3, args.crop, args.crop), torch.randint(1000, (args.batch,))
    steps, losses = {}, {}
    for name, network in networks.items():
        network.load_state_dict(weights)
        layout = torch.contiguous_format if "NCHW" in name else torch.channels_last
        batch = images.to(device, memory_format=layout)
        steps[name] = make_step(network, batch, labels.to(device), args.precision)
        losses[name] = float(steps[name]())  # also warms up
    spread = max(losses.values()) - min(losses.values())
    assert spread < (1e-3 if args.precision == "fp32" else 0.1), losses

    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(args.rounds):
        for name, step in steps.items():
            seconds[name].append(time_step(step, args.steps))
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    reference = medians["ours, channels_last"]
    print(
        f"ResNeSt-50, batch {args.batch}, crop {args.crop}, {args.precision}, {device.type}, torch {torch.__version__}"
    )
    print(f"{'':<22}{'ours is faster by':>18}{'rounds':>20}")
    for name, values in seconds.items():
        ratios = [other / ours for other, ours in zip(values, seconds["ours, channels_last"], strict=True)]
        print(f"{name:<22}{medians[name] / reference:>18.2f}{f'{min(ratios):.2f} to {max(ratios):.2f}':>20}")
    if device.type == "cuda":
        for name, median in medians.items():
            print(f"{name:<22}{args.batch / median:>12.0f} images/s")
    if args.out:
        args.out.write_text(json.dumps({"arguments": vars(args), "seconds_per_step": seconds}, default=str, indent=2))


if __name__ == "__main__":
    main()
