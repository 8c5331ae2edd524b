"""Masks of objects: packed and unpacked, scaled and mirrored."""

import numpy as np
import pytest
from PIL import Image

from resnest_imagenet.data.masks import MaskPacker, count_pixels, move_mask

SIZES = [((20, 30), (40, 60)), ((20, 30), (13, 47)), ((20, 30), (20, 30)), ((31, 17), (9, 5)), ((1, 3), (7, 8))]


def test_packs_polygons_and_codes_and_selects_some():
    packer = MaskPacker()
    polygons = [
        [0.5, 100.07, 3, 4, 5, 6],  # no float32
        [1, 2, 3, 4, 5, 6, 7, 8.0],
    ]
    masks = [polygons, {"size": [2, 3], "counts": "06"}, None, [polygons[1]], {"size": [3, 2], "counts": "15"}]
    for mask in masks:
        packer.add(mask)
    with pytest.raises(ValueError, match="neither lists of numbers"):
        packer.add([polygons[0], [1, 2, 3, "4", 5, 6]])
    packed = packer.pack()
    assert len(packed) == 5 and packed.is_empty.tolist() == [False, False, True, False, False]
    assert [polygon.tolist() for polygon in packed[0]] == polygons
    assert packed[1] == {"size": [2, 3], "counts": b"06"} and packed[2] == []
    assert [polygon.tolist() for polygon in packed[3]] == [polygons[1]]
    chosen = packed.select(np.array([4, 3, 1]))
    assert chosen[0] == packed[4] and chosen[2] == packed[1] and np.shares_memory(chosen.bounds, packed.bounds)
    assert [mask["counts"] for mask in chosen[::2]] == [b"15", b"06"]
    assert len(MaskPacker().pack()) == 0


def decode_slowly(code):
    """The runs of a code, character by character, as cocoapi's common/maskApi.c describes it."""
    runs, place = [], 0
    while place < len(code):
        value, shift, more = 0, 0, True
        while more:
            digit = code[place] - 48
            value |= (digit & 31) << shift
            more = digit & 32
            place, shift = place + 1, shift + 5
        value -= (1 << shift) if digit & 16 else 0
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
    return runs


def test_counts_the_pixels_of_a_code():
    mask = pytest.importorskip("pycocotools.mask")
    rng = np.random.default_rng(0)
    for _ in range(50):
        height, width = rng.integers(1, 300, 2).tolist()
        patches = Image.fromarray((rng.random((4, 4)) < 0.5).astype(np.uint8)).resize((width, height))
        noise = rng.random((height, width)) < rng.choice([0, 0.01, 0.5])
        code = mask.encode(np.asfortranarray(np.array(patches) ^ noise))["counts"]
        assert count_pixels(code) == sum(decode_slowly(code)) == height * width
    assert count_pixels(mask.frPyObjects({"size": [60000, 60000], "counts": [5, 3599999995]}, 60000, 60000)["counts"])


@pytest.mark.parametrize("code", [b"", b"\xff\xff", b"o" * 40, b"P", b"06o", b"0 6", b"N", b"o" * 8 + b"0"])
def test_a_damaged_code_has_no_pixels(code):
    assert count_pixels(code) is None


@pytest.mark.parametrize("is_mirrored", [False, True])
@pytest.mark.parametrize("sizes", SIZES)
def test_a_code_moves_as_an_image_does_by_pillows_nearest_filter(sizes, is_mirrored):
    codec = pytest.importorskip("pycocotools.mask")
    original, size = sizes
    pixels = (np.random.default_rng(1).random(original) < 0.4).astype(np.uint8)
    moved = move_mask(codec.encode(np.asfortranarray(pixels)), original, size, is_mirrored)
    expected = np.array(Image.fromarray(pixels).resize(size[::-1], Image.Resampling.NEAREST))
    assert moved["size"] == list(size)
    assert np.array_equal(codec.decode(moved), expected[:, ::-1] if is_mirrored else expected)


def test_a_code_of_which_nothing_is_left_is_none():
    codec = pytest.importorskip("pycocotools.mask")
    pixels = np.zeros((20, 30), np.uint8, order="F")
    pixels[0, 0] = 1
    assert move_mask(codec.encode(pixels), (20, 30), (4, 6), False) is None


def test_polygons_move_with_their_image():
    polygons = [np.array([1.5, 2, 30, 0, 4, 20]), np.array([0.0, 0, 1, 1, 2, 0])]
    moved = move_mask(polygons, (20, 30), (50, 60), False)
    assert [polygon.tolist() for polygon in moved] == [[3, 5, 60, 0, 8, 50], [0, 0, 2, 2.5, 4, 0]]
    moved = move_mask(polygons, (20, 30), (50, 60), True)
    assert [polygon.tolist() for polygon in moved] == [[57, 5, 0, 0, 52, 50], [60, 0, 58, 2.5, 56, 0]]
    assert polygons[0].tolist() == [1.5, 2, 30, 0, 4, 20]
