"""A run in words: its plan before the first step, and its result after the last."""

import shlex
import shutil
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path

import torch

from resnest_imagenet.compute import name_device
from resnest_imagenet.config import TrainConfig
from resnest_imagenet.distributed import Ranks, count_local_ranks
from resnest_imagenet.errors import printable
from resnest_imagenet.evaluation.events import format_seconds
from resnest_imagenet.options import format_value
from resnest_imagenet.recipe import Recipe
from resnest_imagenet.schemas import RECIPES
from resnest_imagenet.tasks.task import Task
from resnest_imagenet.training.memory import PEAK, count_free_bytes
from resnest_imagenet.training.saving import describe_best
from resnest_imagenet.training.schedule import StepPlan
from resnest_imagenet.training.state import TrainingState

_LABEL = 18  # columns of a line's subject
# Options of recipes that change what is learnt; those that are 0, false or null do nothing.
_SHOWN: tuple[str, ...] = ("optimizer", "momentum", "nesterov", "betas", "weight_decay", "clip_norm", "clip_value")
_SHOWN += ("head_lr_factor", "layer_decay", "ema_decay", "ema_warmup", "patience", "policy", "flips")
_SHOWN += ("jitter", "lighting", "erasing", "mean", "std", "class_weights", "label_smoothing", "mixup_alpha")
_SHOWN += ("cutmix_alpha", "dropout", "dropblock", "drop_path", "norm", "freeze", "freeze_at", "auxiliary_weight")
_SHOWN += ("precision", "compile")
_USUAL = {"head_lr_factor": 1, "layer_decay": 1, "flips": "horizontal"}  # these do nothing, or what is usual


def describe_plan(
    task: Task, plan: StepPlan, state: TrainingState, ranks: Ranks, is_dry: bool = False
) -> dict[str, str]:
    """Return the plan of a run: lines by their subjects. No random number is drawn, and no image is read.

    Args:
        task: of the run.
        plan: the steps.
        state: of the training; may be on the meta device.
        ranks: the ranks of the run.
        is_dry: also count exactly what takes seconds to count.
    """
    recipe = task.config.train
    lines = task.describe(is_dry)
    return {
        "network": f"{lines.pop('network')}, {_count_parameters(state)}",
        **lines,
        "recipe": _describe_recipe(recipe),
        "steps": _describe_steps(recipe, plan, ranks),
        "learning rate": _describe_learning_rate(recipe.schedule, plan),
        "device": f"{ranks.device}: {name_device(ranks.device)}",
        "memory": _describe_memory(task, state, ranks.device, is_dry),
        "checkpoints": _describe_checkpoints(task.config, state),
    }


def format_lines(lines: Mapping[str, str]) -> str:
    """Return lines by their subjects as a table; on a terminal, long ones are broken at its width."""
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 0
    rows = []
    for subject, text in lines.items():
        broken = [printable(text)]
        if width > 2 * _LABEL:
            broken = textwrap.wrap(broken[0], width - _LABEL, break_long_words=False, break_on_hyphens=False)
        rows.append(f"{subject:<{_LABEL}}" + f"\n{' ' * _LABEL}".join(broken))
    return "\n".join(rows)


def describe_result(task: Task, state: TrainingState, best_epoch: int | None, seconds: float, resumed: int) -> str:
    """Return the result of a finished run: the best figure, its duration, its checkpoint, and commands to type next.

    Args:
        task: of the run.
        state: its last.
        best_epoch: of the best evaluation; None if it is unknown.
        seconds: since it was started or resumed.
        resumed: the step after which it was resumed, or 0.
    """
    after = "" if best_epoch is None else f" after epoch {best_epoch} of {state.epoch}"
    since = f" since step {resumed:,}" if resumed else ""
    took = f"{state.step:,} steps, {format_seconds(seconds)}{since}"
    run = Path(task.config.run_dir)
    best = run / "checkpoints/best.pt"
    commands = [f"resnest-report {shlex.quote(str(run))}"]
    if task.config.train.task in RECIPES:
        commands.append(f"resnest-predict ckpt={shlex.quote(str(best))} images={_choose_picture(task)}")
    lines = {"finished": f"best {describe_best(task.metric, state.best)}{after}; {took}", "best network": str(best)}
    if state.has_stalled:
        lines["ended by"] = f"train.patience={state.patience}: as many evaluations without a better best"
    # Not broken at a terminal's width: commands are copied.
    shown = [f"{'next' if number == 0 else '':<{_LABEL}}{command}" for number, command in enumerate(commands)]
    return "\n".join([format_lines(lines), *map(printable, shown)])


