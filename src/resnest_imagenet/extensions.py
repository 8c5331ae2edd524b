"""Networks, data sources and tasks from outside the package: registered by a call, or by an installed package.

An installed package names a function without arguments under the entry-point group `resnest_imagenet`. The function
registers the package's entries; it is called once in each process, when a name is first looked up.
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
    """A registration under one name.

    Attributes:
        function: full name of the function.
        origin: in words, where it comes from: the package, or the module of the function.
    """

    function: str = field(kw_only=True)
    origin: str = field(kw_only=True)


@dataclass(frozen=True)
class Model(Entry):
    """A network.

    Attributes:
        build: builds it, see `register_model`.
        head: name of its classifier.
        crop: side of the images on which it is usually tested, in pixels.
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
        open: makes it from a run's configuration.
        recipe: the class of its recipe.
    """

    open: Callable[[Any], Any]
    recipe: type


AnyEntry = TypeVar("AnyEntry", bound=Entry)


class Registry(Generic[AnyEntry]):
    """The registrations of one kind."""

    def __init__(self, kind: str) -> None:
        """Begin without entries.

        Args:
            kind: its name, for messages.
        """
        self._kind = kind
        self._own: Collection[str] = ()
        self._entries: dict[str, AnyEntry] = {}

    def reserve(self, names: Collection[str]) -> None:
        """Reserve the project's own names; an entry that has one of them already is dropped with a warning."""
        self._own = names
        for name in [name for name in self._entries if name in names]:
            _warn(self._refuse_own(name, self._entries.pop(name)))

    def register(self, name: str, entry: AnyEntry) -> None:
        """Add an entry. The same function replaces its own entry, as when a cell is run or a module imported again.

        Raises:
            ConfigError: the name is taken.
        """
        if name in self._own:
            raise ConfigError(self._refuse_own(name, entry))
        before = self._entries.get(name, entry)
        if before.function != entry.function:
            origins = " and ".join(f"by {taker.origin} ({taker.function})" for taker in (before, entry))
            raise ConfigError(f"{self._kind} {name!r} is registered twice: {origins}")
        self._entries[name] = entry

    def read(self) -> Mapping[str, AnyEntry]:
        """Return all entries by name, also those of installed packages; a package that fails gives one warning."""
        _ask_packages()
        return MappingProxyType(self._entries)

    def find(self, name: str) -> AnyEntry | None:
        """Return the entry of a name, or None.

        Installed packages are loaded only for names that are not the project's own.

        Raises:
            ConfigError: there is no entry, and a package that may have it fails to register.
        """
        if name in self._own:
            return None
        failures = _ask_packages()
        if name not in self._entries and failures:
            advice = suggest(name, [*self._own, *self._entries]) or ","
            raise ConfigError(f"unknown {self._kind} {name!r}{advice} and {'; '.join(failures)}")
        return self._entries.get(name)

    def _refuse_own(self, name: str, entry: AnyEntry) -> str:
        return f"{entry.origin} registers {self._kind} {name!r}, which this project has itself: choose another name"


models = Registry[Model]("model")
sources = Registry[Source]("data source")
tasks = Registry[Task]("task")
_loading: list[str] = []  # the package whose entry point is being called


def register_model(name: str, build: Callable[..., Any], *, head: str = "fc", crop: int = 224) -> None:
    """Register a network under a name, for `model.name=NAME` and `build_model(NAME)`.

    Args:
        name: a new name.
        build: called as build(num_classes=..., ...); returns an nn.Module that maps normalised images (B, 3, H, W) to
            logits (B, num_classes). Of the other options of `build_model` (dropout, zero_gamma, output_stride, init,
            split_attention) it gets those that its signature names. It initialises the weights itself.
        head: name of the classifier, the module whose weight has a row for each class.
        crop: side of the images on which it is usually tested, in pixels.

    Raises:
        ConfigError: the name is taken.
    """
    models.register(name, Model(build, head, crop, **_describe(build)))


def register_source(kind: str, open_source: Callable[[str, str, str], Any]) -> None:
    """Register a kind of data source, for `data.kind=KIND`.

    Args:
        kind: a new name.
        open_source: called as open_source(root, part, option); returns the `ImageSource` of one part of a data set.
            The part has the name `part` in the folder `root`; the user sets that name by `option`.

    Raises:
        ConfigError: the name is taken.
    """
    sources.register(kind, Source(open_source, **_describe(open_source)))


def register_task(name: str, open_task: Callable[[Any], Any], recipe: type) -> None:
    """Register a task, for `train.task=NAME`.

    Args:
        name: a new name.
        open_task: makes a `tasks.task.Task` from the run's `TrainConfig`.
        recipe: the class of its recipe, a `config.Recipe`.

    Raises:
        ConfigError: the name is taken.
    """
    tasks.register(name, Task(open_task, recipe, **_describe(open_task)))


@contextmanager
def naming(label: str) -> Iterator[None]:
    """Turn an error of another package's code into one line with its name and the place of the error.

    A `UserError`, and an error that the machine causes, is not changed.

    Args:
        label: the code that runs, for the line.
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
        raise ConfigError(f"{label} failed: {type(error).__name__}: {text} ({place})") from error


def _describe(function: Callable[..., Any]) -> dict[str, str]:
    """Return the attributes of an `Entry`."""
    function = function.func if isinstance(function, partial) else function
    module = getattr(function, "__module__", type(function).__module__)
    name = getattr(function, "__qualname__", type(function).__qualname__)
    return {"function": f"{module}.{name}", "origin": _loading[-1] if _loading else f"module {module}"}


def _ask_packages() -> Sequence[str]:
    """Make each package register, once in a process; return a line for each that fails."""
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
