"""The optimiser: parameter groups, clipping of gradients, and steps that may be skipped."""

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from resnest_imagenet.errors import ConfigError
from resnest_imagenet.models.features import STAGES
from resnest_imagenet.models.stages import find_stage
from resnest_imagenet.recipe import Recipe


def group_parameters(model: nn.Module, recipe: Recipe, head: Sequence[str] = ()) -> list[dict]:
    """Split parameters into those with weight decay and those without, for each factor on the learning rate.

    Convolution and fc weights decay; with `decay_biases` their biases too (detectron2: all but norms), with `decay_all`
    all parameters (torchvision). Weights are exactly the parameters of more than one dimension (section 4.2 of the
    paper): a rule by name misses some of them.

    Args:
        model: parameters that are not trained are in no group.
        recipe: weight decay, `head_lr_factor`, and `layer_decay`, the factor from a stage to the one before it; what is
            in no stage has the factor 1. Where both are 1, there are two groups.
        head: names of the modules of the head.

    Returns:
        Groups with "params", "weight_decay" and "lr_factor".

    Raises:
        ConfigError: a factor is for a model without a head or without stages, or no parameter is trained.
    """
    require_head(recipe, head)
    biases = {id(bias) for bias in _find_biases(model)} if recipe.decay_biases else set()
    factors = {id(p): factor for p, factor in _find_stage_factors(model, recipe)}
    factors |= {id(p): recipe.head_lr_factor for name in head for p in model.get_submodule(name).parameters()}
    # The number of groups is fixed; without a factor they are those of earlier versions' checkpoints.
    of_stages = () if recipe.layer_decay == 1 else [recipe.layer_decay**depth for depth in range(1, 1 + len(STAGES))]
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {
        (factor, decays): []
        for factor in dict.fromkeys((1.0, recipe.head_lr_factor, *of_stages))
        for decays in (True, False)
    }
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        raise ConfigError(f"train.task={recipe.task}: no parameter of the network is trained: all are frozen")
    for parameter in trained:
        decays = parameter.ndim > 1 or id(parameter) in biases
        groups[factors.get(id(parameter), 1.0), decays].append(parameter)
    decay = {True: recipe.weight_decay, False: recipe.weight_decay if recipe.decay_all else 0.0}
    return [
        {"params": parameters, "weight_decay": decay[decays], "lr_factor": factor}
        for (factor, decays), parameters in groups.items()
    ]


def _find_stage_factors(model: nn.Module, recipe: Recipe) -> Iterator[tuple[nn.Parameter, float]]:
    """Yield the parameters of the stages with the factor that `layer_decay` gives them."""
    if recipe.layer_decay == 1:
        return
    stages = {name: stage for name, _ in model.named_parameters() if (stage := find_stage(name)) is not None}
    if set(stages.values()) != set(range(len(STAGES))):
        raise ConfigError(
            f"train.layer_decay={recipe.layer_decay}: a {type(model).__name__} has not the stages "
            f"{', '.join(STAGES)}: set train.layer_decay=1"
        )
    for name, stage in stages.items():
        yield model.get_parameter(name), recipe.layer_decay ** (len(STAGES) - stage)


def require_head(recipe: Recipe, head: Sequence[str]) -> None:
    """Raise a ConfigError if the recipe has a rate for the head and the task has no head."""
    if recipe.head_lr_factor != 1 and not head:
        raise ConfigError(f"train.head_lr_factor={recipe.head_lr_factor}: train.task={recipe.task} has no head for it")


def _find_biases(model: nn.Module) -> Iterator[nn.Parameter]:
    """Yield the biases of modules whose weight has more than one dimension, so not those of norms."""
    for module in model.modules():
        weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
        if isinstance(weight, Tensor) and weight.ndim > 1 and isinstance(bias, nn.Parameter):
            yield bias


