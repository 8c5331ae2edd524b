import functools
import itertools
import math

import numpy as np
import pytest
from PIL import Image

from conftest import compose_config
from resnest_imagenet.commands.launch import find_conf
from resnest_imagenet.config import TrainConfig
from resnest_imagenet.config_reading import EvalConfig
from resnest_imagenet.data.transforms import ERandomCrop, EvalTransform, RandomResizedCrop, TrainTransform
from resnest_imagenet.randomness import Purpose, uniform_rows


def windows(transform, height, width, draws=4000):
    """Return the windows of `draws` samples of an image of this size: (draws, 4)."""
    _, drawn = transform.draw_crops(0, range(draws))
    return np.array([transform.cropping.window(height, width, draw) for draw in drawn.tolist()])


def test_draws_are_a_function_of_seed_epoch_and_sample():
    transform = TrainTransform(224, seed=1)
    mirrors, draws = transform.draw_crops(2, range(8))
    for index in range(8):
        (mirror,), (draw,) = transform.draw_crops(2, [index])
        assert mirror.tolist() == mirrors[index].tolist()
        np.testing.assert_array_equal(draw, draws[index])
    assert 0 < mirrors[:, 0].sum() < 8 and not mirrors[:, 1].any()
    others = [
        TrainTransform(224, seed=2).draw_crops(2, [7]),
        transform.draw_crops(3, [7]),
        transform.draw_crops(2, [6]),
    ]
    assert all((draws[7] != other).all() for _, other in others)


@pytest.mark.parametrize("cropping", [RandomResizedCrop(), ERandomCrop(224)])
@pytest.mark.parametrize(("height", "width"), [(375, 500), (500, 333), (64, 64), (30, 900), (1, 1)])
def test_windows_lie_within_the_image(height, width, cropping):
    top, left, h, w = windows(TrainTransform(224, 0, cropping), height, width, 500).T
    assert (top >= 0).all() and (left >= 0).all() and (h >= 1).all() and (w >= 1).all()
    assert (top + h <= height).all() and (left + w <= width).all()


def largest_gap(values, distribution):
    """Return Kolmogorov's distance between values and a distribution function; below .0115 for 99 % of 20,000 draws."""
    expected = distribution(np.sort(values))
    return max(np.abs(expected - np.arange(len(values) + side)[side:] / len(values)).max() for side in (0, 1))


def test_area_and_aspect_of_the_resized_crop_are_distributed_as_defined():
    """On a large square every attempt below an area of 3/4 fits: sqrt(.75 * 4/3) = 1."""
    _, _, h, w = windows(TrainTransform(224, seed=0), 3000, 3000, 20000).T
    area, aspect = h * w / 3000**2, w / h
    is_small = area < 0.75
    assert is_small.mean() > 0.7
    assert largest_gap(area[is_small], lambda a: (a - 0.08) / 0.67) < 0.0136
    assert largest_gap(np.log(aspect[is_small]) / math.log(4 / 3), lambda a: (a + 1) / 2) < 0.0136
    # On a photograph's shape more of the wide ones fit, and the large ones are rarer.
    _, _, h, w = windows(TrainTransform(224, seed=0), 375, 500, 20000).T
    assert (h * w / (375 * 500)).mean() == pytest.approx(0.434, abs=0.006)


def test_height_and_aspect_of_erandomcrop_are_distributed_as_defined():
    """Aspect uniform in 3/4..4/3, height uniform between those of a tenth and of all of the area, cut at the edges."""
    side = 3000
    _, _, h, w = windows(TrainTransform(224, 0, ERandomCrop(224)), side, side, 20000).T
    aspect = w / h
    assert largest_gap(aspect, lambda r: (r - 3 / 4) / (4 / 3 - 3 / 4)) < 0.0115
    lowest, highest = side * np.sqrt(0.1 / aspect), np.minimum(side / np.sqrt(aspect), np.minimum(side, side / aspect))
    assert largest_gap((h - lowest) / (highest - lowest), lambda place: place.clip(0, 1)) < 0.0115
    _, _, h, w = windows(TrainTransform(224, 0, ERandomCrop(224)), 375, 500, 20000).T
    area = h * w / (375 * 500)
    assert area.mean() == pytest.approx(0.387, abs=0.006)
    assert area.min() >= 0.1 - 1e-9


