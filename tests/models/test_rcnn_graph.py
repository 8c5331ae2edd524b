"""The graph of a detector finds what the network finds."""

import pytest
import torch


def build(**options):
    """Build a detector whose scores are spread and boxes are moved."""
    from resnest_imagenet.models.rcnn import build_rcnn

    torch.manual_seed(0)
    small = {"channels": 8, "box_convs": 1, "box_width": 16, "mask_convs": 1, "proposals": (50, 50), "detections": 20}
    network = build_rcnn("resnest14_half", 3, norm="bn", **small, **options).eval().requires_grad_(False)
    for name, parameter in network.named_parameters():
        if name.endswith(("cls_logits.weight", "bbox_pred.weight", "classify.weight", "regress.weight")):
            parameter.normal_(std=0.5)
    return network


@pytest.mark.parametrize(
    "options",
    [
        {"masks": True, "candidates": (40, 40)},
        {"cascade": True, "class_agnostic": True},
        {"class_agnostic": True},
        {"masks": True, "min_score": 1.0},
    ],
    ids=["masks", "cascade", "one box", "nothing found"],
)
def test_finds_what_the_network_finds(options):
    from resnest_imagenet.models.rcnn_graph import RCNNGraph

    network = build(**options)
    images = torch.randn(1, 3, 96, 128, generator=torch.Generator().manual_seed(1))
    images[:, :, 80:], images[..., 115:] = 0, 0
    (expected,) = network(images, [(80, 115)])
    boxes, scores, labels, *masks = RCNNGraph(network)(images, torch.tensor([80, 115]))
    assert len(expected) == (0 if "min_score" in options else 20)
    assert torch.equal(labels, expected.labels)
    torch.testing.assert_close(boxes, expected.boxes, rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(scores, expected.scores)
    assert len(masks) == ("masks" in options)
    for found in masks:
        assert found.shape == (len(expected), 28, 28)
        torch.testing.assert_close(found, expected.masks, rtol=1e-4, atol=1e-5)


def test_the_best_are_all_where_they_are_few():
    from resnest_imagenet.models.rcnn_graph import find_best

    scores = torch.tensor([0.1, 0.9, 0.5])
    for count, places in ((2, [1, 2]), (3, [1, 2, 0]), (7, [1, 2, 0])):
        assert find_best(scores, count).tolist() == places
    assert find_best(scores[:0], 2).tolist() == []
