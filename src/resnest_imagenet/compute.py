"""How a network computes: where, in which memory layout, in which number format."""

import torch
from torch import nn

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def place(model: nn.Module, device: torch.device) -> nn.Module:
    """Move a model to a device, its convolution weights in channels_last."""
    return model.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload] # torch's stub lacks it


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Return the autocast context of fp32 (off), bf16 or fp16 on a device."""
    return torch.autocast(device.type, dtype=_DTYPES.get(precision), enabled=precision in _DTYPES)
