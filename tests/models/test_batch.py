"""How few images a step may have: against steps that are really taken."""

from functools import partial

import pytest
import torch
from torch import nn

from resnest_imagenet import build_model
from resnest_imagenet.errors import ConfigError
from resnest_imagenet.models.batch import require_batch, smallest_batch
from resnest_imagenet.models.deeplab import build_deeplab

BACKBONE = {"features_only": True, "out_features": ("layer1",)}


@pytest.mark.parametrize(
    ("name", "crop", "options", "smallest"),
    [
        ("resnest14_half", 64, {}, 2),
        ("resnest14_half", 64, BACKBONE, 2),
        ("resnest14_half", 64, {**BACKBONE, "freeze_at": 1}, 2),
        ("resnest14_half", 64, {**BACKBONE, "norm": "frozen"}, 1),
        ("resnest14_half", 64, {**BACKBONE, "norm": "sync"}, 1),
        ("resnet50", 64, {}, 1),
        ("resnet50", 32, {}, 2),  # layer4 has one pixel
        ("skresnext50_32x4d", 64, {}, 2),
    ],
)
@pytest.mark.slow
def test_the_smallest_batch(name, crop, options, smallest):
    with torch.device("meta"):
        model = build_model(name, **options)
    before = [module.training for module in model.modules()]
    assert smallest_batch(model, crop) == smallest
    assert [module.training for module in model.modules()] == before
    if options.get("norm") != "sync":  # which trains on accelerators only
        with torch.device("meta"):
            model(torch.empty(smallest, 3, crop, crop))
        if smallest == 2:
            with pytest.raises(ValueError, match="at least 2 images per device|more than 1 value per channel"):
                model(torch.empty(1, 3, crop, crop, device="meta"))


@pytest.mark.parametrize(("norm", "smallest"), [("bn", 2), ("frozen", 1), ("sync", 1)])
@pytest.mark.slow
def test_the_smallest_batch_of_a_segmentation_network(norm, smallest):
    """The head normalises one value per image, its global average, on any backbone; the rule is a step's."""
    build = partial(build_deeplab, "resnet50s", 5, norm=norm, rates=(2, 4, 6))
    with torch.device("meta"):
        model = build()
    assert smallest_batch(model, 64) == smallest
    if smallest == 2:
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            model(torch.empty(1, 3, 64, 64, device="meta"))
        with pytest.raises(ConfigError, match=r"^train.batch_size=1: resnet50s has batch norms .* at 64 pixels: set "):
            require_batch("resnet50s", 1, 64, build=build)
    else:
        require_batch("resnet50s", 1, 64, build=build)
    if norm == "frozen":
        logits, auxiliary = model(torch.empty(1, 3, 64, 64, device="meta"))
        assert logits.shape == auxiliary.shape == (1, 5, 64, 64)


def test_a_step_with_one_image_and_frozen_norms():
    torch.manual_seed(0)
    model = build_model("resnest14_half", zero_gamma=False, **BACKBONE, norm="frozen")
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    (features,) = model(torch.randn(1, 3, 64, 64))
    features.square().mean().backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert gradients and all(gradient.isfinite().all() and gradient.any() for gradient in gradients)
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


@pytest.mark.slow
def test_a_network_is_left_as_it_is():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    assert smallest_batch(model, 32) == 1
    assert model[0].weight.device.type == "cpu" and not model[1]._forward_pre_hooks
    assert model[1].num_batches_tracked == 0


@pytest.mark.slow
def test_the_line():
    require_batch("resnet50", 1, 64)
    require_batch("resnest50", 2, 32)
    with pytest.raises(ConfigError, match=r"^batch_size=1: resnest50 has batch norms .*: set batch_size=2 or more$"):
        require_batch("resnest50", 1, 224, "batch_size")
