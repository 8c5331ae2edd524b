"""The identity of a run: values that must not change when it is resumed, and those that only change its last bits."""

import os
from collections.abc import Callable
from typing import Any

from resnest_imagenet.compute import name_device
from resnest_imagenet.distributed import Ranks
from resnest_imagenet.options import format_value
from resnest_imagenet.tasks.task import Task
from resnest_imagenet.training.run_folder import list_versions

# Entries for each part of the data; if one differs, those after it differ too.
_OF_IMAGES = ("images", "labels", "sizes", "content", "objects")
# Options of a recipe that may change: the batch per rank (with the number of ranks) as long as the global batch stays,
# and options that do not affect the result. With more patience, a run that has ended early resumes.
_MAY_CHANGE = (
    "recipe",
    "batch_size",
    "global_batch",
    "compile",
    "max_skipped_steps",
    "patience",
    "checkpoint_activations",
    "deterministic",
)


def describe_identity(
    task: Task, global_batch: int, ranks: Ranks, tick: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """Return the values that must not change when a run resumes, by option name, and digests of the data.

    All ranks take part.

    Args:
        task: of the run.
        global_batch: images of a step.
        ranks: the ranks of the run.
        tick: called from time to time while files are read, which data.digest may require.
    """
    recipe = {name: value for name, value in task.config.train.model_dump().items() if name not in _MAY_CHANGE}
    recipe["init_from"] = _locate(task.config.train.init_from)
    return {
        **{f"train.{name}": value for name, value in recipe.items()},
        "train.global_batch": global_batch,
        "seed": task.config.seed,
        **task.identify(ranks, tick),
    }


def describe_circumstances(task: Task, ranks: Ranks) -> dict[str, Any]:
    """Return the values that may change when a run is resumed; the result is then no longer the same bit for bit."""
    config, loader = task.config, task.choose_train_loader(ranks.device)
    return {
        "ranks": ranks.world_size,
        "train.batch_size": config.train.batch_size,
        "train.compile": config.train.compile,
        "train.deterministic": config.train.deterministic,
        "model.split_attention": config.model.split_attention,
        **({} if loader is None else {"loader": loader}),
        "device": name_device(ranks.device),
        **list_versions(),
    }


def compare_identity(saved: dict[str, Any], identity: dict[str, Any]) -> dict[str, str]:
    """Return the differences between the run of a checkpoint and another run, in words, by the name of the value.

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
        elif name in before and not any(is_of_images(earlier, name.partition(" ")[0]) for earlier in differences):
            differences[name] = _compare_images(name, str(old), value)
    return differences


def read_identity(saved: dict[str, Any]) -> dict[str, Any]:
    """Return the identity in a checkpoint; {} if it has none."""
    identity = saved.get("identity")
    return identity if isinstance(identity, dict) else {}


def is_of_images(name: str, part: str | None = None) -> bool:
    """Return whether an entry of an identity is about the images, of the given part of the data set if there is one."""
    of, _, entry = name.partition(" ")
    return entry in _OF_IMAGES and part in (of, None)


def _compare_images(name: str, old: str, new: str) -> str:
    part, _, entry = name.partition(" ")
    before, after = old.partition(" ")[0], new.partition(" ")[0]
    if entry == "images":
        return f"{part} images {before} -> {after}" if before != after else f"{after} {part} images of other names"
    if entry == "sizes":
        return f"{part} images of other sizes ({before} -> {after} bytes)"
    return f"{part} images of other {entry}"


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