def test_erandomcrop_takes_the_evaluation_square_where_nothing_fits():
    cropping = ERandomCrop(224)
    _, (draw,) = TrainTransform(224, 0, cropping).draw_crops(0, [0])
    assert cropping.window(20, 3000, draw) == EvalTransform(224, "crop_resize", None).square(20, 3000)
    draw[2:12], draw[12:] = 1.0, 1.0  # the whole of a square
    assert cropping.window(256, 256, draw) == (16, 16, 224, 224)


def test_positions_and_flips_are_uniform():
    transform = TrainTransform(224, seed=0)
    top, left, h, w = windows(transform, 600, 900).T
    assert (top / (600 - h + 1)).mean() == pytest.approx(0.5, abs=0.02)
    assert (left / (900 - w + 1)).mean() == pytest.approx(0.5, abs=0.02)
    mirrored, draws = transform.draw_crops(0, range(4000))
    assert mirrored.mean(0).tolist() == [pytest.approx(0.5, abs=0.03), 0]
    both = TrainTransform(224, seed=0, vertical_flip=0.5)
    mirrored_too, same_draws = both.draw_crops(0, range(4000))
    np.testing.assert_array_equal(mirrored_too[:, 0], mirrored[:, 0])
    np.testing.assert_array_equal(same_draws, draws)
    assert np.corrcoef(mirrored_too.T)[0, 1] == pytest.approx(0, abs=0.05)
    assert mirrored_too[:, 1].mean() == pytest.approx(0.5, abs=0.03)
    # The draws of runs before there were vertical flips.
    u = uniform_rows(0, Purpose.CROP, 0, range(4000), 23)
    np.testing.assert_array_equal(mirrored[:, 0], u[:, 0] < 0.5)
    np.testing.assert_array_equal(draws, transform.cropping.scale(u[:, 1:]))


def test_an_extreme_shape_takes_the_largest_centre_crop():
    draw = np.full(22, 10.0)  # no attempt fits
    assert RandomResizedCrop().window(300, 3000, draw) == (0, 1300, 300, 400)
    assert RandomResizedCrop().window(3000, 300, draw) == (1300, 0, 400, 300)
    assert RandomResizedCrop().window(300, 310, draw) == (0, 0, 300, 310)


# What stands beside a number under each protocol of conf/protocol/.
PROTOCOLS = {
    ("paper", 224): "short side 256 bilinear, centre crop 224",
    ("paper", 256): "short side 293 bilinear, centre crop 256",
    ("paper", 320): "short side 366 bicubic, centre crop 320",
    ("paper", 416): "short side 475 bicubic, centre crop 416",
    ("ecentercrop", 224): "centre square of 0.875 of the short side, resized to 224 bicubic",
    ("ecentercrop", 256): "centre square of 0.888889 of the short side, resized to 256 bicubic",
    ("ecentercrop", 320): "centre square of 0.909091 of the short side, resized to 320 bicubic",
    ("ecentercrop", 416): "centre square of 0.928571 of the short side, resized to 416 bicubic",
    ("full", 224): "short side 224 bilinear, centre crop 224",
    ("full", 256): "short side 256 bilinear, centre crop 256",
    ("full", 320): "short side 320 bicubic, centre crop 320",
    ("full", 416): "short side 416 bicubic, centre crop 416",
}


@functools.cache
def compose_protocol(name):
    """Return the options of a protocol in training's configuration, and what evaluation's changes."""
    choice = [] if name == "paper" else [f"protocol={name}"]
    training = compose_config("train", TrainConfig, *choice, "data.root=x").protocol.model_dump()
    return training, compose_config("eval", EvalConfig, *choice, "ckpt=x", "data.root=x").protocol.list_changes()


@pytest.mark.parametrize(("name", "crop"), PROTOCOLS)
def test_the_shipped_protocols_in_words(name, crop):
    """Composed as either command does; the paper's is the default of training and in the class."""
    training, evaluation = compose_protocol(name)
    assert evaluation == ({} if name == "paper" else training)  # the default is the checkpoint's own
    for options in (training, evaluation):
        transform = EvalTransform(crop, **options)
        assert transform.protocol == PROTOCOLS[name, crop]
        if name == "paper":
            assert transform == EvalTransform(crop)
        if name == "ecentercrop":
            assert transform.resolved_ratio == pytest.approx(
                {224: 0.875, 256: 0.889, 320: 0.909, 416: 0.929}[crop], abs=5e-4
            )


