"""Folded networks against the networks they come from."""

import pytest
import torch
from torch import nn

from resnest_imagenet.models.folding import fold_batch_norms
from resnest_imagenet.models.zoo import build_model

# One of each kind of block: with pools behind and before the attention, with one split and with several, the peers'.
OTHERS = ("resnest50_fast_1s2x40d", "resnest50_fast_4s1x64d", "resnet50d", "seresnext50_32x4d", "skresnext50_32x4d")


@pytest.mark.parametrize("name", ["resnest14_half", *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
def test_gives_the_same_logits(name):
    torch.manual_seed(0)
    model = build_model(name, 10, zero_gamma=False).double().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.running_var, 0.8, 1.2)
            nn.init.uniform_(module.bias, -0.1, 0.1)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    folded = fold_batch_norms(model)
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        expected = model(images)
        torch.testing.assert_close(folded(images), expected, rtol=0, atol=1e-7 * expected.abs().max().item())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items()), "the model is untouched"
    left = sum(type(module) is nn.BatchNorm2d for module in folded.modules())
    assert left == 0
