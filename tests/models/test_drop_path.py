import pytest
import torch
import torch.nn.functional as F
from torch import nn

from resnest_imagenet import build_model
from resnest_imagenet.errors import ConfigError
from resnest_imagenet.models.drop_path import add_drop_path, drop_path


def test_an_image_keeps_its_branch_scaled_or_loses_all_of_it():
    x = torch.randn(4000, 3, 2, 2).to(memory_format=torch.channels_last)
    torch.manual_seed(0)
    dropped = drop_path(x, 0.25)
    is_lost = (dropped == 0).flatten(1).all(1)
    torch.testing.assert_close(dropped[~is_lost], x[~is_lost] / 0.75)
    assert is_lost.float().mean().item() == pytest.approx(0.25, abs=0.02)
    assert dropped.is_contiguous(memory_format=torch.channels_last)
    torch.manual_seed(0)
    assert torch.equal(drop_path(x, 0.25), dropped)
    # The scale is not rounded to bf16 before it is applied: 1 / .998 would be 1.
    ones = drop_path(torch.full((64, 1, 1, 1), 255.0, dtype=torch.bfloat16), 0.002)
    assert ones.dtype == torch.bfloat16 and ones.max() == 256  # 255 / .998 = 255.5


@pytest.mark.parametrize("name", ["resnest14_half", "resnest26", "resnet50d", "seresnext50_32x4d", "skresnext50_32x4d"])
@pytest.mark.slow
def test_a_block_loses_its_whole_branch_and_timms_networks_at_timms_rates(name, monkeypatch):
    model = build_model(name, zero_gamma=False)
    keys = list(model.state_dict())
    add_drop_path(model, 0.3)
    assert list(model.state_dict()) == keys
    blocks = [block for layer in (1, 2, 3, 4) for block in model.get_submodule(f"layer{layer}").children()]
    rates = []

    def drop_all(x, probability):
        rates.append(probability)
        return x * 0

    monkeypatch.setattr("resnest_imagenet.models.drop_path.drop_path", drop_all)
    x = torch.rand(2, 3, 64, 64)
    x = model.maxpool(F.relu(model.bn1(model.conv1(x))))
    for number, block in enumerate(blocks):
        shortcut = x if block.downsample is None else block.downsample(x)
        expected = F.relu(shortcut) if number else block(x)
        before, x = x, block(x)
        torch.testing.assert_close(x, expected)
    assert rates == pytest.approx([0.3 * number / (len(blocks) - 1) for number in range(1, len(blocks))])
    block.eval()
    assert not torch.allclose(block(before), x)
    assert len(rates) == len(blocks) - 1


def test_rates_rise_as_timms_do():
    from timm import create_model
    from timm.layers import DropPath

    theirs = create_model("resnet26d", drop_path_rate=0.2)
    expected = [module.drop_prob for module in theirs.modules() if isinstance(module, DropPath)]
    ours = create_model("resnet26d")
    add_drop_path(ours, 0.2)
    hooks = [hook for module in ours.modules() for hook in module._forward_hooks.values()]
    assert [hook.args[0] for hook in hooks] == pytest.approx(expected)


def test_a_network_without_blocks_is_refused():
    with pytest.raises(ConfigError, match="train.drop_path: a Sequential has no layer1: set train.drop_path=0"):
        add_drop_path(nn.Sequential(), 0.1)
    network = nn.Sequential()
    network.layer1 = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(ConfigError, match=r"train.drop_path: layer1.0 of a Sequential has no bn3: "):
        add_drop_path(network, 0.1)
