"""Every operation, by DALI and by Pillow: `tools/benchmarks/parity.py` measures the same on photographs."""

import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from resnest_imagenet.data.augment import PCA_VALUES, PCA_VECTORS, POLICIES, Augmentation, Op
from resnest_imagenet.data.pillow_ops import OPERATIONS, apply_operations

# Where the ties between two pixels may fall otherwise, along a line.
TIES = {Op.ROTATE, Op.SHEAR_X, Op.SHEAR_Y, Op.SHEAR_X_BICUBIC, Op.SHEAR_Y_BICUBIC}
EXACT = {Op.INVERT, Op.POSTERIZE, Op.SOLARIZE, Op.SOLARIZE_ADD, Op.CUTOUT, *(op for op in Op if "TRANSLATE" in op.name)}


def make_pictures():
    """Return textures, and what operations on histograms find hard: flat, black, nearly flat, two levels."""
    rng = np.random.default_rng(0)
    pictures = []
    for detail, size in ((6, (157, 120)), (40, (96, 133)), (90, (90, 91))):
        coarse = Image.fromarray(rng.integers(0, 256, (detail, detail, 3), dtype=np.uint8))
        pictures.append(np.array(coarse.resize(size, Image.Resampling.BICUBIC)))
    noise = rng.integers(0, 256, (50, 70, 3), dtype=np.uint8)
    flat = np.full((40, 60, 3), [0, 128, 255], np.uint8)
    return [*pictures, noise, noise // 64 + 100, noise & 128, flat, flat * 0]


@pytest.mark.parametrize("op", [op for op in Op if op != Op.IDENTITY], ids=lambda op: op.name)
@pytest.mark.slow
def test_dali_does_what_pillow_does(op):
    from parity import compare_operation  # late: it imports DALI and torchvision

    if op == Op.EQUALIZE:
        for picture in make_pictures():
            pixels = picture.shape[0] * picture.shape[1]
            assert compare_operation([picture], op).largest <= 1 + 255**2 / pixels
        return
    apart = compare_operation(make_pictures(), op)
    if op in EXACT:
        assert apart.largest == 0
    elif op in TIES:
        assert apart.mean < 0.3 and apart.p99 <= 1
    else:
        assert apart.mean < 0.01 and apart.largest <= 1


@pytest.mark.slow
def test_the_parity_tool_measures_every_operation_with_the_policies_values():
    from parity import VALUES

    assert VALUES.keys() == set(Op) - {Op.IDENTITY} == OPERATIONS.keys() - {Op.IDENTITY}


def probabilities(rows, image):
    """Return every outcome of a policy on an image with its probability, by enumeration."""
    outcomes = Counter()
    for row in rows:
        paths = [(image, 1 / len(rows))]
        for step in row:
            each = [(np.zeros((1, 4)), 1 - step.probability)]
            for value in step.values:
                each.append((np.array([[step.op, value, 0, 0]]), step.probability / len(step.values)))
            paths = [(apply_operations(picture, op), p * q) for picture, p in paths for op, q in each if q > 0]
        for picture, p in paths:
            outcomes[picture.tobytes()] += p
    return outcomes


def find_nearest(outcome, ours, image):
    """Return which of ours torchvision missed by the rounding of its float32 levels."""
    # The translation by 16 pixels, the middle of 31 levels to 32, is 15.999999 there, and cut off to 15.
    for op, x in itertools.product((Op.TRANSLATE_X, Op.TRANSLATE_Y), (15, -15)):
        if outcome == apply_operations(image, np.array([[op, x, 0, 0]])).tobytes():
            return apply_operations(image, np.array([[op, x + np.sign(x), 0, 0]])).tobytes()
    pixels = np.frombuffer(outcome, np.uint8).astype(int)
    apart = {each: (np.abs(np.frombuffer(each, np.uint8) - pixels) > 1).mean() for each in ours}
    nearest, second = sorted(apart, key=apart.get)[:2]
    # Pixels at a threshold, of which a colour operation before may make one in ten.
    assert apart[nearest] < min(0.15, apart[second] / 2)
    return nearest


@pytest.mark.parametrize(
    ("name", "stock"),
    [("autoaugment", "AutoAugment"), ("randaugment", "RandAugment"), ("trivialaugment", "TrivialAugmentWide")],
)
@pytest.mark.slow
def test_stock_policies_are_torchvisions(name, stock):
    """All that torchvision's does to an image is among ours, as often."""
    from torchvision.transforms import v2

    policy = getattr(v2, stock)()
    image = Image.fromarray(make_pictures()[1])
    ours = probabilities(POLICIES[name](), image)
    assert sum(ours.values()) == pytest.approx(1)
    draws = 1000  # the bound below grows as the number shrinks
    torch.manual_seed(0)
    seen = Counter()
    for outcome in (policy(image).tobytes() for _ in range(draws)):
        seen[outcome if outcome in ours else find_nearest(outcome, ours, image)] += 1
    # Kinds of equal probability together: their frequencies are as far off as those of our own draws would be.
    for share in set(np.round(list(ours.values()), 12)):
        kind = {outcome for outcome, p in ours.items() if round(p, 12) == share}
        expected = share * len(kind)
        found = sum(seen[outcome] for outcome in kind) / draws
        assert abs(found - expected) < 4.5 * np.sqrt(expected * (1 - expected) / draws) + 1e-9


# FACTS of the recipe, typed a second time: what each of the 25 rows does, (operation, probability, value).
RESNEST = """
0: posterize .4 1, rotate .6 27 | 1 21: solarize .6 128, auto_contrast .6 | 2 24: equalize .8, equalize .6
3: posterize .6 2, posterize .6 2 | 4 20: equalize .4, solarize .2 154 | 5: equalize .4, rotate .8 24
6: solarize .6 180, equalize .6 | 7: posterize .8 2, equalize 1 | 8: rotate .2 9, solarize .6 52
9: equalize .6, posterize .4 2 | 10: rotate .8 24, color .4 .1 | 11: rotate .4 27, equalize .6
12: equalize 0, equalize .8 | 13 22: invert .6, equalize 1 | 14 23: color .6 .82, contrast 1 1.54
15: rotate .8 24, color 1 .1 | 16: color .8 1.54, solarize .8 77 | 17: sharpness .4 1.36, invert .6
18: shear_x_bicubic .6 .15, equalize 1 | 19: color .4 .1, equalize .6
"""


def test_resnests_policy_is_as_tabled():
    rows = POLICIES["resnest"]()
    seen = set()
    for entry in RESNEST.strip().replace("\n", " | ").split(" | "):
        numbers, _, steps = entry.partition(": ")
        for number in map(int, numbers.split()):
            seen.add(number)
            for step, text in zip(rows[number], steps.split(", "), strict=True):
                name, probability, *value = text.split()
                assert (step.op.name.lower(), step.probability) == (name, float(probability)), number
                value = float(value[0]) if value else 0.0
                signed = name in ("rotate", "shear_x_bicubic")
                assert step.values == pytest.approx((value, -value) if signed else (value,)), number
    assert seen == set(range(25)) == set(range(len(rows)))


# RandAugment(2, 12) of the released code: each range at 12/30, a step skipped half the time.
RESNEST_TORCH = {
    "auto_contrast": 0, "equalize": 0, "invert": 0, "rotate": 12, "posterize": 1, "solarize": 102.4,
    "solarize_add": 44, "color": 0.82, "contrast": 0.82, "brightness": 0.82, "sharpness": 0.82,
    "shear_x_bicubic": 0.12, "shear_y_bicubic": 0.12, "cutout": 16, "translate_x": 40, "translate_y": 40,
}  # fmt: skip


def test_the_released_randaugment_is_as_tabled():
    rows = POLICIES["resnest_torch"]()
    names = list(RESNEST_TORCH)
    assert [[step.op.name.lower() for step in row] for row in rows] == [[a, b] for a in names for b in names]
    for step in {step for row in rows for step in row}:
        value = RESNEST_TORCH[step.op.name.lower()]
        signed = step.op in (Op.ROTATE, Op.SHEAR_X_BICUBIC, Op.SHEAR_Y_BICUBIC, Op.TRANSLATE_X, Op.TRANSLATE_Y)
        assert step.values == pytest.approx((value, -value) if signed else (value,))
        assert step.probability == 0.5


@pytest.mark.slow
def test_a_look_is_drawn_as_defined():
    """Rows, steps and values as often as the table says, jitter and lighting with their moments."""
    augmentation = Augmentation("resnest", jitter=0.4, lighting=0.1, shift=0.0)
    appearance = augmentation.draw(1, 2, range(20000))
    before, after, offset = appearance.before, appearance.after, appearance.offset
    expected = [Counter(), Counter()]
    for row in augmentation.rows:
        for place, step in enumerate(row):
            expected[place][step.op] += step.probability / 25
    for place in range(2):
        for op, share in expected[place].items():
            assert (before[:, place, 0] == op).mean() == pytest.approx(share, abs=0.015), (place, op.name)
    turned = before[before[..., 0] == Op.ROTATE][:, 1]
    assert set(np.abs(turned)) == {9, 24, 27} and np.sign(turned).mean() == pytest.approx(0, abs=0.05)
    # Six orders, each as often; factors uniform in .6 to 1.4 and independent.
    orders = Counter(map(tuple, after[..., 0].tolist()))
    assert len(orders) == 6 and max(abs(n / 20000 - 1 / 6) for n in orders.values()) < 0.015
    factors = after[..., 1]
    assert (factors.min(), factors.max(), factors.mean()) == pytest.approx((0.6, 1.4, 1.0), abs=0.005)
    assert np.abs(np.corrcoef(factors.T) - np.eye(3)).max() < 0.03
    # Lighting: covariance V diag(.1 * values)^2 V^T, in 1/255.
    covariance = PCA_VECTORS @ np.diag((255 * 0.1 * PCA_VALUES) ** 2) @ PCA_VECTORS.T
    assert np.cov(offset.T) == pytest.approx(covariance, rel=0.05)
    assert offset.mean(0) == pytest.approx([0, 0, 0], abs=0.1)


def test_looks_are_a_function_of_seed_epoch_and_sample():
    augmentation = Augmentation("trivialaugment", jitter=0.4, lighting=0.1, shift=20)
    appearance = augmentation.draw(1, 2, range(8))
    for name in ("before", "after", "offset"):
        np.testing.assert_array_equal(getattr(augmentation.draw(1, 2, [7]), name)[0], getattr(appearance, name)[7])
    for other in (augmentation.draw(2, 2, [7]), augmentation.draw(1, 3, [7]), augmentation.draw(1, 2, [6])):
        assert (other.offset[0] != appearance.offset[7]).all()
        assert (other.after[0, :, 1] != appearance.after[7, :, 1]).all()


def test_a_shift_moves_all_channels_alike():
    shifts = Augmentation(shift=20).draw(0, 0, range(2000)).offset
    assert (shifts == shifts[:, :1]).all()
    assert (shifts.min(), shifts.max(), shifts.mean()) == pytest.approx((-20, 20, 0), abs=0.6)
