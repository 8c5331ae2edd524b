"""Folds batch norms into the convolutions before them: an evaluation then reads its activations fewer times."""

import copy

from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval


def fold_batch_norms(model: nn.Module) -> nn.Module:
    """Return a copy in evaluation mode whose batch norms are part of the convolutions, equal up to rounding.

    A batch norm is folded into the convolution that its module names just before it, alone or at the end of a
    Sequential (the deep stem). Every network of the zoo is ordered like this. Other batch norms stay, and so do those
    that include an activation.
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
