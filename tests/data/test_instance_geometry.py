"""Scaling and mirroring images with objects: sizes, pixels, boxes and masks against naive transcriptions."""

import numpy as np
import pytest
from PIL import Image

from resnest_imagenet.data.instance_geometry import InstanceTransform, View, move_boxes, scale_short_side

RANGE = tuple(range(640, 801))
CHOICE = (640, 672, 704, 736, 768, 800)


def test_the_published_sizes():
    """COCO's usual 640 x 480; 1067 where rounding down gives 1066; the bound of the long side."""
    assert scale_short_side(480, 640, 800, 1333) == (800, 1067)
    assert scale_short_side(640, 480, 800, 1333) == (1067, 800)
    assert scale_short_side(426, 640, 800, 1333) == (800, 1202)
    assert scale_short_side(333, 640, 800, 1333) == (694, 1333)
    assert scale_short_side(500, 500, 640, 1333) == (640, 640)
    assert scale_short_side(1, 5000, 800, 1333) == (1, 1333)


def scale_slowly(height, width, short_side, longest):
    """What the two sides are after one step, then the other."""
    factor = short_side * 1.0 / min(height, width)
    sides = [short_side if side is min(height, width) else factor * side for side in (height, width)]
    if height == width:
        sides = [short_side, short_side]
    if max(sides) > longest:
        again = longest * 1.0 / max(sides)
        sides = [side * again for side in sides]
    return tuple(int(np.floor(side + 0.5)) for side in sides)


def test_sizes_are_bounded_and_rounded_half_up():
    rng = np.random.default_rng(0)
    for height, width, short_side in zip(*rng.integers(100, 900, (3, 3000)).tolist(), strict=True):
        size = scale_short_side(height, width, short_side, 1333)
        assert size == scale_slowly(height, width, short_side, 1333)
        assert max(size) <= 1333 and (min(size) == short_side or max(size) == 1333)


@pytest.mark.parametrize("sizes", [RANGE, CHOICE])
def test_every_size_is_drawn_alike_often_and_half_are_mirrored(sizes):
    transform = InstanceTransform(3, sizes)
    views = [transform.draw(epoch, index, 480, 640) for epoch in range(2) for index in range(4000)]
    heights = [view.height for view in views]
    counts = np.array([heights.count(size) for size in sizes])
    expected = len(views) / len(sizes)
    assert counts.sum() == len(views) and abs(counts - expected).max() < 5 * expected**0.5
    mirrored = np.array([view.is_mirrored for view in views])
    assert abs(mirrored.mean() - 0.5) < 0.03
    assert abs(np.corrcoef(heights, mirrored)[0, 1]) < 0.05
    assert views[:4000] != views[4000:] and views[7] == transform.draw(0, 7, 480, 640)
    assert InstanceTransform(4, sizes).draw(0, 7, 480, 640) != views[7] or views[8] != views[7]


def test_evaluation_has_one_size_and_no_flip():
    transform = InstanceTransform(0, (800,), flip=0.0)
    assert {transform.draw(epoch, 1, 480, 640) for epoch in range(20)} == {View(800, 1067, False)}


def move_slowly(box, original, size, is_mirrored):
    x1, y1, x2, y2 = (float(side) for side in box)
    across, down = size[1] / original[1], size[0] / original[0]
    x1, x2, y1, y2 = x1 * across, x2 * across, y1 * down, y2 * down
    if is_mirrored:
        x1, x2 = size[1] - x2, size[1] - x1
    return [max(0, x1), max(0, y1), min(size[1], x2), min(size[0], y2)]


@pytest.mark.parametrize("is_mirrored", [False, True])
def test_boxes_move_with_their_image(is_mirrored):
    rng = np.random.default_rng(0)
    corners = np.sort(rng.uniform(0, 1, (50, 2, 2)), 1).reshape(50, 4) * [640, 427, 640, 427]
    boxes = np.vstack([corners, [[0, 0, 640, 427]]]).astype(np.float32)
    moved = move_boxes(boxes, (427, 640), View(711, 1066, is_mirrored))
    expected = [move_slowly(box, (427, 640), (711, 1066), is_mirrored) for box in boxes]
    assert moved.dtype == np.float32 and np.allclose(moved, expected, rtol=1e-6, atol=1e-4)
    assert moved[-1].tolist() == [0, 0, 1066, 711]
    assert move_boxes(np.zeros((0, 4), np.float32), (4, 4), View(2, 2, is_mirrored)).shape == (0, 4)


def test_pixels_boxes_and_masks_stay_together():
    """A white rectangle is where its box, its polygon and its code are, whatever is drawn."""
    codec = pytest.importorskip("pycocotools.mask")
    pixels = np.zeros((60, 90, 3), np.uint8)
    pixels[10:30, 20:70] = 255
    box = np.array([[20, 10, 70, 30]] * 2, np.float32)
    polygon = [np.array([20.0, 10, 70, 10, 70, 30, 20, 30])]
    code = codec.encode(np.asfortranarray(pixels[..., 0] // 255))
    transform = InstanceTransform(0, tuple(range(100, 161)), longest=210)
    labels, flips = np.array([4, 5]), set()
    for index in range(8):
        image, target = transform.apply(Image.fromarray(pixels), box, labels, [polygon, code], 2, index, used=9)
        view = transform.draw(2, index, 60, 90)
        flips.add(view.is_mirrored)
        resized = np.array(Image.fromarray(pixels).resize((view.width, view.height), Image.Resampling.BILINEAR))
        assert np.array_equal(image, resized[:, ::-1] if view.is_mirrored else resized)
        assert (target.index, target.size, target.original) == (9, (view.height, view.width), (60, 90))
        assert target.labels.tolist() == [4, 5] and target.size == image.shape[:2]
        rows, columns = (np.flatnonzero((image[..., 0] > 127).any(axis)) for axis in (1, 0))
        seen = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
        x, y = target.masks[0][0].reshape(-1, 2).T
        left, top, width, height = codec.toBbox(target.masks[1])
        assert np.allclose(target.boxes, [seen, seen], atol=1)
        assert np.allclose([x.min(), y.min(), x.max(), y.max()], target.boxes[0], atol=1e-3)
        assert np.allclose([left, top, left + width, top + height], seen, atol=1)
    assert flips == {False, True}


def test_objects_of_which_nothing_is_left_are_dropped():
    codec = pytest.importorskip("pycocotools.mask")
    dot = np.zeros((60, 90), np.uint8, order="F")
    dot[0, 0] = 1
    boxes = np.array([[0, 0, 1, 1], [5, 5, 30, 30], [90, 60, 90, 60]], np.float32)
    masks = [codec.encode(dot), [np.array([5.0, 5, 30, 5, 30, 30])], [np.array([90.0, 60, 90, 60, 90, 60])]]
    transform = InstanceTransform(0, (6,), flip=0.0)
    image = Image.new("RGB", (90, 60))
    _, target = transform.apply(image, boxes, np.arange(3), masks, 0, 0)
    assert target.labels.tolist() == [1] and len(target.masks) == len(target) == 1
    _, target = transform.apply(image, boxes, np.arange(3), None, 0, 0)
    assert target.labels.tolist() == [0, 1] and target.masks is None
