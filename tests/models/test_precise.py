"""Statistics of batch norms over many batches, against naive means in float64."""

import copy

import numpy as np
import torch
from torch import nn

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
