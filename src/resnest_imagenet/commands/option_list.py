"""The options of a command in sections, each with the values that it takes, read from the schema."""

import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from resnest_imagenet.options import AUTO, Options, as_list, as_path, keep_auto, keep_own
from resnest_imagenet.recipe import Recipe
from resnest_imagenet.schemas import find_part

_WORDS = {int: "int", float: "float", str: "text"}
_FIXED = {bool: ["true", "false"], type(None): ["null"]}
_SIGNS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}


@dataclass(frozen=True)
class Option:
    """One option.

    Attributes:
        name: dotted, as it is typed.
        kind: the values that it takes, in words.
        description: the schema's; "" for an option of another package that has none.
    """

    name: str
    kind: str
    description: str


@dataclass(frozen=True)
class Section:
    """Options that one class defines.

    Attributes:
        name: what stands before the dot of their names; "" for the command's own.
        title: the first line of the class's docstring.
        options: in the order of the class.
        schema: the class.
    """

    name: str
    title: str
    options: Sequence[Option]
    schema: type[Options]


def list_sections(schema: type[Options], values: Mapping[str, Any]) -> list[Section]:
    """Return the sections of a command's options, the command's own first.

    Args:
        schema: of the command, for one task: see `schemas.choose_schema`.
        values: what was composed; a section that is null in it has no options.
    """
    fields = schema.model_fields
    parts = {name: find_part(field) for name, field in fields.items()}
    own = [_describe(name, fields[name]) for name, part in parts.items() if part is None]
    sections = [Section("", _first_line(schema), own, schema)] if own else []
    for name, part in parts.items():
        if part is not None and values.get(name) is not None:
            sections += _split_section(name, part)
    return sections


def _split_section(name: str, part: type[Options]) -> Iterator[Section]:
    """Yield the options of a section; of a recipe those of every task first."""
    options = {option: _describe(f"{name}.{option}", field) for option, field in part.model_fields.items()}
    if issubclass(part, Recipe) and part is not Recipe:
        yield Section(name, _first_line(Recipe), [options.pop(option) for option in Recipe.model_fields], Recipe)
    yield Section(name, _first_line(part), list(options.values()), part)


def _first_line(schema: type[Options]) -> str:
    return (schema.__doc__ or schema.__name__).strip().partition("\n")[0]


def _describe(name: str, field: FieldInfo) -> Option:
    return Option(name, join_words(list_values(field.annotation, field.metadata)), field.description or "")


def join_words(words: Sequence[str]) -> str:
    """Return "a, b or c"."""
    return " or ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def list_values(annotation: Any, constraints: Sequence[Any] = ()) -> list[str]:
    """Return the alternatives that a type allows, in words: ["int >= 1", "null"].

    Args:
        annotation: of an option.
        constraints: pydantic's metadata of it.
    """
    functions = [getattr(constraint, "func", None) for constraint in constraints]
    origin, parts = get_origin(annotation), get_args(annotation)
    for keep, word in ((keep_own, "own"), (keep_auto, AUTO)):
        if keep in functions:
            others = [constraint for constraint in constraints if getattr(constraint, "func", None) is not keep]
            return [word, *list_values(annotation, others)]
    if origin is Annotated:
        inner = [item for part in parts[1:] for item in (part.metadata if isinstance(part, FieldInfo) else [part])]
        return list_values(parts[0], [*inner, *constraints])
    if origin in (Union, types.UnionType):
        return [word for part in parts for word in list_values(part, constraints)]
    if origin is Literal:
        return [str(part) for part in parts]
    if origin is list:
        return _list_items(list_values(parts[0]), constraints, as_list in functions)
    word = "path" if as_path in functions else _bound(_WORDS.get(annotation, "any value"), constraints)
    return _FIXED.get(annotation, [word])


def _list_items(words: list[str], constraints: Sequence[Any], may_be_bare: bool) -> list[str]:
    """Return what a list takes: "list of 2: float > 0"."""
    if may_be_bare and len(words) == 1:
        return [*words, "a list of them"]
    sizes = [f"{item.max_length}: " for item in constraints if getattr(item, "max_length", None)]
    items = join_words(words) if len(words) == 1 else f"({join_words(words)})"
    return [f"list of {''.join(sizes)}{items}"]


def _bound(word: str, constraints: Sequence[Any]) -> str:
    """Return a number with its bounds: "0 <= float < 1" or "int >= 1"."""
    bounds = [
        (sign, getattr(item, name)) for item in constraints for name, sign in _SIGNS.items() if hasattr(item, name)
    ]
    above = [(sign, value) for sign, value in bounds if ">" in sign]
    below = [(sign, "2^63" if value == 2**63 else value) for sign, value in bounds if "<" in sign]
    if not below:
        return " ".join([word, *(f"{sign} {value}" for sign, value in above)])
    left = "".join(f"{value} {sign.replace('>', '<')} " for sign, value in above)
    return f"{left}{word} {below[0][0]} {below[0][1]}"
