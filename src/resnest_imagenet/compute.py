"""How a network computes: where, in which memory layout, in which number format."""

import ctypes
import platform

import torch
from torch import nn

from resnest_imagenet.errors import ConfigError

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def place(model: nn.Module, device: torch.device) -> nn.Module:
    """Move a model to a device, its convolution weights in channels_last."""
    return model.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload] # torch's stub lacks it


def get_dtype(precision: str) -> torch.dtype:
    """Return the type of a network's activations in fp32, bf16 or fp16.

    Raises:
        ConfigError: another precision.
    """
    if precision not in _DTYPES:
        raise ConfigError(f"precision={precision!r}: {', '.join(_DTYPES)} are valid")
    return _DTYPES[precision]


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Return the autocast context of fp32 (off), bf16 or fp16 on a device.

    Raises:
        ConfigError: another precision.
    """
    dtype = get_dtype(precision)
    is_mixed = dtype != torch.float32
    return torch.autocast(device.type, dtype=dtype if is_mixed else None, enabled=is_mixed)


def keep_freed_memory() -> None:
    """On a CPU, make malloc keep freed memory: the next step needs as much again.

    Otherwise the memory returns to the system and comes back page by page, each filled with zeros: that costs some
    percent of a step.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc has it
    if set_option is not None:
        for option in (-1, -3):  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD: never
            set_option(option, 2**31 - 1)


def name_device(device: torch.device) -> str:
    """Return what determines the order of additions: the GPU's name, or a CPU's instructions and threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "mps":
        return f"{platform.machine()} MPS, macOS {platform.mac_ver()[0]}"
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
