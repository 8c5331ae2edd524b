import math

import numpy as np
import pytest
import torch

from resnest_imagenet.training.mixing import draw_mixup_weight, mix_with_reversed, one_hot, smoothed_cross_entropy


def test_each_image_is_mixed_with_its_partner_in_the_reversed_batch():
    images = torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last)
    targets = one_hot(torch.tensor([0, 1, 2, 2]), 3)
    mixed, soft = mix_with_reversed(images, 0.7), mix_with_reversed(targets, 0.7)
    for i in range(4):
        torch.testing.assert_close(mixed[i], 0.7 * images[i] + 0.3 * images[3 - i])
        torch.testing.assert_close(soft[i], 0.7 * targets[i] + 0.3 * targets[3 - i])
    assert mixed.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(mix_with_reversed(images, 1.0), images)


@pytest.mark.parametrize("alpha", [0.2, 1.0])
def test_weights_follow_the_beta_distribution(alpha):
    rng = np.random.default_rng(0)
    weights = np.array([draw_mixup_weight(alpha, rng) for _ in range(20000)])
    assert weights.mean() == pytest.approx(0.5, abs=0.01)
    assert weights.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.03)


def test_smoothing_by_the_formula():
    logits, labels, e = torch.randn(5, 10), torch.randint(10, (5,)), 0.1
    target = torch.full((5, 10), e / 10)
    target[range(5), labels] += 1 - e
    expected = -(target * logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(smoothed_cross_entropy(logits, labels, e), expected)
    torch.testing.assert_close(smoothed_cross_entropy(logits, one_hot(labels, 10), e), expected)


def test_uniform_logits_cost_log_k_whatever_the_target():
    soft = mix_with_reversed(one_hot(torch.tensor([1, 3]), 8), 0.4)
    assert smoothed_cross_entropy(torch.zeros(2, 8), soft, 0.1).item() == pytest.approx(math.log(8))
