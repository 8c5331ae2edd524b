"""DropBlock against its formula, and its three places in every kind of network."""

import pytest
import torch
from torch import nn

from resnest_imagenet import build_model
from resnest_imagenet.models import dropblock
from resnest_imagenet.models.dropblock import DropBlock, drop_blocks


def drop_blocks_naively(x, p):
    """Centres with gamma = p HW / 9 / ((W - 2)(H - 2)); each drops the 3x3 square around it, in every image alike."""
    _, channels, height, width = x.shape
    gamma = p * height * width / 9 / ((width - 2) * (height - 2))
    centres = torch.rand(1, channels, height, width) < gamma
    keep = torch.ones(channels, height, width)
    for _, c, i, j in centres.nonzero().tolist():
        keep[c, max(i - 1, 0) : i + 2, max(j - 1, 0) : j + 2] = 0
    return torch.stack([image * keep * (keep.numel() / keep.sum()) for image in x])


@pytest.mark.parametrize("shape", [(2, 16, 14, 14), (3, 8, 5, 9), (2, 8, 3, 3)])
def test_equals_the_formula(shape):
    x = torch.randn(shape)
    torch.manual_seed(1)
    expected = drop_blocks_naively(x, 0.2)
    torch.manual_seed(1)
    dropped = drop_blocks(x, torch.tensor(0.2))
    assert 0 < (dropped == 0).float().mean() < 0.8
    torch.testing.assert_close(dropped, expected)


def test_drops_about_the_probability_and_keeps_the_sum():
    x = torch.ones(1, 512, 14, 14)
    torch.manual_seed(0)
    dropped = drop_blocks(x, torch.tensor(0.1))
    gamma = 0.1 * 14 * 14 / 9 / (12 * 12)
    # A position is dropped by the centres around it: 9, but 6 along the edges and 4 in the corners.
    share = sum(n * (1 - (1 - gamma) ** centres) for n, centres in ((144, 9), (48, 6), (4, 4))) / 196
    assert (dropped == 0).float().mean().item() == pytest.approx(share, abs=0.005)
    assert dropped.mean().item() == pytest.approx(1, abs=1e-4)


def test_type_layout_and_small_maps_are_kept():
    x = torch.randn(2, 8, 6, 6, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    dropped = drop_blocks(x, torch.tensor(0.5))
    assert dropped.dtype == torch.bfloat16
    assert dropped.is_contiguous(memory_format=torch.channels_last)
    # The scale is not rounded to bf16: it is 1.002 here.
    ones = drop_blocks(torch.ones(2, 512, 14, 14, dtype=torch.bfloat16), torch.tensor(0.002))
    kept = ones[ones != 0]
    assert kept.float().mean() == pytest.approx(1, abs=0.005)
    small = torch.randn(2, 8, 2, 2)
    assert drop_blocks(small, torch.tensor(0.9)) is small
    everything = drop_blocks(torch.ones(1, 1, 3, 3), torch.tensor(9.0))
    assert everything.isfinite().all()


PLACES = {
    "resnest26": ("bn1", "conv2", "bn3"),
    "resnet50": ("bn1", "bn2", "bn3"),
    "seresnext50_32x4d": ("bn1", "bn2", "bn3"),
    "resnet50d": ("bn1", "bn2", "bn3"),
    "skresnext50_32x4d": ("conv1", "conv2", "conv3"),
}


@pytest.mark.parametrize(("name", "places"), PLACES.items())
@pytest.mark.slow
def test_three_places_in_each_block_of_the_last_two_layers(name, places, monkeypatch):
    with torch.device("meta"):
        model = build_model(name)
        DropBlock(model)
    hooked = {n for n, module in model.named_modules() if module._forward_hooks}
    blocks = [f"{layer}.{i}" for layer in ("layer3", "layer4") for i in range(len(model.get_submodule(layer)))]
    assert hooked == {f"{block}.{place}" for block in blocks for place in places}
    passed = []
    monkeypatch.setattr(dropblock, "drop_blocks", lambda x, _: passed.append(x.shape[1]) or x)
    model.train()(torch.empty(2, 3, 64, 64, device="meta"))
    assert len(passed) == 3 * len(blocks)
    passed.clear()
    model.eval()(torch.empty(2, 3, 64, 64, device="meta"))
    assert passed == []


def test_it_acts_in_training_and_leaves_the_state_dict_alone():
    torch.manual_seed(0)
    model = build_model("resnest14", zero_gamma=False).train()
    keys = list(model.state_dict())
    images = torch.randn(2, 3, 96, 96)
    plain = model(images)
    block = DropBlock(model)
    assert list(model.state_dict()) == keys
    torch.testing.assert_close(model(images), plain)  # probability 0
    block.set_probability(0.3)
    one, other = model(images), model(images)
    assert not torch.allclose(one, plain) and not torch.allclose(one, other)
    one.sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.slow
def test_a_compiled_network_follows_the_probability():
    """The number changes with every epoch: the graph must not be compiled again for each."""
    block = nn.Sequential()
    block.bn1, block.bn2, block.bn3 = nn.BatchNorm2d(3), nn.Identity(), nn.Identity()
    network = nn.Sequential()
    network.layer3, network.layer4 = nn.Sequential(block), nn.Sequential()
    drop = DropBlock(network)
    compiled = torch.compile(network.train(), backend="eager", fullgraph=True)
    x = torch.randn(2, 3, 20, 20)
    torch._dynamo.reset()
    shares = []
    with torch._dynamo.config.patch(error_on_recompile=True):
        for probability in (0.0, 0.2, 0.5):
            drop.set_probability(probability)
            shares.append((compiled(x) == 0).float().mean().item())
    assert shares[0] == 0 < shares[1] < shares[2]
