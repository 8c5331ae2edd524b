"""Bottlenecks in the form that runtimes of graphs compute fastest: none of their tensors is split.

On 2 CPU cores this form is 1.08 times as fast in OpenVINO, and 1.11 times in 8-bit integers in onnxruntime
(docs/performance_inference.md).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resnest_imagenet.models.resnest import Bottleneck
from resnest_imagenet.models.split_attention import SplitAttention


class DividedBottleneck(nn.Module):
    """A bottleneck of radix 2 in evaluation mode, each of whose splits has convolutions of its own.

    x (B, C, H, W)
      -> conv1 in two halves, ReLU, [avd_layer, if first]      twice (B, G / 2, H, W)
      -> the 3x3 convolution of each split, ReLU               u, v: twice (B, G, H', W')
      -> weight a of split u: a softmax over two logits is the sigmoid of their difference
      -> a u + (1 - a) v, [avd_layer, if last], conv3, + shortcut, ReLU

    Args:
        block: with radix 2 and folded batch norms; its parameters are copied where they differ.
    """

    def __init__(self, block: Bottleneck) -> None:
        super().__init__()
        attention, num_groups = block.conv2, block.conv2.cardinality
        self.conv1 = nn.ModuleList(_divide(block.conv1, 1))
        self.splits = nn.ModuleList(_divide(attention.conv, num_groups))
        self.fc1 = attention.fc1
        weight, bias = (_subtract_logits(attention, value) for value in (attention.fc2.weight, attention.fc2.bias))
        self.fc2 = _make_convolution(attention.fc2, weight, bias, num_groups)
        self.avd_layer, self.avd_first = block.avd_layer, block.avd_first
        self.conv3, self.downsample = block.conv3, block.downsample

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, 4 planes, H', W')."""
        shortcut = x if self.downsample is None else self.downsample(x)
        parts = [F.relu(conv(x)) for conv in self.conv1]
        if self.avd_first:
            parts = [self.avd_layer(part) for part in parts]
        u, v = (F.relu(conv(part)) for conv, part in zip(self.splits, parts, strict=True))
        weight = self.fc2(F.relu(self.fc1((u + v).mean((2, 3), keepdim=True)))).sigmoid()
        out = u * weight + v * (1 - weight)
        return F.relu(self.conv3(out if self.avd_first else self.avd_layer(out)) + shortcut)


def divide_bottlenecks(model: nn.Module) -> nn.Module:
    """Replace in place the bottlenecks that `DividedBottleneck` can compute; return the model.

    Args:
        model: in evaluation mode, of `fold_batch_norms`; blocks with other norms or another radix stay.
    """
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, Bottleneck) and _can_divide(child):
                setattr(parent, name, DividedBottleneck(child).eval())
    return model


def _can_divide(block: Bottleneck) -> bool:
    norms = (block.bn1, block.bn3, block.conv2.bn0, block.conv2.bn1)
    return block.conv2.radix == 2 and all(isinstance(norm, nn.Identity) for norm in norms)


def _divide(convolution: nn.Conv2d, num_groups: int) -> list[nn.Conv2d]:
    """Return the convolutions of the first and the second half of the outputs, each in a number of groups."""
    assert convolution.bias is not None
    halves = zip(convolution.weight.chunk(2), convolution.bias.chunk(2), strict=True)
    return [_make_convolution(convolution, weight, bias, num_groups) for weight, bias in halves]


def _make_convolution(like: nn.Conv2d, weight: Tensor, bias: Tensor, num_groups: int) -> nn.Conv2d:
    made = nn.Conv2d(
        weight.shape[1] * num_groups,
        len(weight),
        like.weight.shape[2:],  # type: ignore[arg-type] # a torch.Size of two
        like.stride,  # type: ignore[arg-type] # a tuple of two
        like.padding,
        like.dilation,  # type: ignore[arg-type] # a tuple of two
        num_groups,
        device=weight.device,
        dtype=weight.dtype,
    )
    with torch.no_grad():
        made.weight.copy_(weight)
        assert made.bias is not None
        made.bias.copy_(bias)
    return made.requires_grad_(False)


def _subtract_logits(attention: SplitAttention, value: Tensor) -> Tensor:
    """Return fc2's weight or bias for the difference of the two splits' logits, in the order of the channels."""
    first, second = value.detach().unflatten(0, (attention.cardinality, 2, -1)).unbind(1)
    return (first - second).flatten(0, 1)
