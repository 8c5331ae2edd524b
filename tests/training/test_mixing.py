import math

import numpy as np
import pytest
import torch

from conftest import CPU
from resnest_imagenet.training.mixing import Mixing, draw_mixup, one_hot, smoothed_cross_entropy


@pytest.mark.parametrize(
    ("mixup", "weights", "partners"),
    [
        (Mixing(0.7, None), [0.7] * 4, [3, 2, 1, 0]),
        (Mixing(torch.tensor([0.1, 0.2, 0.6, 1.0]), None), [0.1, 0.2, 0.6, 1.0], [3, 2, 1, 0]),
        (Mixing(0.7, torch.tensor([1, 3, 2, 0])), [0.7] * 4, [1, 3, 2, 0]),
    ],
)
def test_each_image_is_mixed_with_its_partner(mixup, weights, partners):
    images = torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last)
    targets = one_hot(torch.tensor([0, 1, 2, 2]), 3)
    mixed, soft = mixup.mix_images(images), mixup.mix_targets(targets)
    for i, (w, j) in enumerate(zip(weights, partners, strict=True)):
        torch.testing.assert_close(mixed[i], w * images[i] + (1 - w) * images[j])
        torch.testing.assert_close(soft[i], w * targets[i] + (1 - w) * targets[j])
    assert mixed.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("alpha", [0.2, 1.0])
def test_weights_follow_the_beta_distribution(alpha):
    rng = np.random.default_rng(0)
    per_sample = draw_mixup(alpha, True, "reversed", 20000, rng, CPU).weight.numpy()
    per_batch = np.array([draw_mixup(alpha, False, "reversed", 2, rng, CPU).weight for _ in range(20000)])
    for weights in (per_sample, per_batch):
        assert weights.shape == (20000,)
        assert weights.mean() == pytest.approx(0.5, abs=0.01)
        assert weights.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.03)


def test_partners_are_a_permutation_or_the_reversed_batch():
    rng = np.random.default_rng(0)
    partner = draw_mixup(0.2, False, "permuted", 50, rng, CPU).partner
    assert sorted(partner.tolist()) == list(range(50)) != partner.tolist()
    assert draw_mixup(0.2, False, "reversed", 50, rng, CPU).partner is None


def test_smoothing_by_the_formula():
    logits, labels, e = torch.randn(5, 10), torch.randint(10, (5,)), 0.1
    target = torch.full((5, 10), e / 10)
    target[range(5), labels] += 1 - e
    expected = -(target * logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(smoothed_cross_entropy(logits, labels, e), expected)
    torch.testing.assert_close(smoothed_cross_entropy(logits, one_hot(labels, 10), e), expected)


def test_uniform_logits_cost_log_k_whatever_the_target():
    soft = Mixing(0.4, None).mix_targets(one_hot(torch.tensor([1, 3]), 8))
    assert smoothed_cross_entropy(torch.zeros(2, 8), soft, 0.1).item() == pytest.approx(math.log(8))
