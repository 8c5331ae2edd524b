"""The schema of a command for the chosen task, and the names of its options."""

from collections.abc import Collection, Iterator, Mapping
from functools import cache
from typing import Any, TypeVar, get_args, get_origin

from pydantic import create_model
from pydantic.fields import FieldInfo

from resnest_imagenet import extensions
from resnest_imagenet.config import TrainConfig
from resnest_imagenet.config_reading import (
    AppConfig,
    CompareConfig,
    EvalConfig,
    ExportConfig,
    OwnProtocolOptions,
    PredictConfig,
)
from resnest_imagenet.errors import ConfigError, suggest
from resnest_imagenet.options import Options, as_path
from resnest_imagenet.recipe import (
    BoxProtocolOptions,
    ClassificationRecipe,
    DetectionRecipe,
    Protocol,
    Recipe,
    RegionProtocolOptions,
    SegmentationRecipe,
)

Schema = TypeVar("Schema", bound=Options)

# Commands whose protocol depends on the task of the weights.
_OF_ANY_TASK: tuple[type[Options], ...] = (EvalConfig, PredictConfig, CompareConfig, ExportConfig, AppConfig)
# The kinds of protocols by an option that only this kind has: the schema, and the names of some protocols.
_PROTOCOLS: dict[str, tuple[type[Protocol], tuple[str, ...]]] = {
    "order": (OwnProtocolOptions, ("paper", "ecentercrop", "full")),
    "name": (RegionProtocolOptions, ("whole", "slide", "centre", "published")),
    "short_side": (BoxProtocolOptions, ("coco",)),
}
# By task; other packages may add tasks.
RECIPES: dict[str, type[Recipe]] = {
    "classification": ClassificationRecipe,
    "segmentation": SegmentationRecipe,
    "detection": DetectionRecipe,
}
extensions.tasks.reserve(RECIPES)
# Published recipes by task, for the error about a recipe of another task.
RECIPE_NAMES = {
    "classification": ("resnest", "bag_of_tricks", "torchvision_v1", "sknet"),
    "segmentation": ("deeplab_gluon", "deeplab_encoding"),
    "detection": ("detectron2_boxes", "detectron2_masks"),
}


def find_outside_task(name: str) -> extensions.Task | None:
    """Return the task of another package, or None for one of `RECIPES`.

    Raises:
        ConfigError: there is no such task.
    """
    outside = extensions.tasks.find(name)
    if outside is None and name not in RECIPES:
        valid = [*RECIPES, *extensions.tasks.read()]
        raise ConfigError(f"unknown train.task {name!r}{suggest(name, valid)} ({', '.join(valid)})")
    return outside


def list_schemas(schema: type[Schema]) -> list[type[Schema]]:
    """Return the variant of a schema for each task; the schema itself if it does not depend on the task."""
    if schema in _OF_ANY_TASK:
        return [_specialise(schema, protocol=protocol) for protocol, _ in _PROTOCOLS.values()]
    if not issubclass(schema, TrainConfig) or schema.model_fields["train"].annotation is not Recipe:
        return [schema]
    outside = [task.recipe for task in extensions.tasks.read().values()]
    return [_of_recipe(schema, recipe) for recipe in (*RECIPES.values(), *outside)]


def choose_schema(schema: type[Schema], values: Mapping[Any, Any]) -> type[Schema]:
    """Return a schema with the options of the task that `values` choose.

    Each task has its own schema instead of a union of recipes in one: so an error names the option as it is typed.

    Args:
        schema: of a command.
        values: to be checked against it; `train.task`, or the kind of protocol, decides.

    Raises:
        ConfigError: there is no such task, or the protocol or the recipe belongs to another task.
    """
    protocol = values.get("protocol")
    kind = find_kind(protocol if isinstance(protocol, Mapping) else {})
    if schema in _OF_ANY_TASK:
        return _specialise(schema, protocol=_PROTOCOLS[kind][0])
    options = values.get("train")
    task = options.get("task") if isinstance(options, Mapping) else None
    if not issubclass(schema, TrainConfig) or not isinstance(task, str):
        return schema
    outside = find_outside_task(task)
    recipe: type[Recipe] = RECIPES[task] if outside is None else outside.recipe
    own = find_kind(recipe.PROTOCOL.model_fields)
    if protocol is not None and kind != own:
        names = ", ".join(_PROTOCOLS[own][1])
        raise ConfigError(f"protocol is not of train.task={task}: choose {names}, or start from +experiment=")
    assert isinstance(options, Mapping)
    _require_own_recipe(task, recipe, options)
    return _of_recipe(schema, recipe)


def _require_own_recipe(task: str, recipe: type[Recipe], options: Mapping[Any, Any]) -> None:
    """Raise a ConfigError for another task's recipe: it has options of that task, and some of this task are missing."""
    of_others = {name for other in RECIPES.values() for name in other.model_fields} - recipe.model_fields.keys()
    if options.keys() & of_others and recipe.model_fields.keys() - options.keys():
        names = ", ".join(RECIPE_NAMES.get(task, ()))
        choice = f"choose {names}, or start from +experiment=" if names else "choose one that is"
        raise ConfigError(f"recipe={options.get('recipe')} is not of train.task={task}: {choice}")


def find_kind(options: Collection[str]) -> str:
    """Return the option that distinguishes this kind of protocol from the others; by default classification's."""
    return next((option for option in _PROTOCOLS if option in options), "order")


def _of_recipe(schema: type[Schema], recipe: type[Recipe]) -> type[Schema]:
    return _specialise(schema, train=recipe, eval=recipe.EVAL_OPTIONS, protocol=recipe.PROTOCOL)


@cache
def _specialise(schema: type[Schema], **options: type[Options]) -> type[Schema]:
    """Return a schema in which these options have these types."""
    parts: dict[str, Any] = {name: (part, ...) for name, part in options.items()}
    return create_model(schema.__name__, __base__=schema, __doc__=schema.__doc__, **parts)


def find_part(field: FieldInfo) -> type[Options] | None:
    """Return the schema of a section; None for an option."""
    for part in (field.annotation, *get_args(field.annotation)):
        # To Python 3.10 list[int] is an instance of type.
        if get_origin(part) is None and isinstance(part, type) and issubclass(part, Options):
            return part
    return None


def walk_options(schema: type[Options], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Yield every section and option of a schema, dotted, for each task; a name may occur more than once."""
    for variant in list_schemas(schema):
        for name, field in variant.model_fields.items():
            yield prefix + name, field
            if part := find_part(field):
                yield from walk_options(part, f"{prefix}{name}.")


def option_names(schema: type[Options]) -> list[str]:
    """Return every option of a schema and its sections, dotted, for all tasks."""
    return list(dict.fromkeys(name for name, _ in walk_options(schema)))


def list_places(schema: type[Options]) -> dict[str, bool]:
    """Return the options that are files or folders, dotted, and whether each takes a list."""
    return {
        name: "list[" in repr(field.annotation)
        for name, field in walk_options(schema)
        if as_path.__name__ in repr((field.annotation, field.metadata))
    }
