"""Which of DALI's decoders decodes for a device of this process: on a GPU the GPU's, unless it was refused."""

from typing import Literal

import torch

# cpu: on the CPU, where the images stay; mixed: on the GPU; copied: on the CPU, then copied to the GPU.
Decoder = Literal["cpu", "mixed", "copied"]

_refused: set[torch.device] = set()


def choose_decoder(device: torch.device) -> Decoder:
    """Return the decoder of DALI's pipelines whose batches are on a device."""
    if device.type != "cuda":
        return "cpu"
    return "copied" if device in _refused else "mixed"


def refuse_gpu_decoder(device: torch.device, is_refused: bool = True) -> None:
    """Let the CPU decode the images of a GPU in pipelines that are built from here on, or allow the GPU's decoder."""
    if is_refused:
        _refused.add(device)
    else:
        _refused.discard(device)
