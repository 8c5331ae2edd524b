"""The family against timm's implementation with the same weights, and what timm does differently."""

import pytest
import torch
from torch import nn

from resnest_imagenet import build_model
from resnest_imagenet.models.resnest import Bottleneck
from resnest_imagenet.models.zoo import TIMM_RESNESTS


def randomise_statistics(model: nn.Module) -> None:
    """Give every batch norm statistics and weights of its own, so that none of them can be swapped unseen."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.running_var, 0.8, 1.2)
            nn.init.uniform_(module.weight, 0.8, 1.2)
            nn.init.uniform_(module.bias, -0.1, 0.1)


DEEP = {"resnest200", "resnest269"}  # which repeat the blocks of resnest101, more often


@pytest.mark.slow
@pytest.mark.parametrize(("name", "twin"), [(name, twin) for name, twin in TIMM_RESNESTS.items() if name not in DEEP])
def test_logits_equal_timms(name, twin):
    import timm

    torch.manual_seed(0)
    theirs = timm.create_model(twin).double().eval()
    randomise_statistics(theirs)
    with torch.device("meta"):
        ours = build_model(name).eval()
    ours.load_state_dict(theirs.state_dict(), assign=True)  # strict: the official key names
    images = torch.randn(2, 3, 33, 66, dtype=torch.float64)  # odd sizes, in every stage, show the pools' ceil modes
    with torch.no_grad():
        expected = theirs(images)
        difference = (ours(images) - expected).abs().max() / expected.abs().max()
    assert difference < 1e-12  # 4e-16 to 9e-16


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(DEEP))
def test_the_deepest_have_timms_tensors(name):
    import timm

    with torch.device("meta"):
        ours, theirs = build_model(name).state_dict(), timm.create_model(TIMM_RESNESTS[name]).state_dict()
    assert {key: value.shape for key, value in ours.items()} == {key: value.shape for key, value in theirs.items()}


@pytest.mark.parametrize(("output_stride", "size"), [(32, 2), (16, 4), (8, 8)])
def test_output_stride(output_stride, size):
    model = build_model("resnest14_half", output_stride=output_stride).eval()
    with torch.no_grad():
        assert model.forward_features(torch.randn(1, 3, 64, 64)).shape == (1, 1024, size, size)


@pytest.mark.slow
def test_dilated_semantics_are_the_official_ones():
    """timm drops the stride-1 average pool of layer3 and 4 and pools the shortcut 2x2; corrected, the two are equal."""
    import timm

    torch.manual_seed(0)
    ours = build_model("resnest26", output_stride=8).double().eval()
    theirs = timm.create_model("resnest26d", output_stride=8).double().eval()
    theirs.load_state_dict(ours.state_dict())
    images = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        assert (ours(images) - theirs(images)).abs().max() > 1e-3
        for layer in (theirs.layer3, theirs.layer4):
            layer[0].avd_last = nn.AvgPool2d(3, 1, padding=1)
            layer[0].downsample[0] = nn.Identity()
        assert (ours(images) - theirs(images)).abs().max() < 1e-10
    dilations = [[b.conv2.conv.dilation[0] for b in layer] for layer in (ours.layer2, ours.layer3, ours.layer4)]
    assert dilations == [[1, 1], [1, 2], [2, 4]]


def test_zero_gamma_makes_every_block_its_shortcut():
    blocks = [m for m in build_model("resnest26").modules() if isinstance(m, Bottleneck)]
    assert len(blocks) == 8
    assert all(block.bn3.weight.count_nonzero() == 0 for block in blocks)
    plain = build_model("resnest26", zero_gamma=False)
    assert all(m.bn3.weight.min() == 1 for m in plain.modules() if isinstance(m, Bottleneck))


def test_unknown_output_stride():
    with pytest.raises(ValueError, match="8, 16 or 32"):
        build_model("resnest14", output_stride=4)
