"""The costs of networks: counted, and timed on this machine."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from resnest_imagenet.compute import autocast, keep_freed_memory, name_device
from resnest_imagenet.distributed import choose_device
from resnest_imagenet.evaluation.latency import measure_latency
from resnest_imagenet.models.batch import require_batch
from resnest_imagenet.models.cost import StageCost, count_kept, count_stages
from resnest_imagenet.models.zoo import build_model, require_model


@dataclass(frozen=True)
class NetworkCost:
    """The costs of one network.

    Attributes:
        model: its name.
        stages: for one image.
        training_bytes: memory of a training step by use: "parameters", "gradients" and "momentum" in float32, and
            "kept", which the forward pass of a batch saves for the backward pass (`count_kept`). The backward pass's
            own tensors, the libraries' workspaces and the allocator's rounding are not counted.
        seconds: median latency by batch size; empty if it was not measured.
    """

    model: str
    stages: list[StageCost]
    training_bytes: dict[str, int]
    seconds: dict[int, float]


@dataclass(frozen=True)
class CostReport:
    """The costs of several networks, with the conditions of the measurement.

    Attributes:
        crop: side of the images in pixels.
        batch_size: of the training step whose memory is counted, and of the second latency.
        precision: fp32, bf16 or fp16.
        rounds: of the latencies' measurement.
        device_type: cpu, cuda or mps.
        device: in words.
        networks: their costs.
    """

    crop: int
    batch_size: int
    precision: str
    rounds: int
    device_type: str
    device: str
    networks: list[NetworkCost]


def describe_networks(
    models: Sequence[str],
    crop: int = 224,
    batch_size: int = 32,
    *,
    precision: str = "fp32",
    device: str = "auto",
    latency: bool = True,
    rounds: int = 10,
) -> CostReport:
    """Count the costs of networks; measure their latency if `latency` is true.

    Args:
        models: names of networks; each is described once.
        crop: side of the images in pixels.
        batch_size: of the training step whose memory is counted, and of the second latency.
        precision: fp32, bf16 or fp16.
        device: of the step and of the latency: as of `distributed.choose_device`.
        latency: whether to measure it.
        rounds: of its measurement.

    Raises:
        ConfigError: a network is unknown, the batch is too small for it, or there is no such device.
    """
    names = list(dict.fromkeys(models))
    for name in names:
        require_model(name)
        require_batch(name, batch_size, crop, "batch_size")
    timed_on = choose_device(device)
    seconds: dict[int, dict[str, float]] = {}
    if latency:
        keep_freed_memory()
        networks = {name: build_model(name) for name in names}
        for size in (1, batch_size):
            seconds[size] = measure_latency(networks, crop, size, timed_on, rounds, precision)
    costs = []
    for name in names:
        stages = count_stages(name, crop)
        with autocast(timed_on, precision):
            kept_bytes = count_kept(name, crop, batch_size, timed_on)
        weights = 4 * sum(stage.parameters for stage in stages)
        training_bytes = {"parameters": weights, "gradients": weights, "momentum": weights, "kept": kept_bytes}
        of_network = {size: of_batch[name] for size, of_batch in seconds.items()}
        costs.append(NetworkCost(name, stages, training_bytes, of_network))
    return CostReport(crop, batch_size, precision, rounds, timed_on.type, name_device(timed_on), costs)


def format_costs(report: CostReport, form: str = "text") -> str:
    """Return the costs as "text" for people, or as "json"."""
    if form == "json":
        return json.dumps(asdict(report), indent=1)
    return "\n\n".join([*(_format_cost(cost, report) for cost in report.networks), _explain(report)])


def _format_cost(cost: NetworkCost, report: CostReport) -> str:
    """Return a network's stages as a table, its training memory and its latency."""
    row = "{:<7} {:>12} {:>12} {:>16} {:>13}".format
    lines = [f"{cost.model} at {report.crop} pixels, 1000 classes"]
    lines.append(row("stage", "output", "parameters", "multiply-adds", "activations"))
    figures = [(stage.parameters, stage.multiply_adds, stage.activations) for stage in cost.stages]
    for stage, counts in zip(cost.stages, figures, strict=True):
        lines.append(row(stage.stage, "x".join(map(str, stage.output)), *(f"{count:,}" for count in counts)))
    lines.append(row("total", "", *(f"{sum(counts):,}" for counts in zip(*figures, strict=True))))
    mebibytes = {use: count / 2**20 for use, count in cost.training_bytes.items()}
    parts = " + ".join(f"{use} {size:,.0f}" for use, size in mebibytes.items())
    total = sum(mebibytes.values())
    lines.append(f"training, batch {report.batch_size}, {report.precision}: {total:,.0f} MiB = {parts}")
    for batch_size, seconds in cost.seconds.items():
        lines.append(f"latency, batch {batch_size}: {1000 * seconds:.4g} ms, {batch_size / seconds:.4g} images/s")
    return "\n".join(lines)


def _explain(report: CostReport) -> str:
    """Return a legend of the figures."""
    lines = [
        "multiply-adds: of convolutions and fc, plus one for each activation that a batch norm scales",
        "activations: elements of all convolutions' outputs (Radosavovic et al. 2020)",
        f"training: SGD; kept: saved by the forward pass for the backward pass, on {report.device_type}. Not counted:",
        "  the backward pass's own tensors, and the libraries' workspaces",
    ]
    if any(cost.seconds for cost in report.networks):
        how = f"{report.precision}, batch norms folded, the median of {report.rounds} interleaved rounds"
        lines.append(f"latency: {report.device}, {how}")
    return "\n".join(lines)
