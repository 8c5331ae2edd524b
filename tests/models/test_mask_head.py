"""What a mask head is trained on, against points within polygons; and its loss."""

import sys

import numpy as np
import pytest
import torch

from resnest_imagenet.errors import ConfigError


def is_inside(polygon, x, y):
    """Count the edges of a polygon that a ray to the right crosses."""
    corners = polygon.reshape(-1, 2)
    inside = np.zeros(np.broadcast(x, y).shape, bool)
    for (x1, y1), (x2, y2) in zip(corners, np.roll(corners, 1, axis=0), strict=True):
        if y1 != y2:
            inside ^= ((y1 > y) != (y2 > y)) & (x < x1 + (y - y1) / (y2 - y1) * (x2 - x1))
    return inside


def draw(polygons, box, side=28, samples=1):
    """Return the part of each cell of a box that lies within the polygons."""
    places = (np.arange(side * samples) + 0.5) / (side * samples)
    x, y = box[0] + places[None] * (box[2] - box[0]), box[1] + places[:, None] * (box[3] - box[1])
    inside = np.any([is_inside(polygon, x, y) for polygon in polygons], axis=0)
    return inside.reshape(side, samples, side, samples).mean((1, 3))


def make_objects():
    """Return the polygons of three objects: a star, two parts, and one that lies half outside the boxes."""
    angles = np.arange(10) * np.pi / 5
    radii = np.where(np.arange(10) % 2, 14.0, 33.0)
    star = np.stack((50.3 + radii * np.sin(angles), 41.7 - radii * np.cos(angles)), 1).flatten()
    parts = [np.array([10.2, 11.1, 40.7, 14.3, 22.9, 60.4]), np.array([60.1, 20, 90.8, 20, 90.8, 71.9, 60.1, 71.9])]
    return [[star], parts, [np.array([-20.0, 30.5, 55.5, 35.1, 48.2, 140.0, -30.3, 120.6])]]


BOXES = torch.tensor([[15.2, 6.1, 86.3, 70.9], [30.6, 20.2, 60.1, 55.5], [5.5, 8.8, 95.3, 75.1], [0, 0, 60.2, 90.7]])
MATCHED = [0, 0, 1, 2]


def test_polygons_are_drawn_within_boxes():
    """Cells whose centres lie inside; pycocotools has another rule for those that an edge crosses."""
    pytest.importorskip("pycocotools")
    from resnest_imagenet.models.masks import rasterise_masks

    objects = make_objects()
    drawn = rasterise_masks(objects, MATCHED, BOXES)
    assert drawn.dtype == torch.bool and drawn.shape == (4, 28, 28)
    for ours, match, box in zip(drawn.numpy(), MATCHED, BOXES.tolist(), strict=True):
        covered = draw(objects[match], box, samples=8)
        clear = (covered == 0) | (covered == 1)
        assert clear.sum() > 500 and 100 < covered.sum() < 700
        assert (ours[clear] == covered[clear]).all()
        assert abs(ours.sum() - covered.sum()) < 0.04 * covered.sum()


def test_a_rectangle_fills_its_cells_exactly():
    pytest.importorskip("pycocotools")
    from resnest_imagenet.models.masks import rasterise_masks

    box = [10.0, 20, 66, 76]  # cells of 2 x 2 pixels
    corners = np.array([24.0, 20, 66, 20, 66, 48, 24, 48])
    (drawn,) = rasterise_masks([[corners]], [0], torch.tensor([box]))
    expected = torch.zeros(28, 28, dtype=torch.bool)
    expected[:14, 7:] = True
    assert torch.equal(drawn, expected)
    (all_of_it,) = rasterise_masks([[corners]], [0], torch.tensor([[30.0, 22, 40, 40]]))
    assert all_of_it.all()


def test_run_lengths_are_cut_at_half_a_cell():
    """As a picture of the whole image, pooled by RoIAlign; the polygons' result but for the rim."""
    coco = pytest.importorskip("pycocotools.mask")
    from resnest_imagenet.models.masks import rasterise_masks

    objects = make_objects()
    grid = [(np.arange(length) + 0.5) for length in (96, 128)]
    pictures = [np.any([is_inside(p, grid[1][None], grid[0][:, None]) for p in o], axis=0) for o in objects]
    codes = [coco.encode(np.asfortranarray(picture.astype(np.uint8))) for picture in pictures]
    of_codes, of_polygons = (rasterise_masks(masks, MATCHED, BOXES) for masks in (codes, objects))
    for ours, expected in zip(of_codes, of_polygons, strict=True):
        assert (ours & expected).sum() / (ours | expected).sum() > 0.93
    import naive_detector as naive
    from resnest_imagenet.models.rcnn_options import RCNNOptions

    pooled = naive.align(torch.from_numpy(pictures[1]).double()[None], BOXES[2].tolist(), 28, RCNNOptions())
    clear = (pooled - 0.5).abs() > 1e-5
    assert clear.float().mean() > 0.95
    assert torch.equal(of_codes[2][clear[0]], (pooled >= 0.5)[clear])


def test_boxes_of_no_area_and_no_boxes():
    pytest.importorskip("pycocotools")
    from resnest_imagenet.models.masks import rasterise_masks

    flat = torch.tensor([[20.0, 30, 20, 60], [20, 30, 20, 30]])
    assert rasterise_masks(make_objects(), [2, 0], flat).shape == (2, 28, 28)
    assert rasterise_masks([], [], torch.zeros(0, 4)).shape == (0, 28, 28)


def test_pycocotools_is_not_installed(monkeypatch):
    from resnest_imagenet.models.masks import rasterise_masks

    for module in ("pycocotools", "pycocotools.mask"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=r"^detection needs pycocotools: add the extra \[detection\] of resnest-imag"):
        rasterise_masks(make_objects(), [0], BOXES[:1])


def test_the_loss_is_of_each_boxs_own_class():
    from resnest_imagenet.models.masks import compute_mask_loss

    torch.manual_seed(0)
    logits = torch.randn(3, 4, 28, 28, dtype=torch.float64, requires_grad=True)
    wanted, labels = torch.rand(3, 28, 28) > 0.6, torch.tensor([2, 0, 2])
    expected = 0.0
    for n in range(3):
        probability = 1 / (1 + (-logits[n, labels[n]].detach()).exp())
        expected -= torch.where(wanted[n], probability, 1 - probability).log().mean() / 3
    loss = compute_mask_loss(logits, labels, wanted)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    loss.backward()
    touched = {(n, k) for n in range(3) for k in range(4) if logits.grad[n, k].any()}
    assert touched == {(0, 2), (1, 0), (2, 2)}
