import inspect
import io
import re
import sys
from functools import cache

import pytest
import torch
from torch import nn

from conftest import compose_config
from resnest_imagenet import build_model, list_models
from resnest_imagenet.config import TrainConfig
from resnest_imagenet.errors import ConfigError
from resnest_imagenet.models.deeplab import build_deeplab
from resnest_imagenet.training.optimizer import (
    build_optimizer,
    clip_gradients,
    complete_state,
    group_parameters,
    take_step,
)


@cache
def recipe_of(*overrides):
    return compose_config("train", TrainConfig, "data.root=/x", *overrides).train


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in list_models() if not re.search("101|200|269", name)])
def test_exactly_convolution_and_fc_weights_decay(name):
    """The deeper ones repeat the blocks of those with 50 layers."""
    with torch.device("meta"):
        model = build_model(name)
    expected = {id(m.weight) for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    decaying, others = group_parameters(model, recipe_of())
    assert {id(p) for p in decaying["params"]} == expected
    assert (decaying["weight_decay"], others["weight_decay"]) == (1e-4, 0)
    assert len(decaying["params"]) + len(others["params"]) == len(list(model.parameters()))


def test_a_filter_by_name_misses_six_weights():
    """The official release's training exempts names with "bn" or "bias" in them: these decay there."""
    model = build_model("resnest50")
    exempt = {id(p) for p in group_parameters(model, recipe_of())[1]["params"]}
    missed = [n for n, p in model.named_parameters() if id(p) in exempt and "bn" not in n and "bias" not in n]
    shortcuts = [f"layer{layer}.0.downsample.2.weight" for layer in (1, 2, 3, 4)]
    assert missed == ["conv1.1.weight", "conv1.4.weight", *shortcuts]


def test_decay_of_everything():
    decaying, others = group_parameters(nn.BatchNorm2d(3), recipe_of("train.decay_all=true"))
    assert (len(decaying["params"]), len(others["params"])) == (0, 2)
    assert others["weight_decay"] == 1e-4


class Detector(nn.Module):
    """A backbone and a head, with norms."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.GroupNorm(2, 8))
        self.head = nn.Sequential(nn.Linear(8, 4), nn.LayerNorm(4))


def test_biases_decay_and_norms_do_not():
    """detectron2's rule: 1e-4 on weights and biases, 0 on the parameters of norms."""
    model = Detector()
    decaying, others = group_parameters(model, recipe_of("train.decay_biases=true"))
    names = {id(p): name for name, p in model.named_parameters()}
    layers = ("backbone.0", "head.0")
    assert {names[id(p)] for p in decaying["params"]} == {
        f"{at}.{name}" for at in layers for name in ("weight", "bias")
    }
    assert (decaying["weight_decay"], others["weight_decay"], len(others["params"])) == (1e-4, 0, 6)


def test_a_head_trains_at_its_factor_of_the_rate():
    model = Detector()
    optimizer = build_optimizer(model, recipe_of("train.head_lr_factor=10"), head=["head"])
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    take_step(optimizer, 0.01, torch.tensor(0.0))
    rates = {id(p): (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}
    decays = {name: p.ndim > 1 for name, p in model.named_parameters()}
    assert {name: rates[id(p)] for name, p in model.named_parameters()} == {
        name: (0.1 if name.startswith("head") else 0.01, 1e-4 if decays[name] else 0) for name in decays
    }
    with pytest.raises(ConfigError, match="train.head_lr_factor=10.0: train.task=classification has no head for it"):
        build_optimizer(model, recipe_of("train.head_lr_factor=10"))


@pytest.mark.slow
def test_the_rate_falls_from_stage_to_stage():
    """By .5 from fc on; the stages of a segmentation network's backbone alike, and its heads at their own factor."""
    powers = {"layer4": 1, "layer3": 2, "layer2": 3, "layer1": 4, "bn1": 5, "conv1": 5}
    with torch.device("meta"):
        classifier, deeplab = build_model("resnest14"), build_deeplab("resnest14", 5)
    options = ("train.init_from=x.pt", "train.layer_decay=0.5", "train.head_lr_factor=3")
    for model, prefix, head in ((classifier, "", ["fc"]), (deeplab, "backbone.", ["head"])):
        groups = build_optimizer(model, recipe_of(*options), head).param_groups
        assert len(groups) == 2 * (1 + 1 + 5)
        rates = {id(p): (group["lr_factor"], group["weight_decay"]) for group in groups for p in group["params"]}
        for name, parameter in model.named_parameters():
            place = name.removeprefix(prefix).partition(".")[0]
            expected = {"head": 3, "auxiliary": 1, "fc": 3}.get(place) or 0.5 ** powers[place]
            assert rates[id(parameter)] == (expected, 1e-4 if parameter.ndim > 1 else 0), name
    with pytest.raises(ConfigError, match=r"train.layer_decay=0.5: a Detector has not the stages stem, layer1, layer2"):
        build_optimizer(Detector(), recipe_of(*options[:2]))


def test_a_factor_of_one_leaves_the_groups_of_earlier_checkpoints():
    for options in ((), ("recipe=torchvision_v1",)):
        model = Detector()
        groups = build_optimizer(model, recipe_of(*options), head=["head"]).param_groups
        matrices = [p for p in model.parameters() if p.ndim > 1]
        vectors = [p for p in model.parameters() if p.ndim <= 1]
        assert [list(map(id, group["params"])) for group in groups] == [list(map(id, matrices)), list(map(id, vectors))]


def test_sgd_is_nesterov_with_the_recipes_numbers():
    optimizer = build_optimizer(nn.Linear(2, 2), recipe_of())
    assert [(g["momentum"], g["nesterov"], g["weight_decay"]) for g in optimizer.param_groups] == [
        (0.9, True, 1e-4),
        (0.9, True, 0.0),
    ]
    optimizer = build_optimizer(nn.Linear(2, 2), recipe_of("recipe=torchvision_v1"))
    assert [(g["nesterov"], g["weight_decay"]) for g in optimizer.param_groups] == [(False, 1e-4), (False, 1e-4)]


def test_adamw_and_lamb_have_the_recipes_numbers():
    options = ("train.betas=[0.8,0.95]", "train.eps=1e-6", "train.weight_decay=0.05")
    for name in ("adamw", "lamb"):
        optimizer = build_optimizer(nn.Linear(2, 2), recipe_of(f"train.optimizer={name}", *options))
        assert type(optimizer).__name__.lower() == name
        assert [(g["betas"], g["eps"], g["weight_decay"]) for g in optimizer.param_groups] == [
            ((0.8, 0.95), 1e-6, 0.05),
            ((0.8, 0.95), 1e-6, 0.0),
        ]


def build_network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 37)).to(memory_format=torch.channels_last)


