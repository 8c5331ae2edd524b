import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from conftest import CPU
from resnest_imagenet.tasks.mixing import (
    Mixing,
    balance_classes,
    draw_cutmix,
    draw_mixup,
    erase_rectangles,
    one_hot,
    smoothed_cross_entropy,
)


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


@pytest.mark.parametrize("partner", [None, torch.tensor([1, 3, 2, 0])])
def test_cutmix_puts_the_partners_rectangle_into_each_image(partner):
    images = torch.randn(4, 3, 8, 8).to(memory_format=torch.channels_last)
    expected = images.clone()
    expected[:, :, 2:5, 1:8] = images[[3, 2, 1, 0] if partner is None else partner][:, :, 2:5, 1:8]
    targets = one_hot(torch.tensor([0, 1, 2, 2]), 3)
    mixing = Mixing(1 - 21 / 64, partner, (2, 1, 5, 8))
    assert torch.equal(mixing.mix_images(images), expected)
    others = targets[[3, 2, 1, 0] if partner is None else partner]
    torch.testing.assert_close(mixing.mix_targets(targets), 43 / 64 * targets + 21 / 64 * others)


def test_cutmix_windows_are_distributed_as_defined():
    """Share of the window before it is cut off: 1 - Beta(1, 1), uniform; its centre uniform; the weight the rest."""
    rng = np.random.default_rng(0)
    drawn = [draw_cutmix(1.0, "reversed", 2, 1000, rng, CPU) for _ in range(4000)]
    top, left, bottom, right = np.array([each.box for each in drawn]).T
    weight = np.array([each.weight for each in drawn])
    assert weight == pytest.approx(1 - (bottom - top) * (right - left) / 1e6)
    assert min(top.min(), left.min()) == 0 and max(bottom.max(), right.max()) == 1000
    is_whole = (top > 0) & (left > 0) & (bottom < 1000) & (right < 1000)
    assert ((bottom - top) - (right - left))[is_whole].max() <= 1
    # A window of side s lies inside with probability (1 - s)^2; s^2 is uniform: the integral is 1/6.
    assert is_whole.mean() == pytest.approx(1 / 6, abs=0.02)


@pytest.mark.slow
def test_random_erasing_is_distributed_as_defined():
    images = torch.ones(4000, 3, 100, 120).to(memory_format=torch.channels_last)
    erase_rectangles(images, 0.4, np.random.default_rng(0))
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(images[:, 0], images[:, 1]) and torch.equal(images[:, 0], images[:, 2])
    erased = images[:, 0] == 0
    rows, columns = erased.any(2), erased.any(1)
    heights, widths = rows.sum(1), columns.sum(1)
    assert torch.equal(erased, rows[:, :, None] & columns[:, None, :])  # rectangles
    assert int(((rows[:, 1:] != rows[:, :-1]).sum(1) > 2).sum()) == 0  # in one piece
    is_chosen = heights > 0
    assert float(is_chosen.float().mean()) == pytest.approx(0.4, abs=0.03)
    area = (heights * widths)[is_chosen] / 12000
    # Large narrow ones do not fit: below .1 all do.
    assert float(area.min()) == pytest.approx(0.02, abs=0.003) and float(area.max()) == pytest.approx(0.33, abs=0.01)
    small = area[area < 0.1]
    assert np.quantile(small, [0.25, 0.5, 0.75]) == pytest.approx([0.04, 0.06, 0.08], abs=0.006)
    aspect = torch.log(heights / widths)[is_chosen][area < 0.1] / np.log(3.3)
    assert np.quantile(aspect, [0.25, 0.5, 0.75]) == pytest.approx([-0.5, 0, 0.5], abs=0.08)
    untouched = torch.ones(8, 3, 20, 20)
    erase_rectangles(untouched, 0.0, np.random.default_rng(0))
    assert untouched.min() == 1


def test_an_image_counts_by_the_weights_of_its_classes():
    logits, labels, e = torch.randn(6, 4), torch.tensor([0, 1, 2, 3, 0, 1]), 0.1
    weights = torch.tensor([0.5, 2.0, 1.0, 0.25])
    mixed = Mixing(0.7, None).mix_targets(one_hot(labels, 4))
    for targets, shares in ((labels, one_hot(labels, 4)), (mixed, mixed)):
        expected = 0.0
        for row, share in zip(logits.log_softmax(1).tolist(), shares.tolist(), strict=True):
            for of_class, (part, weight) in enumerate(zip(share, weights.tolist(), strict=True)):
                # This part of the image is an image of this class, with its smoothed target.
                smoothed = [e / 4 + (1 - e) * (other == of_class) for other in range(4)]
                expected -= weight * part * sum(t * p for t, p in zip(smoothed, row, strict=True)) / 6
        loss = smoothed_cross_entropy(logits, targets, e, weights)
        assert loss.item() == pytest.approx(expected, rel=1e-5)
        # Batches and ranks add up.
        halves = [smoothed_cross_entropy(logits[part], targets[part], e, weights) for part in (slice(3), slice(3, 6))]
        torch.testing.assert_close(sum(halves) / 2, loss)
    torchs = F.cross_entropy(logits, labels, weight=weights, reduction="sum") / 6
    torch.testing.assert_close(smoothed_cross_entropy(logits, labels, 0.0, weights), torchs)


def test_balanced_classes_count_alike():
    labels = np.array([0] * 6 + [1] * 2 + [3] * 4)
    weights = balance_classes(labels, 4)
    assert weights.dtype == np.float32 and weights[2] == 0
    np.testing.assert_allclose(np.bincount(labels, weights[labels], 4), [4, 4, 0, 4])
    assert weights[labels].mean() == pytest.approx(1)
    np.testing.assert_array_equal(balance_classes(np.arange(9) % 3, 3), 1)
