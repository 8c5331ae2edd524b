import re

import pytest
import torch
from torch import nn

from resnest_imagenet import build_model
from resnest_imagenet.errors import ConfigError
from resnest_imagenet.models.stages import find_stage, freeze_stages, keep_in_evaluation


@pytest.mark.parametrize("name", ["resnest14_half", "skresnext50_32x4d", "resnet50s"])
@pytest.mark.slow
def test_each_parameter_has_its_stage(name):
    with torch.device("meta"):
        model = build_model(name)
    for parameter, _ in model.named_parameters():
        (stage,) = re.findall(r"^(?:layer(\d)|conv1|bn1|fc)", parameter)
        expected = None if parameter.startswith("fc") else int(stage or 0)
        assert find_stage(parameter) == find_stage(f"backbone.{parameter}") == expected, parameter


def test_frozen_stages_stay_bit_for_bit_and_the_others_train():
    torch.manual_seed(0)
    model = build_model("resnest14_half", 10, zero_gamma=False)
    frozen = freeze_stages(model, 3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    keep_in_evaluation(frozen)
    assert next(name for name, p in model.named_parameters() if p.requires_grad) == "layer3.0.conv1.weight"
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        model(torch.randn(4, 3, 64, 64)).square().mean().backward()
        optimizer.step()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if re.match("layer[34]|fc", name)}


def test_a_network_with_other_stages_is_refused():
    assert freeze_stages(nn.Sequential(), 0) == []
    with pytest.raises(ConfigError, match="train.freeze=1: a Sequential has no conv1: set train.freeze=0"):
        freeze_stages(nn.Sequential(), 1)
