"""Measures how long networks take, side by side on this machine."""

import statistics
import time

import torch
from torch import nn

from resnest_imagenet.compute import autocast, place
from resnest_imagenet.models.folding import fold_batch_norms

WARM_UP = 2  # rounds that are not timed: they allocate memory and choose kernels


@torch.inference_mode()
def measure_latency(
    networks: dict[str, nn.Module],
    crop: int,
    batch_size: int,
    device: torch.device,
    rounds: int,
    precision: str = "fp32",
) -> dict[str, float]:
    """Return the median seconds that each network takes for a batch that is on the device already.

    Rounds are interleaved, so that a busy machine slows all networks alike. Networks run as in `resnest-predict`: in
    channels_last, with batch norms folded into the convolutions.

    Args:
        networks: by name; they are copied, not changed.
        crop: side of the images in pixels.
        batch_size: images at a time.
        device: of the computation.
        rounds: every network runs once in each round.
        precision: "fp32", "bf16" or "fp16".
    """
    prepared = {name: place(fold_batch_norms(network), device) for name, network in networks.items()}
    images = torch.randn(batch_size, 3, crop, crop, device=device).contiguous(memory_format=torch.channels_last)
    seconds: dict[str, list[float]] = {name: [] for name in networks}
    for _ in range(WARM_UP + rounds):
        for name, network in prepared.items():
            _synchronise(device)
            started = time.perf_counter()
            with autocast(device, precision):
                network(images)
            _synchronise(device)
            seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(times[WARM_UP:]) for name, times in seconds.items()}


def _synchronise(device: torch.device) -> None:
    """Wait for the device, so that its computations are timed and not only their launch."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
