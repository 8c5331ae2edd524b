"""What a command prints for --help: its examples, the choices that it can use, and its options with their values."""

import shutil
import textwrap
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resnest_imagenet.commands.choices import describe_choices, list_choices, list_groups
from resnest_imagenet.commands.option_list import Section, list_sections
from resnest_imagenet.options import Options, format_value
from resnest_imagenet.schemas import choose_schema

if TYPE_CHECKING:
    from omegaconf import DictConfig

HELP = frozenset({"-h", "--help"})
# The widest that lines become, where the descriptions begin, and the longest list of values that is kept in a line.
_WIDEST, _NARROWEST, _COLUMN, _LONGEST_KIND = 100, 60, 28, 40
# Groups whose choices are described; the names of experiments and networks are enough.
_DESCRIBED = ("task", "data", "recipe", "protocol")
_NO_BREAK = "\N{NO-BREAK SPACE}"
UNSET = "???"  # OmegaConf's


def drop_flags(words: Sequence[str]) -> list[str]:
    """Return the words of a command line without those that would not show the help of one job."""
    return [word for word in words if word not in HELP | {"-m", "--multirun", "-r", "--run", "--resolve"}]


def format_help(composed: "DictConfig", schema: type[Options]) -> str:
    """Return the help of a command.

    Args:
        composed: what Hydra composed for it, in its task.
        schema: of the command.

    Raises:
        ConfigError: the task, the recipe and the protocol do not fit together.
    """
    from hydra.core.hydra_config import HydraConfig

    hydra = HydraConfig.get()
    width = max(_NARROWEST, min(_WIDEST, shutil.get_terminal_size((80, 24)).columns))
    values = read_values(composed)
    sections = list_sections(choose_schema(schema, values), values)
    folders = find_folders(hydra.runtime.config_sources)
    chosen = dict(hydra.runtime.choices)
    groups = {group: list_choices(schema, group, folders) for group in list_groups(schema, chosen)}
    lines = []
    for group, choices in groups.items():
        meanings = describe_choices(group, folders) if group in _DESCRIBED else {}
        lines.append(_format_group(group, chosen, choices, meanings, width))
    texts = [_fill(hydra.help.template, width), "\n".join(["Choices: group=NAME", *lines]) if lines else ""]
    texts += [_format_section(section, values, width) for section in sections]
    return "\n\n".join(filter(None, texts))


def read_values(composed: "DictConfig") -> dict[str, Any]:
    """Return composed values, with what they refer to where that is set."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        values = OmegaConf.to_container(composed, resolve=True)
    except OmegaConfBaseException:  # a value refers to one that is not set
        values = OmegaConf.to_container(composed)
    assert isinstance(values, dict)
    return {str(name): value for name, value in values.items()}


def find_folders(sources: Sequence[Any]) -> list[Path]:
    """Return the folders that Hydra composes from: conf/, --config-dir and those of other packages."""
    find = {"file": Path, "pkg": lambda package: Path(str(files(package)))}
    own = [source for source in sources if source.schema in find and source.provider != "hydra"]
    return [find[source.schema](source.path) for source in own]


def _fill(text: str, width: int) -> str:
    """Fill the paragraphs of a text, but for examples and tables, which are indented."""
    paragraphs = text.strip().split("\n\n")
    return "\n\n".join(
        paragraph if "\n " in f"\n{paragraph}" else _wrap(paragraph, width, "", "") for paragraph in paragraphs
    )


def _format_group(
    group: str, chosen: Mapping[str, Any], choices: Mapping[str, Sequence[str]], meanings: Mapping[str, str], width: int
) -> str:
    """Return the choices of a group; with a line for each task where they are of several.

    Args:
        group: its name.
        chosen: what is chosen, by group. Choices of another task than the chosen one are not described.
        choices: of `list_choices`.
        meanings: of the choices, by name; {}: they are not described.
        width: of the lines.
    """
    own = chosen.get(group)
    heading = f"+experiment={own or 'NAME'}" if group == "experiment" else f"{group}={own or 'null'}"
    if len(choices.keys() - {""}) < 2:
        choices = {"": [name for names in choices.values() for name in names]}
    lines = []
    for task, names in choices.items():
        if meanings and task in ("", chosen.get("task", task)):
            lines += [f"      {task}:"] if task else []
            lines += [_format_row(f"      {name}", meanings[name], width) for name in names]
        else:
            text = f"{task}: {', '.join(names)}" if task else ", ".join(names)
            lines.append(_wrap(text, width, "      ", "        "))
    if len(lines) == 1 and len(lines[0].strip()) <= width - _COLUMN:
        return _format_row(heading, lines[0], width)
    return "\n".join([f"  {heading}", *lines])


def _format_section(section: Section, values: Mapping[str, Any], width: int) -> str:
    """Return the options of a section, with their values."""
    part = values[section.name] if section.name else values
    title = f"{section.name}.*: {section.title}" if section.name else "Options: option=value"
    options = {option: part.get(option.name.rpartition(".")[2], UNSET) for option in section.options}
    rows = []
    for option, value in sorted(options.items(), key=lambda item: item[1] != UNSET):  # first what must be given
        kind = f"[{option.kind}{'; required' if value == UNSET else ''}]"
        if len(kind) <= _LONGEST_KIND:
            kind = kind.replace(" ", _NO_BREAK)
        rows.append(_format_row(f"{option.name}={format_typed(value)}", f"{option.description} {kind}", width))
    return "\n".join([_wrap(title, width, "", "  "), *rows])


def format_typed(value: Any) -> str:
    """Return a value as it is typed; "..." where it must be given."""
    if isinstance(value, list):
        return f"[{','.join(map(format_typed, value))}]"
    return "..." if value == UNSET else format_value(value)


def _format_row(heading: str, text: str, width: int) -> str:
    """Return a heading at the left, and a text at the right: on the next line where there is no place."""
    text = _wrap(text.strip(), width, " " * _COLUMN, " " * _COLUMN)
    heading = f"  {heading}"
    return heading + (text[len(heading) :] if len(heading) < _COLUMN else f"\n{text}")


def _wrap(text: str, width: int, first: str, others: str) -> str:
    """Return a text in lines that begin with these."""
    lines = textwrap.fill(
        text, width, initial_indent=first, subsequent_indent=others, break_on_hyphens=False, break_long_words=False
    )
    return lines.replace(_NO_BREAK, " ")