def make_optimizer(*overrides):
    network = build_network()
    return network, build_optimizer(network, recipe_of(*overrides))


def set_gradients(network, value=None):
    for parameter in network.parameters():
        parameter.grad = torch.empty_like(parameter).copy_(torch.randn(parameter.shape))
        if value is not None:
            parameter.grad.fill_(value)


def read_all(network, optimizer):
    """Return every number that a step changes, of the state too."""
    states = [value for state in optimizer.state.values() for value in state.values()]
    # LAMB's: a tensor, or a number in timm's first releases that the project takes.
    steps = [torch.as_tensor(group["step"]) for group in optimizer.param_groups if "step" in group]
    return [*network.state_dict().values(), *states, *steps]


def copy_all(network, optimizer):
    return [tensor.clone() for tensor in read_all(network, optimizer)]


def is_equal(before, after):
    return len(before) == len(after) and all(map(torch.equal, before, after))


OPTIMIZERS = {
    "sgd": (),
    "no momentum": ("train.momentum=0", "train.nesterov=false"),
    "adamw": ("train.optimizer=adamw",),
    "lamb": ("train.optimizer=lamb",),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("steps_before", [0, 2])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1.0])
def test_a_step_that_is_skipped_leaves_no_trace(name, steps_before, value):
    network, optimizer = make_optimizer(*OPTIMIZERS[name])
    for _ in range(steps_before):
        set_gradients(network)
        take_step(optimizer, 0.1, torch.tensor(0.0))
    before = copy_all(network, optimizer)
    set_gradients(network, value)
    clip_gradients(optimizer, recipe_of("train.clip_norm=1"))
    take_step(optimizer, 0.1, torch.tensor(1.0))
    assert is_equal(before, read_all(network, optimizer))
    assert all(parameter.grad is None for parameter in network.parameters())
    set_gradients(network)
    take_step(optimizer, 0.1, torch.tensor(0.0))
    assert not is_equal(before, read_all(network, optimizer))


