"""What other packages add: tasks and kinds of data."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ExtensionTask:
    """A task from outside the package: `open` makes it of a TrainConfig, `recipe` is the schema of its `train`."""

    open: Callable[[Any], Any]
    recipe: type


_tasks: dict[str, ExtensionTask] = {}


def register_task(name: str, open_task: Callable[[Any], Any], recipe: type) -> None:
    """Add a task."""
    _tasks[name] = ExtensionTask(open_task, recipe)


def tasks() -> dict[str, ExtensionTask]:
    """Return the tasks that were registered, by name."""
    return _tasks


def sources() -> dict[str, Callable[..., Any]]:
    """Return the kinds of data that were registered."""
    return {}
