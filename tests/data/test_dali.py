"""The rules that stand twice: in Python, and as DALI arithmetic."""

import numpy as np
import pytest
from nvidia.dali import fn, pipeline_def

from resnest_imagenet.data.dali import _round_half_even, _square, _train_window
from resnest_imagenet.data.transforms import ERandomCrop, EvalTransform, RandomResizedCrop, TrainTransform


def compute(rule, *columns):
    """Evaluate a DALI expression of float64 scalars; return its results' rows, joined."""

    @pipeline_def(batch_size=len(columns[0]), num_threads=1, device_id=None)
    def pipeline():
        return rule(*fn.external_source(lambda: [list(np.float64(c)) for c in columns], num_outputs=len(columns)))

    built = pipeline()
    built.build()
    return np.concatenate([np.array(output.as_tensor()).reshape(len(columns[0]), -1) for output in built.run()], 1)


def test_rounding_is_pythons():
    around = [np.nextafter(half, toward) for half in np.arange(0.5, 20) for toward in (0, half, 99)]
    values = [0.0, *around, 1000.5, 1001.5, 4096.5, *np.random.default_rng(0).uniform(0, 5000, 500)]
    rounded = compute(lambda value: (_round_half_even(value),), values)[:, 0]
    assert rounded.tolist() == [round(float(value)) for value in values]


@pytest.mark.parametrize(("crop", "ratio"), [(224, None), (320, None), (416, None), (64, 0.7), (64, 0.01), (64, 1.0)])
def test_squares_are_those_of_the_transform(crop, ratio):
    """Of 4000 sizes, and of multiples of 2 (crop + 32), where the side is whole only in float64."""
    transform = EvalTransform(crop, "crop_resize", ratio)
    random = np.random.default_rng(0).integers(1, 2000, (4000, 2))
    multiples = np.arange(1, 40)[:, None] * (crop + 32) // 2 + np.array([[0, 1]])
    sizes = np.concatenate([random, multiples, multiples[:, ::-1]])
    squares = compute(lambda height, width: _square(height, width, transform), *sizes.T)
    assert squares.tolist() == [list(transform.square(*size)) for size in sizes.tolist()]


@pytest.mark.parametrize(
    "cropping", [RandomResizedCrop(), RandomResizedCrop(0.6), ERandomCrop(224), ERandomCrop(64, 0.5)]
)
def test_random_windows_are_those_of_the_transform(cropping):
    """Of 4000 sizes, among them shapes that no attempt fits and images of a few pixels."""
    transform = TrainTransform(224, 3, cropping)
    rng = np.random.default_rng(0)
    sizes = np.concatenate([rng.integers(1, 2000, (3000, 2)), rng.integers(1, 12, (1000, 2))])
    draws = np.stack([transform.draw_crop(0, index)[1:] for index in range(len(sizes))])
    height, width, *columns = [*sizes.T, *draws.T]

    def rule(height, width, *draw):
        return _train_window(height, width, fn.stack(*draw), cropping)

    windows = compute(rule, height, width, *columns)
    expected = [cropping.window(*size, draw) for size, draw in zip(sizes.tolist(), draws, strict=True)]
    assert windows.tolist() == [list(window) for window in expected]
