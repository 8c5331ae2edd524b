import pytest
import torch
from torch import nn

from conftest import compose_config
from resnest_imagenet import build_model, list_models
from resnest_imagenet.config import TrainConfig
from resnest_imagenet.training.optimizer import build_optimizer, complete_state, group_parameters, take_step


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


def make_optimizer(momentum=0.9):
    torch.manual_seed(0)
    recipe = compose_config("train", TrainConfig, "data.root=/x").train
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 37)).to(memory_format=torch.channels_last)
    recipe = recipe.model_copy(update={"momentum": momentum, "nesterov": momentum > 0})
    return network, build_optimizer(network, recipe)


def set_gradients(network, value=None):
    for parameter in network.parameters():
        parameter.grad = torch.empty_like(parameter).copy_(torch.randn(parameter.shape))
        if value is not None:
            parameter.grad.fill_(value)


def read_all(network, optimizer):
    return [*network.state_dict().values(), *(each["momentum_buffer"] for each in optimizer.state.values() if each)]


@pytest.mark.parametrize("momentum", [0.9, 0.0])
@pytest.mark.parametrize("steps_before", [0, 2])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1.0])
def test_a_step_that_is_left_out_leaves_no_trace(momentum, steps_before, value):
    network, optimizer = make_optimizer(momentum)
    for _ in range(steps_before):
        set_gradients(network)
        take_step(optimizer, 0.1, torch.tensor(0.0))
    before = [each.clone() for each in read_all(network, optimizer)]
    set_gradients(network, value)
    take_step(optimizer, 0.1, torch.tensor(1.0))
    assert all(torch.equal(one, other) for one, other in zip(before, read_all(network, optimizer), strict=True))
    assert all(parameter.grad is None for parameter in network.parameters())


def test_steps_are_torchs_up_to_rounding_and_go_on_from_what_an_earlier_version_saved():
    """Its checkpoints have an optimiser that is not fused, and no momentum before the first step."""
    for steps_before in (0, 2):
        network, optimizer = make_optimizer()
        twin = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 37))
        twin.load_state_dict(network.state_dict())
        reference = torch.optim.SGD(group_parameters(twin, 1e-4), lr=0.1, momentum=0.9, nesterov=True)

        def set_same_gradients(network=network, twin=twin):
            set_gradients(network)
            for one, other in zip(network.parameters(), twin.parameters(), strict=True):
                other.grad = one.grad.contiguous().clone()

        for _ in range(steps_before):
            set_same_gradients()
            reference.step()
        network.load_state_dict(twin.state_dict())
        optimizer.load_state_dict(reference.state_dict())
        complete_state(optimizer)
        for _ in range(3):
            set_same_gradients()
            reference.step()
            take_step(optimizer, 0.1, torch.tensor(0.0))
        assert network[0].weight.stride() != twin[0].weight.stride()
        for one, other in zip(read_all(network, optimizer), read_all(twin, reference), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
