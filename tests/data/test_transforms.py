import math

import numpy as np
import pytest
from PIL import Image
from torchvision.transforms import v2

from resnest_imagenet.data.transforms import EvalTransform, TrainTransform


def windows(transform, height, width, draws=4000):
    return np.array([transform.window(height, width, transform.draw(0, index)) for index in range(draws)])


def test_draws_are_a_function_of_seed_epoch_and_sample():
    transform = TrainTransform(224, seed=1)
    np.testing.assert_array_equal(transform.draw(2, 7), transform.draw(2, 7))
    others = [TrainTransform(224, seed=2).draw(2, 7), transform.draw(3, 7), transform.draw(2, 8)]
    assert all((transform.draw(2, 7)[1:] != other[1:]).all() for other in others)


@pytest.mark.parametrize(("height", "width"), [(375, 500), (500, 333), (64, 64), (30, 900), (1, 1)])
def test_windows_lie_within_the_image(height, width):
    top, left, h, w = windows(TrainTransform(224, seed=0), height, width, 500).T
    assert (top >= 0).all() and (left >= 0).all() and (h >= 1).all() and (w >= 1).all()
    assert (top + h <= height).all() and (left + w <= width).all()


def test_area_and_aspect_are_distributed_as_defined():
    """On a large square most attempts fit: area uniform in .08..1, log aspect uniform, with the corners cut off."""
    transform = TrainTransform(224, seed=0, max_area=0.5)
    _, _, h, w = windows(transform, 2000, 2000).T
    area, aspect = h * w / 2000**2, w / h
    # Every attempt fits below an area of 3/4: sqrt(.75 * 4/3) = 1.
    assert np.quantile(area, [0, 0.25, 0.5, 0.75, 1]) == pytest.approx([0.08, 0.185, 0.29, 0.395, 0.5], abs=0.01)
    quartiles = np.quantile(np.log(aspect) / math.log(4 / 3), [0, 0.25, 0.5, 0.75, 1])
    assert quartiles == pytest.approx([-1, -0.5, 0, 0.5, 1], abs=0.04)


def test_positions_and_flips_are_uniform():
    transform = TrainTransform(224, seed=0)
    top, left, h, w = windows(transform, 600, 900).T
    assert (top / (600 - h + 1)).mean() == pytest.approx(0.5, abs=0.02)
    assert (left / (900 - w + 1)).mean() == pytest.approx(0.5, abs=0.02)
    assert np.mean([transform.draw(0, i)[0] for i in range(4000)]) == pytest.approx(0.5, abs=0.03)


def test_an_extreme_shape_takes_the_largest_centre_crop():
    draw = TrainTransform(224, seed=0).draw(0, 0)
    draw[3:] = 10  # no attempt fits
    assert TrainTransform(224, seed=0).window(300, 3000, draw) == (0, 1300, 300, 400)
    assert TrainTransform(224, seed=0).window(3000, 300, draw) == (1300, 0, 400, 300)
    assert TrainTransform(224, seed=0).window(300, 310, draw) == (0, 0, 300, 310)


@pytest.mark.parametrize(
    ("crop", "short_side", "interpolation"), [(224, 256, "bilinear"), (256, 293, "bilinear"), (320, 366, "bicubic")]
)
def test_the_papers_evaluation_protocol(crop, short_side, interpolation):
    transform = EvalTransform(crop)
    assert (transform.short_side, transform.interpolation) == (short_side, interpolation)
    assert transform.protocol == f"short side {short_side} {interpolation}, centre crop {crop}"


@pytest.mark.parametrize("size", [(375, 500), (500, 375), (333, 500), (224, 225), (500, 501), (100, 701)])
def test_evaluation_windows_are_torchvisions(size):
    transform = EvalTransform(224)
    marked = Image.fromarray(np.arange(size[0] * size[1], dtype=np.int32).reshape(size))
    resized = v2.functional.resize(marked, [256], v2.InterpolationMode.NEAREST)
    height, width = transform.resized(*size)
    assert (height, width) == (resized.height, resized.width)
    top, left, h, w = transform.window(height, width)
    ours = resized.crop((left, top, left + w, top + h))
    np.testing.assert_array_equal(np.array(ours), np.array(v2.functional.center_crop(resized, [224, 224])))
