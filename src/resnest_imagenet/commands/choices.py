"""The choices of the groups of conf/ that a command can use, by task."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from resnest_imagenet.config import KINDS, TrainConfig
from resnest_imagenet.config_reading import OwnProtocolOptions
from resnest_imagenet.options import Options
from resnest_imagenet.schemas import RECIPES, find_kind, find_part, list_schemas

# In the order in which they are shown.
_GROUPS = ("experiment", "task", "model", "data", "recipe", "protocol", "loader")
_TASKS_OF_PROTOCOLS = {find_kind(recipe.PROTOCOL.model_fields): task for task, recipe in RECIPES.items()}


def list_groups(schema: type[Options], chosen: Mapping[str, Any]) -> list[str]:
    """Return the groups that a command chooses from.

    Args:
        schema: of the command.
        chosen: what is chosen, by group, Hydra's own groups among them.
    """
    groups = {group for group in chosen if "/" not in group}
    groups |= {"experiment"} if issubclass(schema, TrainConfig) else set()
    return [group for group in _GROUPS if group in groups] + sorted(groups - set(_GROUPS))


def list_choices(schema: type[Options], group: str, folders: Sequence[Path]) -> dict[str, list[str]]:
    """Return the choices of a group that a command can use, by task; under "" those that serve every task.

    Args:
        schema: of the command, of every task.
        group: of `list_groups`.
        folders: conf/, and those of other packages.
    """
    texts = _read_texts(group, folders)
    choices: dict[str, list[str]] = {task: [] for task in ["", *RECIPES]}
    for name in sorted(texts, key=_order_naturally):
        text = texts[name]
        task = _find_protocols_task(schema, text) if group == "protocol" else _find_task(group, name, texts)
        if task is not None:
            choices.setdefault(task, []).append(name)
    return {task: names for task, names in choices.items() if names}


def describe_choices(group: str, folders: Sequence[Path]) -> dict[str, str]:
    """Return what the choices of a group are, by name: the first sentence of each file; "" where it has no comment.

    Args:
        group: of `list_groups`.
        folders: conf/, and those of other packages.
    """
    return {name: _find_sentence(text) for name, text in _read_texts(group, folders).items()}


def _read_texts(group: str, folders: Sequence[Path]) -> dict[str, str]:
    return {file.stem: file.read_text() for folder in folders for file in (folder / group).glob("*.yaml")}


def _find_sentence(text: str) -> str:
    """Return the first sentence of the comment that a file begins with."""
    comment = re.match(r"(?:# @package .*\n)?((?:# .*\n)*)", text)
    assert comment is not None
    words = " ".join(line.removeprefix("# ") for line in comment[1].splitlines())
    return re.split(r"(?<=\.)\s", words, maxsplit=1)[0]


def _find_protocols_task(schema: type[Options], text: str) -> str | None:
    """Return the task of a protocol; None for one that the command does not take."""
    option = next((option for option in _TASKS_OF_PROTOCOLS if option in _list_keys(text)), "")
    taken = [find_part(variant.model_fields["protocol"]) for variant in list_schemas(schema)]
    if "\norder: own" in text:
        return "" if OwnProtocolOptions in taken else None
    is_taken = any(protocol and option in protocol.model_fields for protocol in taken)
    return _TASKS_OF_PROTOCOLS[option] if is_taken else None


def _find_task(group: str, name: str, texts: Mapping[str, str]) -> str:
    """Return the task that a choice of any other group serves."""
    text = texts[name]
    if group == "experiment":
        return "".join(re.findall(r"override /task: (\w+)", text)) or "classification"
    if group == "data":
        kind = "".join(re.findall(r"^kind: (\w+)", text, re.MULTILINE))
        return next((task for task, kinds in KINDS.items() if kind in kinds), "")
    if group == "recipe":
        names = [name, *re.findall(r"^  - ([a-z]\w*)$", text, re.MULTILINE)]  # with the recipe that it starts from
        keys = {key for name in names for key in _list_keys(texts.get(name, ""))}
        return next((task for task, recipe in RECIPES.items() if keys <= recipe.model_fields.keys()), "")
    return ""


def _order_naturally(name: str) -> list[str | int]:
    """Return a key that puts resnest50 before resnest101."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def _list_keys(text: str) -> set[str]:
    """Return the names at the left margin of a file."""
    return set(re.findall(r"^(\w+):", text, re.MULTILINE)) - {"defaults"}
