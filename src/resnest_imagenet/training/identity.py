"""What makes a run the same run: what must not change when it is resumed, and what changes its bits only."""

import os
from collections.abc import Callable
from typing import Any

from resnest_imagenet.compute import name_device
from resnest_imagenet.config import TrainConfig
from resnest_imagenet.data.loader import choose_loader
from resnest_imagenet.distributed import Ranks
from resnest_imagenet.options import format_value
from resnest_imagenet.tasks.task import Task
from resnest_imagenet.training.run_folder import list_versions
from resnest_imagenet.training.schedule import StepPlan

# What an identity has of each part of the data; where one differs, those after it differ too.
_OF_IMAGES = ("images", "labels", "sizes", "content", "objects")
# Options of a recipe that may change: the number of ranks, and with it the batch, as long as the global batch stays;
# and what leaves the run as it is.
_MAY_CHANGE = ("recipe", "batch_size", "global_batch", "compile", "max_skipped_steps", "checkpoint_activations")


def describe_identity(
    task: Task, plan: StepPlan, ranks: Ranks, tick: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """Return what must not change when a run resumes: plain values by option name, and digests of the data.

    All ranks take part.

    Args:
        task: of the run.
        plan: its steps.
        ranks: who takes part.
        tick: called from time to time while files are read, as data.digest asks for.
    """
    recipe = {name: value for name, value in task.config.train.model_dump().items() if name not in _MAY_CHANGE}
    recipe["init_from"] = _locate(task.config.train.init_from)
    return {
        **{f"train.{name}": value for name, value in recipe.items()},
        "train.global_batch": plan.global_batch,
        "seed": task.config.seed,
        **task.identify(ranks, tick),
    }


def describe_circumstances(config: TrainConfig, ranks: Ranks) -> dict[str, Any]:
    """Return what may change when a run is resumed, but then the result is no longer the same bit for bit."""
    return {
        "ranks": ranks.world_size,
        "train.batch_size": config.train.batch_size,
        "train.compile": config.train.compile,
        "model.split_attention": config.model.split_attention,
        "loader": choose_loader(config.loader.name),
        "device": name_device(ranks.device),
        **list_versions(),
    }


def compare_identity(saved: dict[str, Any], identity: dict[str, Any]) -> dict[str, str]:
    """Return how the run of a checkpoint differs from another, in words by what differs.

    Entries about the data that the checkpoint lacks are not compared.
    """
    before = {"classes": saved.get("classes"), **read_identity(saved)}
    differences: dict[str, str] = {}
    for name, value in identity.items():
        old = _locate(before.get(name)) if name == "train.init_from" else before.get(name)
        if old == value:
            continue
        if name == "classes":
            differences[name] = _compare_classes(old, value)
        elif not is_of_images(name):
            differences[name] = f"{name}={format_value(old)}, not {format_value(value)}"
        elif name in before and not any(is_of_images(other, name.partition(" ")[0]) for other in differences):
            differences[name] = _compare_images(name, str(old), value)
    return differences


def read_identity(saved: dict[str, Any]) -> dict[str, Any]:
    """Return the identity in a checkpoint; {} where it has none."""
    identity = saved.get("identity")
    return identity if isinstance(identity, dict) else {}


def is_of_images(name: str, part: str | None = None) -> bool:
    """Say whether an entry of an identity is about the images, of one part of the data set where that is given."""
    of, _, what = name.partition(" ")
    return what in _OF_IMAGES and part in (of, None)


def _compare_images(name: str, old: str, new: str) -> str:
    part, _, what = name.partition(" ")
    before, now = old.partition(" ")[0], new.partition(" ")[0]
    if what == "images":
        return f"{part} images {before} -> {now}" if before != now else f"{now} {part} images of other names"
    if what == "sizes":
        return f"{part} images of other sizes ({before} -> {now} bytes)"
    return f"{part} images of other {what}"


def _compare_classes(old: Any, new: list[str]) -> str:
    if not isinstance(old, list) or len(old) != len(new):
        return f"classes {len(old) if isinstance(old, list) else 'unknown'} -> {len(new)}"
    if sorted(old) == sorted(new):
        return "the classes in another order"
    label = next(label for label, name in enumerate(new) if name != old[label])
    return f"class {label} {old[label]} -> {new[label]}"


def _locate(init_from: Any) -> Any:
    """Return the absolute path of a file, without links; the name of published weights as it is."""
    if not isinstance(init_from, str) or init_from.startswith(("official:", "timm:")):
        return init_from
    return os.path.realpath(init_from)
