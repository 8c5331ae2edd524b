"""What networks cost: counted, and timed on this machine."""

import json
from dataclasses import asdict, dataclass

import torch

from resnest_imagenet.compute import autocast, keep_freed_memory, name_device
from resnest_imagenet.config import InfoConfig
from resnest_imagenet.distributed import choose_device
from resnest_imagenet.evaluation.latency import measure_latency
from resnest_imagenet.models.batch import require_batch
from resnest_imagenet.models.cost import StageCost, count_kept, count_stages
from resnest_imagenet.models.zoo import build_model, require_model


@dataclass(frozen=True)
class NetworkCost:
    """What one network costs.

    Attributes:
        model: its name.
        stages: for one image.
        training_bytes: by use, of a training step: "parameters", "gradients" and "momentum" in float32, and "kept",
            what the forward pass of a batch leaves for the backward pass (`count_kept`). The backward pass's own
            tensors, the libraries' workspaces and the allocator's rounding are not among them.
        seconds: median latency by batch size; empty where it was not measured.
    """

    model: str
    stages: list[StageCost]
    training_bytes: dict[str, int]
    seconds: dict[int, float]


def describe_networks(config: InfoConfig) -> tuple[list[NetworkCost], str]:
    """Count, and measure if asked to; return the networks' costs and the name of the device that timed them.

    Raises:
        ConfigError: an unknown network, or no such device.
    """
    names = list(dict.fromkeys(config.models or ([config.model.name] if config.model else [])))
    for name in names:
        require_model(name)
        require_batch(name, config.batch_size, config.crop, "batch_size")
    device = choose_device(config.device)
    seconds: dict[int, dict[str, float]] = {}
    if config.latency:
        keep_freed_memory()
        networks = {name: build_model(name) for name in names}
        for batch_size in (1, config.batch_size):
            seconds[batch_size] = measure_latency(
                networks, config.crop, batch_size, device, config.rounds, config.precision
            )
    costs = []
    for name in names:
        stages = count_stages(name, config.crop)
        with autocast(torch.device("cpu"), config.precision):
            kept = count_kept(name, config.crop, config.batch_size)
        weights = 4 * sum(stage.parameters for stage in stages)
        training_bytes = {"parameters": weights, "gradients": weights, "momentum": weights, "kept": kept}
        latency = {batch_size: of_batch[name] for batch_size, of_batch in seconds.items()}
        costs.append(NetworkCost(name, stages, training_bytes, latency))
    return costs, name_device(device)


def format_costs(costs: list[NetworkCost], device: str, config: InfoConfig) -> str:
    """Return the costs as text for people, or as JSON."""
    if config.format == "json":
        values = config.model_dump(include={"crop", "batch_size", "precision", "rounds"})
        return json.dumps({**values, "device": device, "networks": [asdict(each) for each in costs]}, indent=1)
    return "\n\n".join([*(_format_cost(each, config) for each in costs), _explain(config, device)])


def _format_cost(cost: NetworkCost, config: InfoConfig) -> str:
    """Return a network's stages as a table, its training memory and its latency."""
    row = "{:<7} {:>12} {:>12} {:>16} {:>13}".format
    lines = [f"{cost.model} at {config.crop} pixels, 1000 classes"]
    lines.append(row("stage", "output", "parameters", "multiply-adds", "activations"))
    figures = [(stage.parameters, stage.multiply_adds, stage.activations) for stage in cost.stages]
    for stage, counts in zip(cost.stages, figures, strict=True):
        lines.append(row(stage.stage, "x".join(map(str, stage.output)), *(f"{count:,}" for count in counts)))
    lines.append(row("total", "", *(f"{sum(counts):,}" for counts in zip(*figures, strict=True))))
    mebibytes = {use: count / 2**20 for use, count in cost.training_bytes.items()}
    parts = " + ".join(f"{use} {size:,.0f}" for use, size in mebibytes.items())
    total = sum(mebibytes.values())
    lines.append(f"training, batch {config.batch_size}, {config.precision}: {total:,.0f} MiB = {parts}")
    for batch_size, seconds in cost.seconds.items():
        lines.append(f"latency, batch {batch_size}: {1000 * seconds:.4g} ms, {batch_size / seconds:.4g} images/s")
    return "\n".join(lines)


def _explain(config: InfoConfig, device: str) -> str:
    """Say what the figures are."""
    lines = [
        "multiply-adds: of convolutions and fc, and one for each activation that a batch norm scales",
        "activations: elements of all convolutions' outputs (Radosavovic et al. 2020)",
        "training: SGD; kept: what the forward pass leaves for the backward pass, on a CPU. Not counted: the backward",
        "  pass's own tensors, and the libraries' workspaces",
    ]
    if config.latency:
        how = f"{config.precision}, batch norms folded, the median of {config.rounds} interleaved rounds"
        lines.append(f"latency: {device}, {how}")
    return "\n".join(lines)
