"""Networks, data sources and tasks from outside the package: registered by a call, or by an installed package.

A package that is installed beside this one names, under the entry-point group `resnest_imagenet`, a function without
arguments that registers what it brings; it is called once in each process, when a name is first looked for.
"""

import sys
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from importlib.metadata import entry_points
from pathlib import Path
from types import MappingProxyType
from typing import Any, Generic, TypeVar

from resnest_imagenet.errors import ConfigError, UserError, explain_runtime, first_line, printable, suggest

GROUP = "resnest_imagenet"


@dataclass(frozen=True)
class Entry:
    """What was registered under one name.

    Attributes:
        function: full name of the function.
        origin: who has registered it, in words: the package, or the module of the function.
    """

    function: str = field(kw_only=True)
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


class Registry(Generic[AnyEntry]):
    """What was registered of one kind."""

    def __init__(self, what: str) -> None:
        """Begin without entries.

        Args:
            what: the kind, for messages.
        """
        self._what = what
        self._own: Collection[str] = ()
        self._entries: dict[str, AnyEntry] = {}

    def reserve(self, names: Collection[str]) -> None:
        """Keep names for the project's own; what was registered under one of them before is dropped, with a warning."""
        self._own = names
        for name in [name for name in self._entries if name in names]:
            _warn(self._refuse_own(name, self._entries.pop(name)))

    def register(self, name: str, entry: AnyEntry) -> None:
        """Add an entry; the same function again, of a notebook's cell or a module imported again, replaces its own.

        Raises:
            ConfigError: the name is taken.
        """
        if name in self._own:
            raise ConfigError(self._refuse_own(name, entry))
        before = self._entries.get(name, entry)
        if before.function != entry.function:
            who = " and ".join(f"by {taker.origin} ({taker.function})" for taker in (before, entry))
            raise ConfigError(f"{self._what} {name!r} is registered twice: {who}")
        self._entries[name] = entry

    def read(self) -> Mapping[str, AnyEntry]:
        """Return what was registered, by name, also by installed packages; one that fails is a warning, once."""
        _ask_packages()
        return MappingProxyType(self._entries)

    def find(self, name: str) -> AnyEntry | None:
        """Return what was registered under a name, or None.

        Installed packages are asked only for names that are not the project's own.

        Raises:
            ConfigError: nobody has registered it, and a package fails to register: it may be that one's.
        """
        if name in self._own:
            return None
        failures = _ask_packages()
        if name not in self._entries and failures:
            advice = suggest(name, [*self._own, *self._entries]) or ","
            raise ConfigError(f"unknown {self._what} {name!r}{advice} and {'; '.join(failures)}")
        return self._entries.get(name)

    def _refuse_own(self, name: str, entry: AnyEntry) -> str:
        return f"{entry.origin} registers {self._what} {name!r}, which this project has itself: choose another name"


models = Registry[Model]("model")
sources = Registry[Source]("data source")
tasks = Registry[Task]("task")
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
    models.register(name, Model(build, head, crop, **_describe(build)))


def register_source(kind: str, open_source: Callable[[str, str, str], Any]) -> None:
    """Make a kind of data source known: `data.kind=KIND`.

    Args:
        kind: a new name.
        open_source: called as open_source(root, part, option), returns the `ImageSource` of one part of a data set:
            the folder `root` has it under the name `part`, and the user sets that by `option`.

    Raises:
        ConfigError: the name is taken.
    """
    sources.register(kind, Source(open_source, **_describe(open_source)))


def register_task(name: str, open_task: Callable[[Any], Any], recipe: type) -> None:
    """Make a task known: `train.task=NAME`.

    Args:
        name: a new one.
        open_task: makes a `tasks.task.Task` of the run's `TrainConfig`.
        recipe: the class of its recipe, a `config.Recipe`.

    Raises:
        ConfigError: the name is taken.
    """
    tasks.register(name, Task(open_task, recipe, **_describe(open_task)))


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
        frames = traceback.extract_tb(error.__traceback__)
        frame = [frame for frame in frames if not frame.filename.startswith("<frozen")][-1]
        place = f"{Path(frame.filename).name}, line {frame.lineno}"
        text = printable(first_line(error))
        raise ConfigError(f"{what} failed: {type(error).__name__}: {text} ({place})") from error


def _describe(function: Callable[..., Any]) -> dict[str, str]:
    """Return the attributes of an `Entry`."""
    function = function.func if isinstance(function, partial) else function
    module = getattr(function, "__module__", type(function).__module__)
    name = getattr(function, "__qualname__", type(function).__qualname__)
    return {"function": f"{module}.{name}", "origin": _loading[-1] if _loading else f"module {module}"}


def _ask_packages() -> Sequence[str]:
    """Let each package register, once in a process; return a line for each that fails."""
    return () if _loading else _call_entry_points()  # a package may look up a name while it registers


@cache
def _call_entry_points() -> Sequence[str]:
    failures = []
    for entry_point in entry_points(group=GROUP):
        package = f"package {entry_point.dist.name if entry_point.dist else entry_point.module}"
        _loading.append(package)
        try:
            with naming(f"{package}: its entry point {entry_point.name} = {entry_point.value}"):
                entry_point.load()()
        except UserError as error:
            failures.append(str(error))
            _warn(failures[-1])
        finally:
            _loading.pop()
    return failures


def _warn(line: str) -> None:
    print(f"WARNING: {printable(line)}", file=sys.stderr, flush=True)