def format_bytes(number: int) -> str:
    """Return a size: "17 MB", "6.5 GB", "1,024.0 GB"."""
    return f"{number / 1e9:,.1f} GB" if number >= 1e9 else f"{number / 1e6:,.0f} MB"


def count_state_bytes(state: TrainingState) -> tuple[int, int]:
    """Return the bytes of a checkpoint's tensors, and of the parameters.

    A checkpoint has the weights, their moving average and the optimiser's state.
    """
    weights = sum(tensor.nbytes for tensor in state.model.state_dict().values())
    parameters = sum(parameter.nbytes for parameter in state.model.parameters())
    momentum = sum(tensor.nbytes for entry in state.optimizer.state.values() for tensor in entry.values())
    return weights * (1 if state.ema is None else 2) + momentum, parameters


def _count_parameters(state: TrainingState) -> str:
    parameters = sum(parameter.numel() for parameter in state.model.parameters())
    trained = sum(parameter.numel() for parameter in state.model.parameters() if parameter.requires_grad)
    texts = [f"{count / 1e6:.2f} M" if count >= 1e5 else f"{count:,}" for count in (parameters, trained)]
    return f"{texts[0]} parameters" + (f", {texts[1]} of them trained" if trained < parameters else "")


def _describe_steps(recipe: Recipe, plan: StepPlan, ranks: Ranks) -> str:
    rest = plan.total_steps - (plan.epochs - 1) * plan.steps_per_epoch
    shorter = f", the last of {rest:,}" if rest < plan.steps_per_epoch else ""
    return (
        f"{plan.total_steps:,} in {_count(plan.epochs, 'epoch')} of {plan.steps_per_epoch:,}{shorter}; each of "
        f"{plan.global_batch:,} images: train.batch_size={recipe.batch_size} x {_count(ranks.world_size, 'rank')} x "
        f"{_count(plan.accumulation, 'pass', 'passes')}"
    )


def _count(number: int, unit: str, units: str = "") -> str:
    return f"{number:,} {unit if number == 1 else units or unit + 's'}"


def _describe_recipe(recipe: Recipe) -> str:
    values = {name: getattr(recipe, name, None) for name in _SHOWN}
    others = {"momentum": "sgd", "nesterov": "sgd", "betas": "adamw lamb"}  # the optimizers that have them
    shown = [
        f"{name}={format_value(value)}".replace(" ", "")
        for name, value in values.items()
        if value and value != _USUAL.get(name) and recipe.optimizer in others.get(name, recipe.optimizer)
    ]
    start = [] if recipe.init_from is None else [f"init_from={recipe.init_from}"]
    return f"{recipe.recipe}: {', '.join(shown + start)}"


def _describe_learning_rate(schedule: str, plan: StepPlan) -> str:
    epochs = sorted({plan.epochs * quarter // 4 for quarter in range(4)} | {plan.warmup_steps // plan.steps_per_epoch})
    rates = {epoch: f"{plan.learning_rate(epoch * plan.steps_per_epoch):.3g}" for epoch in epochs}
    later = [f"{rate} after epoch {epoch}, " for epoch, rate in rates.items() if epoch]
    return f"{schedule}: {rates[0]} at first, {''.join(later)}{plan.learning_rate(plan.total_steps - 1):.3g} at last"


def _describe_memory(task: Task, state: TrainingState, device: torch.device, is_exact: bool) -> str:
    """Return the bytes that a rank needs, and the free bytes if the system shows them."""
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else count_free_bytes()
    sharing = 1 if device.type == "cuda" else count_local_ranks()
    enough = 0.0 if is_exact or free is None else free / sharing / PEAK
    checkpoint, parameters = count_state_bytes(state)
    kept = task.count_kept_bytes(device, enough)
    at_most = "" if is_exact or kept >= enough else "at most "
    is_free = "" if free is None else f"; {format_bytes(free)} are free"
    return (
        f"{at_most}{format_bytes(checkpoint + parameters + kept)} per rank for weights, optimiser and activations, "
        f"more in the backward pass{is_free}"
    )


def _describe_checkpoints(config: TrainConfig, state: TrainingState) -> str:
    options, size = config.checkpoint, format_bytes(count_state_bytes(state)[0])
    return (
        f"{size} each in {Path(config.run_dir) / 'checkpoints'}, every {options.every_steps:,} steps and each epoch; "
        f"the last {options.keep} and the best stay"
    )


def _choose_picture(task: Task) -> str:
    """Return an image of the evaluation for resnest-predict; a placeholder if it is not a file."""
    name = task.val_set.name(0)
    picture = shlex.quote(name) if Path(name).is_file() else "PICTURE.jpg"
    return picture + {"segmentation": " out=masks", "detection": " out=found"}.get(task.config.train.task, "")
