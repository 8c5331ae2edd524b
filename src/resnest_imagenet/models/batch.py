"""The smallest batch that a network can be trained on."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from resnest_imagenet.errors import ConfigError
from resnest_imagenet.models.zoo import build_model


def smallest_batch(model: nn.Module, crop: int) -> int:
    """Return how many images per rank a training step of a network needs.

    2 if a batch norm in training mode gets a single value per image and channel, as in split attention, in selective
    kernels, or in the last stage with images of 32 pixels; else 1. Frozen batch norms need no batch, and synchronised
    ones use the batch of all ranks.

    Args:
        model: maps images (B, 3, H, W) to anything; its norms must be in the modes in which it is trained.
        crop: side of the images in pixels.
    """
    network = copy.deepcopy(model).to("meta")
    single: list[nn.Module] = []

    def check(norm: nn.Module, inputs: tuple[Tensor]) -> None:
        if norm.training and inputs[0].numel() == inputs[0].shape[0] * inputs[0].shape[1]:
            single.append(norm)

    for module in network.modules():
        if isinstance(module, nn.SyncBatchNorm):
            module.eval()  # in training it takes accelerators only
        elif isinstance(module, _BatchNorm):
            module.register_forward_pre_hook(check)
    with torch.no_grad():
        network(torch.empty(2, 3, crop, crop, device="meta"))
    return 2 if single else 1


def require_batch(
    name: str,
    batch_size: int,
    crop: int,
    option: str = "train.batch_size",
    build: Callable[[], nn.Module] | None = None,
) -> None:
    """Raise a ConfigError if a network cannot be trained on `batch_size` images per rank.

    Args:
        name: of the network.
        batch_size: images per rank.
        crop: side of the images in pixels.
        option: the option that sets the batch size, for the error message.
        build: builds the network as it is trained; None means `build_model`.
    """
    if batch_size > 1:
        return
    with torch.device("meta"):
        model = build() if build else build_model(name)
    smallest = smallest_batch(model, crop)
    if batch_size < smallest:
        raise ConfigError(
            f"{option}={batch_size}: {name} has batch norms of one value per image and channel at {crop} pixels: "
            f"set {option}={smallest} or more"
        )
