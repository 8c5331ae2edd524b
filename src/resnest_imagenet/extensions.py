"""Networks, data sources and tasks from outside the package: registered by a call, or by an installed package.

A package that is installed beside this one names, under the entry-point group `resnest_imagenet`, a function without
arguments that registers what it brings; it is called once in each process, when a name is first looked for.
"""

import traceback
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from resnest_imagenet.errors import ConfigError, UserError, explain_runtime, first_line, printable

GROUP = "resnest_imagenet"


@dataclass(frozen=True)
class Entry:
    """What was registered under one name.

    Attributes:
        origin: who has registered it, in words: the package, or the module of the function.
    """

    origin: str = field(kw_only=True)


@dataclass(frozen=True)
class Model(Entry):
    """A network.

    Attributes:
        build: makes it, see `register_model`.
        head: name of its classifier.
        crop: side of the images that it is usually tested on, in pixels.
    """

    build: Callable[..., Any]
    head: str
    crop: int


@dataclass(frozen=True)
class Source(Entry):
    """A kind of data source.

    Attributes:
        open: lists the images of one part of a data set, see `register_source`.
    """

    open: Callable[[str, str, str], Any]


@dataclass(frozen=True)
class Task(Entry):
    """A task.

    Attributes:
        open: makes it of a run's configuration.
        recipe: the class of its recipe.
    """

    open: Callable[[Any], Any]
    recipe: type


AnyEntry = TypeVar("AnyEntry", bound=Entry)
_models: dict[str, Model] = {}
_sources: dict[str, Source] = {}
_tasks: dict[str, Task] = {}
_loaded: set[str] = set()  # groups whose entry points were called
_loading: list[str] = []  # the package whose entry point is being called


def register_model(name: str, build: Callable[..., Any], *, head: str = "fc", crop: int = 224) -> None:
    """Make a network known by a name, as those of `list_models()` are: `model.name=NAME`, `build_model(NAME)`.

    Args:
        name: a new one.
        build: called as build(num_classes=..., ...), returns an nn.Module that maps normalised images (B, 3, H, W) to
            logits (B, num_classes). Of the other options of `build_model` (dropout, zero_gamma, output_stride, init,
            split_attention) it gets those that its signature names. The first weights are its own.
        head: name of the classifier, the module whose weight has a row for each class.
        crop: side of the images that it is usually tested on, in pixels.

    Raises:
        ConfigError: the name is taken.
    """
    _register(_models, "model", name, Model(build, head, crop, origin=_name_origin(build)))


def register_source(kind: str, open_source: Callable[[str, str, str], Any]) -> None:
    """Make a kind of data source known: `data.kind=KIND`.

    Args:
        kind: a new name.
        open_source: called as open_source(root, part, option), returns the `ImageSource` of one part of a data set:
            the folder `root` has it under the name `part`, and the user sets that by `option`.

    Raises:
        ConfigError: the name is taken.
    """
    _register(_sources, "data source", kind, Source(open_source, origin=_name_origin(open_source)))


def register_task(name: str, open_task: Callable[[Any], Any], recipe: type) -> None:
    """Make a task known: `train.task=NAME`.

    Args:
        name: a new one.
        open_task: makes a `tasks.task.Task` of the run's `TrainConfig`.
        recipe: the class of its recipe, a `config.Recipe`.

    Raises:
        ConfigError: the name is taken.
    """
    _register(_tasks, "task", name, Task(open_task, recipe, origin=_name_origin(open_task)))


def models(installed: bool = True) -> Mapping[str, Model]:
    """Return the networks that were registered, by name.

    Args:
        installed: installed packages register theirs before; otherwise those that have not, have not.

    Raises:
        ConfigError: names a package that fails to register.
    """
    if installed:
        _load_packages()
    return MappingProxyType(_models)


def sources(installed: bool = True) -> Mapping[str, Source]:
    """Return the data sources that were registered, by kind; otherwise as `models`."""
    if installed:
        _load_packages()
    return MappingProxyType(_sources)


def tasks(installed: bool = True) -> Mapping[str, Task]:
    """Return the tasks that were registered, by name; otherwise as `models`."""
    if installed:
        _load_packages()
    return MappingProxyType(_tasks)


def find(entries: Callable[[bool], Mapping[str, AnyEntry]], name: str, own: Container[str]) -> AnyEntry | None:
    """Return what was registered under a name, or None.

    Installed packages are asked for names only that are not the project's own: one that fails harms nothing else.

    Args:
        entries: `models`, `sources` or `tasks`.
        name: looked for.
        own: names of the project's own.

    Raises:
        ConfigError: the name is the project's own, and was registered all the same; or a package fails to register.
    """
    entry = entries(name not in own).get(name)
    if entry is not None and name in own:
        raise ConfigError(f"{entry.origin} registers {name!r}, which this project has itself: choose another name")
    return entry


@contextmanager
def naming(what: str) -> Iterator[None]:
    """Turn an error of another package's code into one line that names it, and where it was raised.

    Errors that are lines already, or that the machine causes, stay as they are.

    Args:
        what: whose code runs, for the line.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if explain_runtime(error):
            raise
        frames = [each for each in traceback.extract_tb(error.__traceback__) if not each.filename.startswith("<frozen")]
        place = f"{Path(frames[-1].filename).name}, line {frames[-1].lineno}"
        text = printable(first_line(error))
        raise ConfigError(f"{what} failed: {type(error).__name__}: {text} ({place})") from error


def _register(entries: dict[str, AnyEntry], what: str, name: str, entry: AnyEntry) -> None:
    before = entries.get(name)
    # A notebook's cell, or a module that is imported again, replaces its own.
    if before is not None and before.origin != entry.origin:
        raise ConfigError(f"{what} {name!r} is registered twice: by {before.origin} and by {entry.origin}")
    entries[name] = entry


def _name_origin(function: Callable[..., Any]) -> str:
    return _loading[-1] if _loading else f"module {getattr(function, '__module__', type(function).__module__)}"


def _load_packages() -> None:
    """Call each entry point once; where one fails, all are called again at the next look."""
    if GROUP in _loaded or _loading:  # a package may look up a name while it registers
        return
    for entry_point in entry_points(group=GROUP):
        package = entry_point.dist.name if entry_point.dist else entry_point.module
        _loading.append(f"package {package}")
        try:
            with naming(f"package {package}: its entry point {entry_point.name} = {entry_point.value}"):
                entry_point.load()()
        finally:
            _loading.pop()
    _loaded.add(GROUP)
