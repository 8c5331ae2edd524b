import math

import numpy as np
import pytest
import torch

from resnest_imagenet.evaluation.masks import (
    Patch,
    decode_mask,
    encode_masks,
    encode_patch,
    measure_area,
    paste_mask,
    paste_masks,
)

SIZE = (37, 53)
# Within the image; over each border; larger than the image; narrower than a pixel; on whole pixels; in a corner.
BOXES = [
    (10.3, 5.6, 30.9, 33.2),
    (0.0, 0.0, 20.4, 11.7),
    (30.2, 20.9, 53.0, 37.0),
    (-9.0, -4.5, 70.0, 50.0),
    (12.2, 3.1, 12.7, 30.0),
    (8.0, 8.0, 22.0, 36.0),
    (52.4, 36.2, 53.0, 37.0),
    (0.0, 0.0, 53.0, 37.0),
]


def draw_cells(side=28, seed=0):
    """Draw probabilities with some structure: smooth noise."""
    torch.manual_seed(seed)
    coarse = torch.randn(len(BOXES), 1, 6, 6)
    return torch.nn.functional.interpolate(coarse, size=side, mode="bicubic")[:, 0].mul(3).sigmoid()


def paste_naively(cells, box, size):
    """Interpolate at the centre of each pixel of the image, one by one, in float64."""
    x1, y1, x2, y2 = box
    side = len(cells)
    pasted = np.zeros(size)
    for row in range(size[0]):
        for column in range(size[1]):
            u, v = (column + 0.5 - x1) / (x2 - x1) * side - 0.5, (row + 0.5 - y1) / (y2 - y1) * side - 0.5
            for i in (math.floor(v), math.floor(v) + 1):
                for j in (math.floor(u), math.floor(u) + 1):
                    if 0 <= i < side and 0 <= j < side:
                        pasted[row, column] += cells[i][j] * (1 - abs(u - j)) * (1 - abs(v - i))
    return pasted


def fill(patch, size=SIZE):
    pixels = np.zeros(size, bool)
    height, width = patch.pixels.shape
    pixels[patch.top : patch.top + height, patch.left : patch.left + width] = patch.pixels
    return pixels


def test_pasting_equals_a_naive_transcription():
    cells = draw_cells()
    patches = paste_masks(cells, torch.tensor(BOXES), SIZE)
    counts = []
    for probabilities, box, patch in zip(cells.double().tolist(), BOXES, patches, strict=True):
        pasted = paste_naively(probabilities, box, SIZE)
        clear = abs(pasted - 0.5) > 1e-5
        np.testing.assert_array_equal(fill(patch)[clear], pasted[clear] >= 0.5)
        assert clear.mean() > 0.99
        counts.append(fill(patch).sum())
    assert min(counts[:4]) > 20


def test_a_full_mask_fills_the_pixels_whose_centres_are_in_the_box():
    """Cells of 1 fall to .5 at the border of the box: its pixels are those that the box's rule would give."""
    for box in BOXES[:3]:
        pixels = fill(paste_mask(torch.ones(28, 28), box, SIZE))
        x, y = np.arange(SIZE[1]) + 0.5, np.arange(SIZE[0]) + 0.5
        expected = np.outer((y >= box[1]) & (y <= box[3]), (x >= box[0]) & (x <= box[2]))
        np.testing.assert_array_equal(pixels, expected)


def test_the_threshold_counts():
    assert paste_mask(torch.full((28, 28), 0.5001), (10, 10, 38, 38), (60, 60)).pixels.sum() == 28 * 28
    assert not paste_mask(torch.full((28, 28), 0.4999), (10, 10, 38, 38), (60, 60)).pixels.any()


def test_codes_are_those_of_the_whole_image():
    mask = pytest.importorskip("pycocotools.mask")
    cells, boxes = draw_cells(), torch.tensor(BOXES)
    for counts, patch in zip(encode_masks(cells, boxes, SIZE), paste_masks(cells, boxes, SIZE), strict=True):
        pixels = fill(patch)
        assert counts == mask.encode(np.asfortranarray(pixels.astype(np.uint8)))["counts"]
        np.testing.assert_array_equal(decode_mask(counts, SIZE), pixels)
        assert measure_area(counts, SIZE) == pixels.sum()


@pytest.mark.parametrize("content", ["empty", "full", "left", "below", "dots", "nothing"])
def test_codes_of_runs_that_meet(content):
    """Runs that end at the lower border and begin at the upper one are one run; the code may begin with a mask."""
    mask = pytest.importorskip("pycocotools.mask")
    pixels = np.zeros(SIZE, bool)
    if content == "full":
        pixels[:] = True
    elif content == "left":
        pixels[:, :7] = True
    elif content == "below":
        pixels[20:, 5:9] = True
        pixels[:3, 7:] = True
    elif content == "dots":
        pixels[::2, ::2] = True
    patch = Patch(pixels[:, :0] if content == "nothing" else pixels, 0, 0)
    code = encode_patch(patch, SIZE)
    assert code["size"] == list(SIZE)
    assert code["counts"] == mask.encode(np.asfortranarray(pixels.astype(np.uint8)))["counts"]