def train_steps(network, optimizer, recipe, steps, precision):
    """Train on batches that depend on the step's number only; skip the first step, and the sixth."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        images = torch.randn(4, 3, 3, 3, generator=generator)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = network(images).float().square().mean()
        loss.backward()
        clip_gradients(optimizer, recipe)
        take_step(optimizer, 0.1 / (step + 1), torch.tensor(float(step in (0, 5))))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("clip", ["train.clip_norm=0.1", "train.clip_value=0.001"])
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("interrupted_after", [0, 1, 4])
def test_a_resumed_optimizer_has_the_bits_of_one_that_was_not_interrupted(name, clip, precision, interrupted_after):
    recipe = recipe_of(*OPTIMIZERS[name], clip, f"train.precision={precision}")
    whole = build_network()
    uninterrupted = build_optimizer(whole, recipe)
    train_steps(whole, uninterrupted, recipe, range(8), precision)

    first = build_network()
    optimizer = build_optimizer(first, recipe)
    train_steps(first, optimizer, recipe, range(interrupted_after), precision)
    file = io.BytesIO()
    torch.save((first.state_dict(), optimizer.state_dict()), file)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    second = build_network()
    second.load_state_dict(weights)
    resumed = build_optimizer(second, recipe)
    resumed.load_state_dict(state)
    complete_state(resumed)
    train_steps(second, resumed, recipe, range(interrupted_after, 8), precision)
    assert is_equal(read_all(whole, uninterrupted), read_all(second, resumed))


def test_gradients_are_clipped_by_norm_or_by_value():
    for option, scale in (("train.clip_norm=2", 2 / 5), ("train.clip_norm=6", 1), ("train.clip_value=3", None)):
        network, optimizer = make_optimizer()
        set_gradients(network, 0.0)
        network[0].bias.grad[0], network[2].weight.grad[1, 2] = 3.0, -4.0
        clip_gradients(optimizer, recipe_of(option))
        clipped = [network[0].bias.grad[0].item(), network[2].weight.grad[1, 2].item()]
        assert clipped == pytest.approx([3.0, -3.0] if scale is None else [3 * scale, -4 * scale], rel=1e-5)
        assert sum(p.grad.count_nonzero() for p in network.parameters()) == 2
    network, optimizer = make_optimizer()
    set_gradients(network)
    before = [p.grad.clone() for p in network.parameters()]
    clip_gradients(optimizer, recipe_of())
    assert all(map(torch.equal, before, [p.grad for p in network.parameters()]))


def test_adamw_and_lamb_are_their_papers_formulas():
    """First step of arXiv 1711.05101, algorithm 2, and of arXiv 1904.00962, algorithm 2: m = g, v = g * g."""
    lr, decay, eps = 0.01, 0.1, 1e-8
    for name in ("adamw", "lamb"):
        network, optimizer = make_optimizer(
            f"train.optimizer={name}", f"train.weight_decay={decay}", f"train.eps={eps}"
        )
        weight = network[2].weight.detach().clone()
        set_gradients(network)
        gradient = network[2].weight.grad.clone()
        take_step(optimizer, lr, torch.tensor(0.0))
        update = gradient / (gradient.abs() + eps) + decay * weight
        rate = lr if name == "adamw" else lr * weight.norm() / update.norm()
        torch.testing.assert_close(network[2].weight.detach(), weight - rate * update, rtol=1e-5, atol=1e-7)


def test_steps_are_torchs_up_to_rounding_and_resume_from_what_an_earlier_version_saved():
    """Its checkpoints have an optimiser that is not fused, and no momentum before the first step."""
    for steps_before in (0, 2):
        network, optimizer = make_optimizer()
        twin = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 37))
        twin.load_state_dict(network.state_dict())
        reference = torch.optim.SGD(group_parameters(twin, recipe_of()), lr=0.1, momentum=0.9, nesterov=True)

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


@pytest.mark.slow
def test_no_optimiser_imports_the_compiler(monkeypatch):
    import timm.optim  # noqa: F401  before the compiler is barred: it may import it

    for name in ("add_param_group", "zero_grad", "state_dict", "load_state_dict"):
        # Where torch has kept what its wrapper needs of the compiler, it would not import that again.
        monkeypatch.delattr(inspect.unwrap(getattr(torch.optim.Optimizer, name)), "__dynamo_disable", raising=False)
    monkeypatch.setitem(sys.modules, "torch._dynamo", None)
    with pytest.raises(ImportError, match="torch._dynamo"):
        torch.optim.SGD([nn.Parameter(torch.zeros(2))])
    for name in ("sgd", "adamw", "lamb"):
        model = nn.Linear(2, 2)
        optimizer = build_optimizer(model, recipe_of(f"train.optimizer={name}"))
        optimizer.load_state_dict(optimizer.state_dict())
        complete_state(optimizer)
        before = model.weight.clone()
        model(torch.ones(1, 2)).square().sum().backward()
        take_step(optimizer, 0.1, torch.zeros(()))
        assert not torch.equal(model.weight, before) and model.weight.grad is None
