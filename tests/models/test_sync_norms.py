"""Synchronised batch norms of a detector's heads where a rank has no boxes, on two ranks.

torch has the norms' kernels for accelerators alone: here they are plain formulas on the CPU, and torch's own function
gathers between them.
"""

import numpy as np
import pytest
import torch
from torch import nn

from forked import compute_on_ranks


def register_kernels():
    """Give torch the operators of SyncBatchNorm on the CPU, as it has them on CUDA: statistics are float32."""

    def of_channels(values):
        return values[:, None, None]

    def stats(x, eps):
        x = x.float()
        return x.mean((0, 2, 3)), (x.var((0, 2, 3), unbiased=False) + eps).rsqrt()

    def gather_stats(x, means, inverses, running_mean, running_var, momentum, eps, counts):
        assert means.dtype == inverses.dtype == counts.dtype == torch.float32
        shares, total = (counts / counts.sum())[:, None], counts.sum()
        mean = (shares * means).sum(0)
        variance = (shares * (inverses**-2 - eps + (means - mean) ** 2)).sum(0)
        running_mean.lerp_(mean, momentum)
        running_var.lerp_(variance * total / (total - 1), momentum)
        return mean, (variance + eps).rsqrt()

    def normalise(x, weight, bias, mean, inverse, eps):
        scaled = (x.float() - of_channels(mean)) * of_channels(inverse * weight) + of_channels(bias)
        return scaled.to(x.dtype)

    def reduce(gradient, x, mean, inverse, weight, of_input, of_weight, of_bias):
        gradient, centred = gradient.float(), x.float() - of_channels(mean)
        sums = gradient.sum((0, 2, 3)), (gradient * centred).sum((0, 2, 3))
        return *sums, sums[1] * inverse, sums[0]

    def differentiate(gradient, x, mean, inverse, weight, sum_gradient, sum_product, counts):
        total, centred = counts.sum(), x.float() - of_channels(mean)
        product = of_channels(sum_product / total * inverse**2)
        own = gradient.float() - of_channels(sum_gradient / total) - centred * product
        return (own * of_channels(inverse * weight)).to(x.dtype)

    library = torch.library.Library("aten", "IMPL", "CPU")
    names = "batch_norm_stats batch_norm_gather_stats_with_counts batch_norm_elemt batch_norm_backward_reduce"
    kernels = (stats, gather_stats, normalise, reduce, differentiate)
    for name, kernel in zip([*names.split(), "batch_norm_backward_elemt"], kernels, strict=True):
        library.impl(name, kernel)
    return library


def normalise_on_rank(ranks):
    """Return the statistics and gradients of a box head's norms after a step in bfloat16; rank 0 has no boxes."""
    from resnest_imagenet.distributed import sum_over_ranks
    from resnest_imagenet.models.rcnn import build_rcnn

    kernels = register_kernels()
    results = {}
    for norm in ("sync", "bn"):
        torch.manual_seed(0)
        options = {"norm": "frozen", "head_norm": norm, "channels": 8, "box_width": 8, "box_convs": 2}
        (head,) = build_rcnn("resnest14_half", 5, **options).roi_heads.box_heads
        pooled = torch.randn(6, 8, 7, 7)
        # The other rank's boxes are all of them: plain norms there are the truth.
        pooled = pooled[: 0 if ranks.is_main and norm == "sync" else 6].requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16), pytest.MonkeyPatch.context() as patch:
            # SyncBatchNorm refuses tensors of other devices than accelerators.
            patch.setattr(torch._C, "_get_privateuse1_backend_name", lambda: "cpu")
            logits, differences = head(pooled)
        (logits.square().sum() + differences.square().sum()).backward()
        norms = [module for module in head.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
        assert len(norms) == 2 and all(isinstance(module, nn.SyncBatchNorm) == (norm == "sync") for module in norms)
        gradients = torch.cat([torch.zeros(8) if n.weight.grad is None else n.weight.grad for n in norms])
        if norm == "sync":
            sum_over_ranks(gradients)
        values = [gradients, *(n.running_mean for n in norms), *(n.running_var for n in norms)]
        results[norm] = torch.cat(values).detach().numpy()
    del kernels
    return results


@pytest.mark.process
@pytest.mark.slow
def test_a_rank_without_boxes_takes_part_in_half_precision():
    for results in compute_on_ranks(normalise_on_rank, 2):
        assert np.isfinite(results["sync"]).all() and np.abs(results["bn"]).min() > 0
        np.testing.assert_allclose(results["sync"], results["bn"], rtol=0.05, atol=0.02)
