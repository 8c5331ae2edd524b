"""Activations that are computed again: the same step bit for bit, with less memory."""

import pytest
import torch

from resnest_imagenet.models.cost import count_kept_rcnn
from resnest_imagenet.models.zoo import build_model


def take_steps(name: str, norm: str, recomputes: bool) -> list[torch.Tensor]:
    """Return features, gradients and buffers of a backbone after two steps, and features in evaluation."""
    torch.manual_seed(0)
    backbone = build_model(name, features_only=True, out_features=("layer2", "layer4"), freeze_at=2, norm=norm)
    if recomputes:
        backbone.recompute()
    images, results = torch.randn(2, 3, 64, 64), []
    for _ in range(2):
        features = backbone(images)
        sum(feature.square().sum() for feature in features).backward()
        results += [feature.detach() for feature in features]
    results += [parameter.grad for parameter in backbone.parameters() if parameter.requires_grad]
    results += [buffer.clone() for buffer in backbone.buffers()]
    with torch.no_grad():
        return results + backbone.eval()(images)


@pytest.mark.parametrize(("name", "norm"), [("resnest14_half", "bn"), ("resnest14_half", "frozen")])
def test_a_step_is_the_same_bit_for_bit(name, norm):
    plain, recomputed = (take_steps(name, norm, recomputes) for recomputes in (False, True))
    assert len(plain) == len(recomputed) > 20
    assert all(torch.equal(first, second) for first, second in zip(plain, recomputed, strict=True))


@pytest.mark.slow
def test_it_keeps_less_for_the_backward_pass():
    kept = [
        count_kept_rcnn("resnest14_half", 5, (512, 512), 2, norm="bn", samples=8, checkpoint_activations=value)
        for value in (False, True)
    ]
    assert kept[1] < 0.8 * kept[0]
