import pytest
import torch
from torch import nn

from conftest import compose_config
from resnest_imagenet import build_model, list_models
from resnest_imagenet.config import TrainConfig
from resnest_imagenet.training.optimizer import build_optimizer, group_parameters


@pytest.mark.parametrize("name", list_models())
def test_exactly_convolution_and_fc_weights_decay(name):
    with torch.device("meta"):
        model = build_model(name)
    expected = {id(m.weight) for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    decaying, others = group_parameters(model, 1e-4)
    assert {id(p) for p in decaying["params"]} == expected
    assert (decaying["weight_decay"], others["weight_decay"]) == (1e-4, 0)
    assert len(decaying["params"]) + len(others["params"]) == len(list(model.parameters()))


def test_a_filter_by_name_misses_six_weights():
    """The official release's training exempts names with "bn" or "bias" in them: these decay there."""
    model = build_model("resnest50")
    exempt = {id(p) for p in group_parameters(model, 1e-4)[1]["params"]}
    missed = [n for n, p in model.named_parameters() if id(p) in exempt and "bn" not in n and "bias" not in n]
    shortcuts = [f"layer{layer}.0.downsample.2.weight" for layer in (1, 2, 3, 4)]
    assert missed == ["conv1.1.weight", "conv1.4.weight", *shortcuts]


def test_decay_of_everything():
    decaying, others = group_parameters(nn.BatchNorm2d(3), 1e-4, decay_all=True)
    assert (len(decaying["params"]), len(others["params"])) == (0, 2)
    assert others["weight_decay"] == 1e-4


def test_sgd_is_nesterov_with_the_recipes_numbers():
    recipe = compose_config("train", TrainConfig, "data.root=/x").train
    optimizer = build_optimizer(nn.Linear(2, 2), recipe)
    assert [(g["momentum"], g["nesterov"], g["weight_decay"]) for g in optimizer.param_groups] == [
        (0.9, True, 1e-4),
        (0.9, True, 0.0),
    ]
    recipe = compose_config("train", TrainConfig, "data.root=/x", "recipe=torchvision_v1").train
    optimizer = build_optimizer(nn.Linear(2, 2), recipe)
    assert [(g["nesterov"], g["weight_decay"]) for g in optimizer.param_groups] == [(False, 1e-4), (False, 1e-4)]
