import numpy as np
import pytest

from resnest_imagenet.evaluation.box_pictures import draw_detections, make_box_palette

PALETTE = np.array([(250, 10, 10), (10, 250, 10), (10, 10, 250)], np.uint8)
CLASSES = ("disk", "a very long name that is wider than the picture", "日本\n")


def draw(boxes, labels, size=(120, 160), **options):
    picture = np.full((*size, 3), 128, np.uint8)
    drawn = draw_detections(picture, np.array(boxes), np.array(labels, int), CLASSES, PALETTE, **options)
    assert (picture == 128).all() and drawn.dtype == np.uint8 and drawn.shape == picture.shape
    return drawn


def test_a_box_is_a_line_around_its_pixels():
    drawn = draw([(30, 50, 90, 100)], [0])
    is_line = (drawn == PALETTE[0]).all(2)
    assert is_line[50, 30:90].all() and is_line[99, 30:90].all() and is_line[50:100, 30].all()
    assert is_line[50:100, 89].all()
    assert not is_line[51:99, 31:89].any() and not is_line[100:].any() and not is_line[:, 90:].any()


def test_names_have_a_ground_of_their_colour():
    without = draw([(30, 50, 90, 100)], [2])
    named = draw([(30, 50, 90, 100)], [0], scores=np.array([0.876]))
    label = named[30:50, 30:100]
    assert (label == PALETTE[0]).all(2).any() and (label.min(2) > 200).any()  # white letters, with soft edges
    assert not (without[:, 100:] != 128).any()
    assert (named[:50] != draw([(30, 50, 90, 100)], [0], scores=np.array([0.12]))[:50]).any()


def test_letters_are_seen_on_bright_grounds():
    drawn = draw([(30, 50, 90, 100)], [1], scores=np.ones(1))
    assert (drawn.max(2) < 60).any() and not (drawn.min(2) > 200).any()


def test_masks_are_mixed_and_the_first_lies_on_top():
    masks = np.zeros((2, 120, 160), bool)
    masks[0, 60:70, 40:50] = True
    masks[1, 65:75, 40:50] = True
    drawn = draw([(20, 40, 100, 110)] * 2, [0, 1], masks=list(masks), opacity=0.5)
    first, second = (np.round(0.5 * 128 + 0.5 * PALETTE[label].astype(float)) for label in (0, 1))
    assert (drawn[60:70, 40:50] == first).all() and (drawn[70:75, 40:50] == second).all()
    assert (drawn[80:90, 40:50] == 128).all()


@pytest.mark.parametrize("size", [(1, 1), (3, 400), (2000, 30), (120, 160)])
@pytest.mark.parametrize(
    "box", [(0, 0, 1, 1), (-50, -50, 5000, 5000), (0.2, 0.3, 0.4, 0.5), (30, 2, 31, 3), (159, 119, 160, 120)]
)
def test_any_box_fits_any_picture(box, size):
    for label in range(3):
        drawn = draw([box], [label], size, scores=np.array([0.5]))
        assert (drawn != 128).any()


def test_nothing_to_draw():
    assert (draw(np.zeros((0, 4)), []) == 128).all()
    assert (draw(np.zeros((0, 4)), [], masks=[], scores=np.zeros(0)) == 128).all()


def test_colours_of_neighbours_differ():
    palette = make_box_palette(80).astype(int)
    assert palette.shape == (80, 3) and len({tuple(colour) for colour in palette.tolist()}) == 80
    assert abs(np.diff(palette, axis=0)).sum(1).min() > 100
    assert make_box_palette(1).dtype == np.uint8
