"""Batch norms folded into the convolutions before them: fewer passes over the activations in an evaluation."""

import copy

from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval


def fold_batch_norms(model: nn.Module) -> nn.Module:
    """Return a copy in evaluation mode whose batch norms are part of the convolutions, equal up to rounding.

    A batch norm belongs to the convolution that its module names just before it, alone or at the end of a Sequential
    (the deep stem); so it is in every network of the zoo. Others stay, and so do those with an activation within.
    """
    folded = copy.deepcopy(model).eval()
    for parent in folded.modules():
        before: nn.Module | None = None
        holder, key = parent, ""
        for name, child in parent.named_children():
            if isinstance(before, nn.Conv2d) and (type(child) is nn.BatchNorm2d or type(child) is nn.SyncBatchNorm):
                setattr(holder, key, fuse_conv_bn_eval(before, child))
                setattr(parent, name, nn.Identity())
            holder, key, before = parent, name, child
            if isinstance(child, nn.Sequential) and len(child):
                holder, (key, before) = child, list(child.named_children())[-1]
    return folded
