"""A network of the zoo as a backbone for detection and segmentation: it returns its stages' features, no logits."""

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch.nn.functional as F
from torch import Tensor, nn

from resnest_imagenet.errors import ConfigError, suggest
from resnest_imagenet.models.recompute import run_recomputed
from resnest_imagenet.models.split_attention import SplitAttention

Norm = Literal["bn", "frozen", "sync"]

# Each feature, and the modules that compute it from the one before. All networks of the zoo have these names.
STAGES = {
    "stem": ("conv1", "bn1"),
    "layer1": ("maxpool", "layer1"),
    "layer2": ("layer2",),
    "layer3": ("layer3",),
    "layer4": ("layer4",),
}


class Backbone(nn.Module):
    """A network without its classifier.

    images (B, 3, H, W)
      -> stem (conv1, bn1, ReLU)    (B, C, H/2, W/2)
      -> maxpool, layer1            (B, C, H/4, W/4)
      -> layer2 .. layer4           strides 8, 16 and 32, at most output_stride; odd sizes are rounded up

    The stem ends before the max pool, as in timm's features_only: U-Nets want a feature of stride 2. detectron2's
    "stem" ends after it, at layer1's resolution; its heads take res2 to res5, here layer1 to layer4.

    Keys of the state dict are the network's. Stages after the last feature are dropped: their parameters would get no
    gradients.

    Args:
        network: any network of the zoo; the backbone takes over its modules.
        out_features: which of STAGES `forward` returns, in this order.
        output_stride: the network's.
        freeze_at: number of STAGES, from the first, that are not trained, as in detectron2: no gradients, and batch
            norms that stay in evaluation mode, also after `train()`.
        norm: "frozen" freezes all batch norms, and nothing else. With "bn" and "sync" the network's norms stay.

    Attributes:
        names, strides, channels: of the features, in the order of `forward`.

    Raises:
        ConfigError: for an unknown feature or norm, no feature, a freeze_at out of range, or a network without a stage.
    """

    conv1: nn.Module
    bn1: nn.Module

    def __init__(
        self, network: nn.Module, out_features: Sequence[str], output_stride: int, freeze_at: int, norm: Norm
    ) -> None:
        super().__init__()
        for name in out_features:
            if name not in STAGES:
                raise ConfigError(f"unknown feature {name!r}{suggest(name, STAGES)} ({', '.join(STAGES)})")
        if not out_features:
            raise ConfigError(f"out_features is empty: choose from {', '.join(STAGES)}")
        if not 0 <= freeze_at <= len(STAGES):
            raise ConfigError(f"freeze_at is 0 to {len(STAGES)}, not {freeze_at}")
        if norm not in get_args(Norm):
            raise ConfigError(f"norm={norm}: {', '.join(get_args(Norm))} are valid")
        stages = list(STAGES)
        self._stages = stages[: 1 + max(stages.index(name) for name in out_features)]
        self._freeze_at, self._norm = freeze_at, norm
        self._recomputes = False
        missing = [part for name in self._stages for part in STAGES[name] if not hasattr(network, part)]
        if missing:
            raise ConfigError(f"a {type(network).__name__} is no backbone: it has no {missing[0]}")
        for name in self._stages:
            for part in STAGES[name]:
                self.add_module(part, network.get_submodule(part))
        self.names = tuple(out_features)
        self.strides = tuple(min(2 ** (1 + stages.index(name)), output_stride) for name in out_features)
        self.channels = tuple(self._count_channels(name) for name in out_features)
        for module in self._list_frozen():
            module.requires_grad_(False)
        self.train()

    def forward(self, images: Tensor) -> list[Tensor]:
        """Map normalised images (B, 3, H, W) to the features, (B, channels, H / stride, W / stride) each."""
        x = F.relu(self.bn1(self.conv1(images)), inplace=True)
        features = {"stem": x}
        for name in self._stages[1:]:
            for part in STAGES[name]:
                module = self.get_submodule(part)
                if self._recomputes and isinstance(module, nn.Sequential):
                    for block in module:
                        x = run_recomputed(block, x)
                else:
                    x = module(x)
            features[name] = x
        return [features[name] for name in self.names]

    def recompute(self) -> None:
        """Make training recompute the blocks' activations in the backward pass, instead of keeping them."""
        self._recomputes = True
        for module in self.modules():
            if isinstance(module, SplitAttention):
                module.is_recomputed = True

    def train(self, mode: bool = True) -> "Backbone":
        """Set training or evaluation mode; what is frozen stays in evaluation mode."""
        super().train(mode)
        for module in self._list_frozen():
            module.eval()
        return self

    def _list_frozen(self) -> list[nn.Module]:
        frozen = [self.get_submodule(part) for name in self._stages[: self._freeze_at] for part in STAGES[name]]
        if self._norm == "frozen":
            frozen += [module for module in self.modules() if isinstance(module, nn.BatchNorm2d)]
        return frozen

    def _count_channels(self, name: str) -> int:
        # The first block of every layer changes the number of channels, so its shortcut ends in a batch norm.
        stage: Any = self.get_submodule(STAGES[name][-1])
        return stage.num_features if name == "stem" else stage[0].downsample[-1].num_features
