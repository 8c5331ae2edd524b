"""The operators of a device that must prove themselves before they are used: split attention's kernels, DALI's decoder.

Each is tried once in a process for each case. All ranks take part, and all choose the same.
"""

import sys
from dataclasses import dataclass
from typing import Any

from torch import nn

from resnest_imagenet.compute import get_dtype, name_device
from resnest_imagenet.data.decoders import refuse_gpu_decoder
from resnest_imagenet.data.loader import choose_loader
from resnest_imagenet.data.source import ImageSource
from resnest_imagenet.distributed import Ranks, gather_objects
from resnest_imagenet.models.proving import Finding, needs_proof, try_fused, use_implementation
from resnest_imagenet.models.split_attention import Implementation

_findings: dict[tuple[Any, ...], Finding] = {}
_decoders: dict[tuple[Any, ...], str | None] = {}


@dataclass(frozen=True)
class Choice:
    """Which operator is used, and why.

    Attributes:
        used: its name: "fused" or "reference"; "gpu" or "cpu".
        details: of the trial, for environment.json.
    """

    used: str
    details: dict[str, Any]

    def describe(self) -> dict[str, Any]:
        """Return what environment.json has of it."""
        return {"used": self.used, **self.details}


def choose_attention(
    network: nn.Module,
    size: tuple[int, int, int],
    precision: str,
    ranks: Ranks,
    option: Implementation = "auto",
    kept: str | None = None,
    trains: bool = False,
    is_timed: bool = True,
) -> Choice | None:
    """Choose how the split attention of a network is computed on its device, and let the network do so.

    With option=auto, kernels other than torch's are compared with the formula, and timed. All ranks use the formula if
    the kernels fail on one. A line reports that.

    Args:
        network: on its device.
        size: images at a time, height and width in pixels.
        precision: fp32, bf16 or fp16.
        ranks: that compute with it; all call this.
        option: "fused" or "reference" is used without a trial.
        kept: "fused" or "reference": what a resumed run has used so far on this device. The formula then stays, and
            the kernels are compared, not timed.
        trains: whether the network is trained.
        is_timed: whether kernels that are slower than the formula are refused.

    Returns:
        The choice; None where there is nothing to choose, as on a CPU.

    Raises:
        ConfigError: the kernels have broken the device for this process.
    """
    if option != "auto":
        use_implementation(network, option)
        return None
    if not needs_proof(network, ranks.device):
        return None
    if kept == "reference":
        use_implementation(network, "reference")
        return Choice("reference", {"reason": "the run has used the formula so far"})
    case = (ranks.device, precision, size, trains, kept is None and is_timed, _name_shapes(network))
    if case not in _findings:
        dtype = get_dtype(precision)
        _findings[case] = try_fused(network, size, ranks.device, dtype, trains, kept is None and is_timed)
    finding = _findings[case]
    fault = _share(finding.fault, ranks)
    details = {"ratio": finding.ratio, "seconds": round(finding.seconds, 3)}
    if fault is None:
        return Choice("fused", details)
    use_implementation(network, "reference")
    _report(ranks, f"split attention: the fused operator {fault}; the formula is used (model.split_attention)")
    return Choice("reference", {"reason": fault, **details})


def choose_for_inference(
    network: nn.Module,
    size: tuple[int, int, int],
    precision: str,
    images: ImageSource | None = None,
    loader: str = "torchvision",
    needs_gradients: bool = False,
) -> None:
    """Choose the operators of one process that predicts, before it computes.

    Args:
        network: see `choose_attention`.
        size: see `choose_attention`.
        precision: fp32, bf16 or fp16.
        images: that a loader decodes; None: there is no loader.
        loader: auto, dali or torchvision.
        needs_gradients: whether gradients are computed too.
    """
    alone = Ranks(0, 1, 0, next(network.parameters()).device)
    choose_attention(network, size, precision, alone, trains=needs_gradients)
    if images is not None:
        choose_gpu_decoder(images, loader, alone)


def choose_gpu_decoder(images: ImageSource, loader: str, ranks: Ranks, decoded_on_cpu: bool = False) -> Choice | None:
    """Choose whether DALI decodes on a GPU, by some images of a set; loaders on that device then do so.

    All ranks decode on the CPU if one of them has to. A line reports that.

    Args:
        images: the set.
        loader: auto, dali or torchvision.
        ranks: whose loaders decode; all call this.
        decoded_on_cpu: whether a resumed run has decoded on the CPU so far on this device; then it continues to.

    Returns:
        The choice; None where there is nothing to choose, as on a CPU.
    """
    if ranks.device.type != "cuda" or choose_loader(loader) != "dali":
        return None
    if decoded_on_cpu:
        refuse_gpu_decoder(ranks.device)
        return Choice("cpu", {"reason": "the run has decoded on the CPU so far"})
    case = (ranks.device, str(images.root), len(images))
    if case not in _decoders:
        from resnest_imagenet.data.dali_decoding import compare_decoders, find_jpegs

        _decoders[case] = compare_decoders(find_jpegs(images), ranks.device)
    fault = _share(_decoders[case], ranks)
    refuse_gpu_decoder(ranks.device, fault is not None)
    if fault is None:
        return Choice("gpu", {})
    _report(ranks, f"DALI: the GPU's decoder {fault}; images are decoded on the CPU")
    return Choice("cpu", {"reason": fault})


def _share(fault: str | None, ranks: Ranks) -> str | None:
    """Return the fault of the first rank that has one, with its device; None if no rank has one."""
    faults = gather_objects(None if fault is None else f"{fault} on {name_device(ranks.device)}", ranks)
    return next((text for text in faults if text is not None), None)


def _report(ranks: Ranks, line: str) -> None:
    if ranks.is_main:
        print(line, file=sys.stderr, flush=True)


def _name_shapes(network: nn.Module) -> int:
    """Return a number that is the same for networks of the same parameters' shapes."""
    return hash(tuple((name, tuple(parameter.shape)) for name, parameter in network.named_parameters()))
