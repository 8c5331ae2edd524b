import itertools
import math

import numpy as np
import pytest
from PIL import Image
from torchvision.transforms import v2

from conftest import compose_config
from resnest_imagenet.commands.launch import find_conf
from resnest_imagenet.config import EvalConfig, TrainConfig
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


@pytest.mark.parametrize(("name", "crop"), PROTOCOLS)
def test_the_shipped_protocols_in_words(name, crop):
    """Composed as either command does; the paper's is the default, here and in the class."""
    choice = [] if name == "paper" else [f"protocol={name}"]
    for command, schema, needed in (("train", TrainConfig, []), ("eval", EvalConfig, ["ckpt=x"])):
        options = compose_config(command, schema, *choice, *needed, "data.root=x").protocol
        transform = EvalTransform(crop, **options.model_dump())
        assert transform.protocol == PROTOCOLS[name, crop]
        if name == "paper":
            assert transform == EvalTransform(crop)
        if name == "ecentercrop":
            assert transform.resolved_ratio == pytest.approx(
                {224: 0.875, 256: 0.889, 320: 0.909, 416: 0.929}[crop], abs=5e-4
            )


def test_every_shipped_protocol_is_named_here():
    assert {path.stem for path in (find_conf() / "protocol").iterdir()} == {name for name, _ in PROTOCOLS}


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
def test_evaluation_windows_are_torchvisions(size, ratio):
    transform = EvalTransform(224, ratio=ratio)
    marked = Image.fromarray(np.arange(size[0] * size[1], dtype=np.int32).reshape(size))
    resized = v2.functional.resize(marked, [round(224 / ratio)], v2.InterpolationMode.NEAREST)
    height, width = transform.resized(*size)
    assert (height, width) == (resized.height, resized.width)
    top, left, h, w = transform.window(height, width)
    ours = resized.crop((left, top, left + w, top + h))
    np.testing.assert_array_equal(np.array(ours), np.array(v2.functional.center_crop(resized, [224, 224])))
