"""Scale, flip and crop of an image and its mask: against Pillow's operations on whole images, in the paper's order."""

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from PIL import Image, ImageFilter, ImageOps

from resnest_imagenet.data.geometry import Placement, SceneTransform, crop_image, crop_mask, scale_long_side
from resnest_imagenet.data.scenes import VOID

TRAIN = SceneTransform(crop=48, base=60, seed=3)
SIZES = [(40, 90), (90, 40), (64, 64), (200, 133), (31, 47), (1, 300), (7, 3)]


def make_scene(height, width, detail=9):
    """Return a picture of random colours, coarse or fine, and a mask of random labels."""
    rng = np.random.default_rng([height, width])
    coarse = Image.fromarray(rng.integers(0, 256, (detail, detail, 3), dtype=np.uint8))
    mask = rng.integers(0, 6, (height, width), dtype=np.uint8)
    return coarse.resize((width, height), Image.Resampling.NEAREST), mask


def find_ties(place, size, crop):
    """Return where the centre of a scaled pixel lies between two pixels: floats decide there."""
    rows, columns = (np.arange(crop) + first for first in (place.top, place.left))
    ties = ((2 * rows + 1) * size[0] % (2 * place.height) == 0)[:, None]
    return ties | ((2 * columns + 1) * size[1] % (2 * place.width) == 0)


def transform_whole(picture, mask, place, crop):
    """Transcribe the order of the reference: the whole scene is flipped, scaled, padded, then cropped and blurred."""
    masked = Image.fromarray(mask)
    if place.is_mirrored:
        picture, masked = (part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for part in (picture, masked))
    picture = picture.resize((place.width, place.height), Image.Resampling.BILINEAR)
    masked = masked.resize((place.width, place.height), Image.Resampling.NEAREST)
    border = (0, 0, max(crop - place.width, 0), max(crop - place.height, 0))
    picture, masked = ImageOps.expand(picture, border, 0), ImageOps.expand(masked, border, VOID)
    window = (place.left, place.top, place.left + crop, place.top + crop)
    picture, masked = picture.crop(window), masked.crop(window)
    if place.blur:
        picture = picture.filter(ImageFilter.GaussianBlur(place.blur))
    return np.array(picture), np.array(masked)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("blur", [0.0, 1.0])
def test_equals_the_operations_on_the_whole_scene(size, blur):
    """The image to a rounding, the mask but for ties."""
    picture, mask = make_scene(*size)
    transform = replace(TRAIN, blur=blur)
    num_pixels = num_rounded = 0
    for index in range(60):
        image, labels = transform.apply(picture, mask, epoch=0, index=index)
        place = transform.draw(0, index, *size)
        expected, expected_labels = transform_whole(picture, mask, place, 48)
        assert np.abs(image.astype(int) - expected).max() <= 1
        num_rounded += (image != expected).sum() / 3
        assert not ((labels != expected_labels) & ~find_ties(place, size, 48)).any()
        num_pixels += labels.size
    assert num_rounded < 0.02 * num_pixels


