"""Statistics of batch norms over many batches, against naive means in float64."""

import copy
import hashlib

import numpy as np
import pytest
import torch
from torch import nn

from conftest import ALONE
from forked import compute_on_ranks
from resnest_imagenet.distributed import gather_objects, sum_over_ranks
from resnest_imagenet.models.precise import estimate_norms


def test_statistics_are_the_mean_over_batches_of_means_and_unbiased_variances():
    rng = np.random.default_rng(0)
    batches = [rng.normal(number, 1 + number, (4, 3, 5, 2)) for number in range(3)]
    norm, frozen = nn.BatchNorm2d(3).double(), nn.BatchNorm2d(3).double()
    network = nn.Sequential(norm)
    assert estimate_norms(network, map(torch.tensor, batches), network) == 3
    means = np.mean([batch.mean((0, 2, 3)) for batch in batches], 0)
    variances = np.mean([batch.var((0, 2, 3), ddof=1) for batch in batches], 0)
    np.testing.assert_allclose(norm.running_mean.numpy(), means, rtol=1e-12)
    np.testing.assert_allclose(norm.running_var.numpy(), variances, rtol=1e-12)
    assert norm.momentum == 0.1
    frozen.train = lambda mode=True: frozen  # as a norm that stays in evaluation mode
    frozen.training, before = False, copy.deepcopy(frozen.state_dict())
    assert estimate_norms(nn.Sequential(frozen), map(torch.tensor, batches), frozen) == 0
    assert all(torch.equal(before[name], values) for name, values in frozen.state_dict().items())


def estimate_on_rank(ranks):
    """Return whether frozen norms and counts stayed, the largest relative error, and a digest of the statistics.

    The network's norms see other images on each rank; every mean is taken again of what they saw, in float64.
    """
    from resnest_imagenet.models.rcnn import build_rcnn

    torch.manual_seed(0)
    options = {"norm": "bn", "head_norm": "frozen", "channels": 8, "box_width": 8, "box_convs": 1}
    network = build_rcnn("resnest14_half", 5, **options)
    backbone = network.backbone
    frozen = (backbone.conv1, backbone.bn1, backbone.layer1, network.fpn, network.roi_heads)
    of_frozen = {id(module) for part in frozen for module in part.modules()}
    norms = {name: module for name, module in network.named_modules() if isinstance(module, nn.BatchNorm2d)}
    trained = {name: norm for name, norm in norms.items() if id(norm) not in of_frozen}
    assert len(trained) > 10 and len(norms) - len(trained) > 5
    seen = {name: [] for name in trained}
    for name, norm in trained.items():
        if name.endswith(".conv2.bn0"):  # split attention computes it together with what follows
            convolution = network.get_submodule(name.removesuffix("bn0") + "conv")
            convolution.register_forward_hook(lambda _, inputs, y, name=name: seen[name].append(y.double().numpy()))
        else:
            norm.register_forward_pre_hook(lambda _, inputs, name=name: seen[name].append(inputs[0].double().numpy()))
    before = copy.deepcopy(network.state_dict())
    rng = np.random.default_rng(ranks.rank)
    batches = [torch.tensor(rng.normal(number, 1, (2, 3, 64, 96)), dtype=torch.float32) for number in range(3)]

    def average(values):
        return sum_over_ranks(values) / ranks.world_size

    assert estimate_norms(network, batches, network.pyramid, average) == 3
    own = {name: [(x.mean((0, 2, 3)), x.var((0, 2, 3), ddof=1)) for x in inputs] for name, inputs in seen.items()}
    of_all, error = gather_objects(own, ranks), 0.0
    for name, norm in trained.items():
        batches_of_all = [of_batch for of_rank in of_all for of_batch in of_rank[name]]
        for statistics, part in ((norm.running_mean, 0), (norm.running_var, 1)):
            values = np.mean([of_batch[part] for of_batch in batches_of_all], axis=0)
            error = max(error, np.abs(statistics.numpy() - values).max() / np.abs(values).max())
    after = network.state_dict()
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    pairs = {f"{name}.{what}" for name in trained for what in ("running_mean", "running_var")}
    digest = hashlib.sha256(b"".join(after[name].numpy().tobytes() for name in sorted(pairs))).hexdigest()
    return moved == pairs, error, digest


@pytest.mark.process
@pytest.mark.slow
def test_ranks_get_the_same_statistics_and_frozen_norms_keep_theirs():
    first, second = compute_on_ranks(estimate_on_rank, 2)
    assert first == second and first[0]
    assert 0 < first[1] < 1e-5
    assert estimate_on_rank(ALONE)[2] != first[2]


def test_an_error_leaves_the_network_as_it_was():
    norm = nn.BatchNorm2d(3)
    norm(torch.randn(2, 3, 4, 4))
    before = copy.deepcopy(norm.state_dict())

    def draw_batches():
        yield torch.randn(2, 3, 4, 4)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        estimate_norms(norm, draw_batches(), norm)
    assert norm.momentum == 0.1
    assert all(torch.equal(before[name], values) for name, values in norm.state_dict().items())