def build_optimizer(model: nn.Module, recipe: Recipe, head: Sequence[str] = ()) -> torch.optim.Optimizer:
    """Build the recipe's optimiser over the model's parameter groups; `take_step` sets the learning rate.

    SGD and AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101) are torch's fused kernels. LAMB (You et al. 2020,
    arXiv 1904.00962) is timm's, without its own clipping: `clip_gradients` clips if the recipe has it.

    Args:
        model: to be trained.
        recipe: the optimiser and its options.
        head: names of the modules whose parameters train at `recipe.head_lr_factor` times the rate.

    Raises:
        ConfigError: `train.head_lr_factor` is set, but the model has no head.
    """
    groups = group_parameters(model, recipe, head)
    kind: type[torch.optim.Optimizer] = torch.optim.SGD
    options: dict[str, Any] = {"momentum": recipe.momentum, "nesterov": recipe.nesterov, "fused": True}
    if recipe.optimizer == "adamw":
        kind = torch.optim.AdamW
        options = {"betas": tuple(recipe.betas), "eps": recipe.eps, "fused": True}
    elif recipe.optimizer == "lamb":
        from timm.optim import Lamb

        kind, options = Lamb, {"betas": tuple(recipe.betas), "eps": recipe.eps, "max_grad_norm": None}
    optimizer: torch.optim.Optimizer = _without_compiler(kind)(groups, lr=0.0, **options)
    complete_state(optimizer)
    return optimizer


def _without_compiler(kind: type[torch.optim.Optimizer]) -> type[Any]:
    """Return a class of optimisers whose methods do not import torch's compiler, which takes as long as torch.

    torch wraps these methods so that a compiled program skips them, and the wrapper imports the compiler. A run
    compiles its network only. Where a torch does not wrap a method, nothing changes.
    """
    names = ("add_param_group", "zero_grad", "state_dict", "load_state_dict")
    methods: dict[str, Any] = {name: inspect.unwrap(getattr(kind, name)) for name in names}
    methods["step"] = torch.no_grad()(inspect.unwrap(kind.step))  # the wrappers of `step` also turn gradients off
    return type(kind.__name__, (kind,), methods)


def complete_state(optimizer: torch.optim.Optimizer) -> None:
    """Complete the state, so that the device can skip the first step, as only the fused kernels can.

    Call it after `load_state_dict` too, for a state of this version or an earlier one. It allocates the state that the
    first step would allocate: otherwise the state would be undefined if that step is skipped. It also has the memory
    layout of its parameter, as the kernels expect on a CPU.
    """
    for group in optimizer.param_groups:
        group.setdefault("lr_factor", 1.0)  # checkpoints of earlier versions lack it
        names: tuple[str, ...] = ("exp_avg", "exp_avg_sq")
        if isinstance(optimizer, torch.optim.SGD):
            group["fused"] = True  # false in checkpoints of earlier versions
            names = ("momentum_buffer",) if group["momentum"] else ()
        for parameter in group["params"] if names else []:
            state = optimizer.state[parameter]
            if isinstance(optimizer, torch.optim.AdamW) and "step" not in state:
                state["step"] = torch.zeros((), device=parameter.device)
            for name in names:
                saved, complete = state.get(name), torch.zeros_like(parameter)
                state[name] = complete if saved is None else complete.copy_(saved)


def clip_gradients(optimizer: torch.optim.Optimizer, recipe: Recipe) -> None:
    """Clip the gradients by norm (Pascanu et al. 2013) or value, if the recipe has it; the host does not wait.

    Call it before `take_step`, when the gradients are summed over the ranks and unscaled, and it is decided whether the
    step is skipped. A norm above 1e19 is infinite in float32: gradients of that size become 0.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if recipe.clip_norm is not None:
        nn.utils.clip_grad_norm_(parameters, recipe.clip_norm)
    if recipe.clip_value is not None:
        nn.utils.clip_grad_value_(parameters, recipe.clip_value)


def take_step(optimizer: torch.optim.Optimizer, lr: float, skips: Tensor) -> None:
    """Take one step, and drop the gradients.

    A fused kernel reads `skips` on the device. LAMB has no fused kernel: the host waits for `skips` before each step.

    Args:
        optimizer: of `build_optimizer`.
        lr: learning rate of groups whose factor is 1.
        skips: float32 scalar on the device: if it is 1, weights and state do not change, whatever the gradients.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_factor"]
    if optimizer.defaults.get("fused"):
        # GradScaler.step would set these. They are set here because it only looks at gradients, and a step may be
        # skipped for its loss.
        optimizer.grad_scale, optimizer.found_inf = None, skips  # type: ignore[attr-defined]
        optimizer.step()
    elif not skips.item():
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