def test_a_mask_is_sampled_at_exact_centres():
    _, mask = make_scene(37, 52)
    for height, width, is_mirrored in ((74, 104, False), (60, 85, True), (18, 26, True), (37, 52, False)):
        place = Placement(height, width, max(0, height - 48), max(0, (width - 48) // 2), is_mirrored)
        labels = crop_mask(mask, place, 48)
        for y in range(48):
            for x in range(48):
                row, column = place.top + y, place.left + x
                if row >= height or column >= width:
                    assert labels[y, x] == VOID
                    continue
                source_y = int((row + Fraction(1, 2)) * 37 / height)
                column = width - 1 - column if is_mirrored else column
                assert labels[y, x] == mask[source_y, int((column + Fraction(1, 2)) * 52 / width)]


@pytest.mark.parametrize("size", [(96, 128), (130, 75)])
def test_a_chessboard_stays_one_in_image_and_mask(size):
    """Away from the edges of its squares, where the bilinear filter mixes, both have the same squares."""
    rows, columns = np.indices(size)
    mask = ((rows // 20 + columns // 20) % 2).astype(np.uint8)
    picture = Image.fromarray(np.repeat(mask[..., None] * 255, 3, axis=-1))
    transform = SceneTransform(crop=90, base=120, seed=1, scales=(0.75, 2.0), blur=0.5)
    num_mirrored = 0
    for index in range(40):
        image, labels = transform.apply(picture, mask, epoch=2, index=index)
        place = transform.draw(2, index, *size)
        num_mirrored += place.is_mirrored
        height, width = min(90, place.height), min(90, place.width)
        assert (labels[:height, :width] < 2).all()
        assert (labels[height:] == VOID).all() and (labels[:, width:] == VOID).all()
        assert not image[height + 3 :].any() and not image[:, width + 3 :].any()  # black but for the blur
        inner = labels[:height, :width]
        near = np.zeros_like(inner, dtype=bool)
        for axis in (0, 1):
            for shift in (-3, -2, -1, 1, 2, 3):
                near |= np.roll(inner, shift, axis) != inner
        near[-4:], near[:, -4:] = True, True
        bright = image[:height, :width].mean(-1) > 127
        assert (~near).mean() > 0.2
        assert (bright[~near] == inner[~near]).all()
    assert 10 < num_mirrored < 30


def test_draws_cover_the_range_evenly():
    transform = SceneTransform(crop=480, base=520, seed=0)
    places = [transform.draw(0, index, 512, 683) for index in range(4000)]
    sides = np.array([place.width for place in places])
    assert sides.min() >= 260 and sides.max() <= 1040
    assert abs(sides.mean() - 650) < 15 and len(np.unique(sides)) > 700
    assert all(place.height == int(place.width * 512 / 683 + 0.5) for place in places)
    assert abs(np.mean([place.is_mirrored for place in places]) - 0.5) < 0.03
    for place in places:
        assert 0 <= place.top <= max(0, place.height - 480) and 0 <= place.left <= max(0, place.width - 480)
    share = [place.left / (place.width - 480) for place in places if place.width > 700]
    assert abs(np.mean(share) - 0.5) < 0.03 and min(share) < 0.01 and max(share) > 0.99


def test_both_ends_of_the_range_are_drawn():
    transform = SceneTransform(crop=32, base=10, seed=0)
    sides = {transform.draw(0, index, 40, 40).width for index in range(400)}
    assert sides == set(range(5, 21))


def test_draws_are_a_function_of_seed_epoch_and_scene():
    picture, mask = make_scene(64, 80)
    transform = replace(TRAIN, blur=0.5)
    image, labels = transform.apply(picture, mask, 4, 7)
    again, labels_again = transform.apply(picture, mask, 4, 7)
    assert np.array_equal(image, again) and np.array_equal(labels, labels_again)
    others = [transform.draw(4, 8, 64, 80), transform.draw(5, 7, 64, 80), replace(transform, seed=4).draw(4, 7, 64, 80)]
    assert all(place != transform.draw(4, 7, 64, 80) for place in others)


def test_the_blur_leaves_the_other_draws():
    draws = [replace(TRAIN, blur=blur).draw(0, index, 64, 80) for index in range(400) for blur in (0.0, 0.5)]
    plain, blurred = draws[::2], draws[1::2]
    assert [replace(place, blur=0.0) for place in blurred] == plain
    radii = np.array([place.blur for place in blurred])
    assert abs((radii > 0).mean() - 0.5) < 0.08
    assert 0.4 < radii[radii > 0].mean() < 0.6 and radii.max() < 1
    picture, _ = make_scene(64, 80, detail=40)
    sharp = crop_image(picture, replace(plain[0], blur=0.0), 48)
    assert np.abs(sharp.astype(int) - crop_image(picture, replace(plain[0], blur=1.0), 48)).max() > 20


def test_the_short_side_is_rounded_half_up_and_never_vanishes():
    assert scale_long_side(512, 683, 520) == (390, 520)
    assert scale_long_side(683, 512, 521) == (521, 391)
    assert scale_long_side(3, 2, 3) == (3, 2)
    assert scale_long_side(1, 2, 5) == (3, 5)  # 2.5
    assert scale_long_side(1, 3000, 500) == (1, 500)