def test_every_shipped_protocol_is_named_here():
    of_images = {path.stem for path in (find_conf() / "protocol").iterdir() if "\norder:" in path.read_text()}
    assert of_images == {"own", *(name for name, _ in PROTOCOLS)}


def test_other_options_stand_in_the_words_too():
    bilinear = EvalTransform(320, "crop_resize", None, "bilinear", antialias=False)
    words = "centre square of 0.909091 of the short side, resized to 320 bilinear, no antialiasing"
    assert bilinear.protocol == words
    assert EvalTransform(224, ratio=None, antialias=False).protocol == (
        "short side 256 bilinear, centre crop 224, no antialiasing"
    )
    assert EvalTransform(224, ratio=0.9, interpolation="bicubic").protocol == "short side 249 bicubic, centre crop 224"


SQUARES = [
    EvalTransform(crop, "crop_resize", ratio) for crop, ratio in ((224, None), (320, None), (64, 0.5), (64, 1.0))
]


@pytest.mark.parametrize("transform", SQUARES)
def test_squares_are_what_pillow_crops(transform):
    """A box of floats on images whose pixels are their own numbers, many with an edge on a half."""
    halves = 0
    for height, width in itertools.product(range(1, 90), (1, 40, 61, 62, 63, 75, 500)):
        side = transform.resolved_ratio * min(height, width)
        top, left = round((height - side) / 2), round((width - side) / 2)
        marked = Image.fromarray(np.arange(height * width, dtype=np.int32).reshape(height, width))
        theirs = np.array(marked.crop((left, top, left + side, top + side)))
        halves += ((height - side) / 2 % 1 == 0.5) + ((top + side) % 1 == 0.5)
        top, left, h, w = transform.square(height, width)
        assert top >= 0 and left >= 0 and top + h <= height and left + w <= width
        if theirs.size:
            np.testing.assert_array_equal(np.array(marked)[top : top + h, left : left + w], theirs)
        else:  # half of a pixel; a crop needs one
            assert min(h, w) == 1
    assert halves > 10


def test_a_square_of_next_to_nothing_is_a_pixel():
    assert EvalTransform(32, "crop_resize", 0.01).square(20, 30) == (10, 15, 1, 1)


@pytest.mark.parametrize("size", [(375, 500), (500, 375), (333, 500), (224, 225), (500, 501), (100, 701)])
@pytest.mark.parametrize("ratio", [0.875, 1.0])
@pytest.mark.slow
def test_evaluation_windows_are_torchvisions(size, ratio):
    from torchvision.transforms import v2

    transform = EvalTransform(224, ratio=ratio)
    marked = Image.fromarray(np.arange(size[0] * size[1], dtype=np.int32).reshape(size))
    resized = v2.functional.resize(marked, [round(224 / ratio)], v2.InterpolationMode.NEAREST)
    height, width = transform.resized(*size)
    assert (height, width) == (resized.height, resized.width)
    top, left, h, w = transform.window(height, width)
    ours = resized.crop((left, top, left + w, top + h))
    np.testing.assert_array_equal(np.array(ours), np.array(v2.functional.center_crop(resized, [224, 224])))


@pytest.mark.parametrize("size", [(375, 500), (10, 320), (320, 10), (1, 1)])
def test_what_is_resized_is_the_whole_of_an_ordinary_image(size):
    assert EvalTransform(224).source(*size) == (0, 0, *size)


@pytest.mark.parametrize(("size", "source"), [((20000, 1), (9984, 0, 32, 1)), ((3, 40000), (0, 19952, 3, 96))])
def test_of_a_line_of_pixels_only_the_middle_is_resized(size, source):
    transform = EvalTransform(416)
    assert transform.source(*size) == source
    height, width = transform.resized(*source[2:])
    assert height * width <= 32 * 475**2
    top, left, h, w = transform.window(height, width)
    assert top >= 0 and left >= 0 and top + h <= height and left + w <= width
