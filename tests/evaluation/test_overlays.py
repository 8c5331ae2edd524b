import io

import numpy as np
import pytest
from PIL import Image

from resnest_imagenet.evaluation.overlays import encode_index_png, overlay_mask, paint_mask

VOID = 255
PALETTE = np.array([[0, 0, 0], [255, 10, 20], [30, 200, 40]], np.uint8)
RNG = np.random.default_rng(0)
MASK = RNG.choice(np.array([0, 1, 2, VOID], np.uint8), (5, 7))
IMAGE = RNG.integers(0, 256, (5, 7, 3), dtype=np.uint8)


def test_each_pixel_has_the_colour_of_its_class():
    picture = paint_mask(MASK, PALETTE)
    assert picture.dtype == np.uint8 and picture.shape == (5, 7, 3)
    for place in np.ndindex(MASK.shape):
        label = MASK[place]
        assert picture[place].tolist() == ([224, 224, 192] if label == VOID else PALETTE[label].tolist())


@pytest.mark.parametrize("opacity", [0, 0.25, 0.5, 1])
def test_the_image_is_seen_through_the_mask(opacity):
    picture = overlay_mask(IMAGE, MASK, PALETTE, opacity)
    assert picture.dtype == np.uint8
    for place in np.ndindex(MASK.shape):
        if MASK[place] == VOID:
            assert picture[place].tolist() == IMAGE[place].tolist()
        else:
            expected = (1 - opacity) * IMAGE[place].astype(float) + opacity * PALETTE[MASK[place]].astype(float)
            assert np.abs(picture[place] - expected).max() < 1


@pytest.mark.parametrize("num_classes", [1, 3, 150, 255])
def test_an_index_png_has_the_classes_and_their_colours(num_classes):
    palette = RNG.integers(0, 256, (num_classes, 3), dtype=np.uint8)
    mask = RNG.choice(np.array([*range(num_classes), VOID], np.uint8), (20, 30))
    encoded = encode_index_png(mask, palette)
    picture = Image.open(io.BytesIO(encoded))
    assert (picture.format, picture.mode, encoded[24]) == ("PNG", "P", 8)  # bits of a value: most readers want 8
    np.testing.assert_array_equal(np.asarray(picture), mask)
    np.testing.assert_array_equal(np.asarray(picture.convert("RGB")), paint_mask(mask, palette))


def test_an_index_png_of_one_class():
    """Few values are still stored in 8 bits."""
    encoded = encode_index_png(np.zeros((4, 4), np.uint8), PALETTE)
    assert encoded[24] == 8 and not np.asarray(Image.open(io.BytesIO(encoded))).any()
