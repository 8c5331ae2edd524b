"""The typed schema of every command: what is allowed. The values stand in conf/, none here.

A configuration is composed by Hydra, then checked against these classes; what passes is frozen.
"""

from collections.abc import Mapping
from functools import cache
from pathlib import PurePath
from typing import Annotated, Any, Literal, TypeAlias, TypeVar

from pydantic import BeforeValidator, Field, WrapValidator, create_model, model_validator

from resnest_imagenet import extensions
from resnest_imagenet.errors import ConfigError, suggest
from resnest_imagenet.options import (
    IS_PATH,
    Crop,
    Device,
    Fraction,
    Options,
    Place,
    Positive,
    Precision,
    Seed,
    as_list,
    as_path,
    keep_own,
)
from resnest_imagenet.recipe import (
    BoxProtocolOptions,
    ClassificationRecipe,
    DetectionRecipe,
    EvalOptions,
    Protocol,
    Recipe,
    RegionProtocolOptions,
    SegmentationRecipe,
)

Schema = TypeVar("Schema", bound=Options)


class NetworkOptions(Options):
    """Which network; conf/model/ has one file for each."""

    name: str


class ModelOptions(NetworkOptions):
    """The network to train."""

    num_classes: Positive | None  # null: as many as there are class folders
    # auto: fused, and the formula in torch's operators (reference) where torch.compile fuses that itself.
    split_attention: Literal["auto", "fused", "reference"]


# Layouts of files: of the project's own kinds of data all but webdataset.
_KINDS_OF_FILES = {"folder", "ade20k", "cityscapes", "masks", "coco"}
# The kinds that other tasks have, and what to choose instead.
_KINDS_OF_OTHERS = {
    "classification": (_KINDS_OF_FILES - {"folder"}, "data=imagenet or data=webdataset"),
    "segmentation": ({"folder", "webdataset", "coco"}, "data=ade20k, data=cityscapes or data=masks"),
}


class DataOptions(Options):
    """Where the images are: in <root>/<train_dir> and <root>/<val_dir>."""

    kind: str  # folder, webdataset, or a registered one
    root: Place
    train_dir: Place
    val_dir: Place
    train_json: Place | None  # of kind=coco; null: annotations/instances_<train_dir>.json
    val_json: Place | None
    on_error: Literal["raise", "substitute"]  # training images that cannot be decoded
    max_errors: Annotated[int, Field(ge=0)]  # on_error=substitute: how many of them, per rank
    # Of kind=webdataset: training images are shuffled within so many shards at a time; null: over the whole set.
    shuffle_shards: Positive | None
    # By what a run that resumes tells that its images are still the same, besides their names and labels.
    digest: Literal["names", "sizes", "content"]

    @model_validator(mode="after")
    def _check(self) -> "DataOptions":
        if self.shuffle_shards is not None and self.kind in _KINDS_OF_FILES:
            raise ValueError(f"data.shuffle_shards={self.shuffle_shards} needs data=webdataset")
        return self


class LoaderOptions(Options):
    """What decodes them."""

    name: Literal["auto", "dali", "torchvision"]
    workers: Annotated[int, Field(ge=0)] | None  # per rank; null: this process's cores, at most 8


_Own = WrapValidator(keep_own)


class OwnProtocolOptions(Protocol):
    """The same for a network that is there: "own" stands for what its own evaluation has."""

    order: Literal["own", "resize_crop", "crop_resize"]
    ratio: Annotated[Annotated[float, Field(gt=0, le=1)] | None, _Own]
    interpolation: Literal["own", "auto", "bilinear", "bicubic"]
    antialias: Annotated[bool, _Own]

    def list_changes(self) -> dict[str, Any]:
        """Return what is not the network's own, as `EvalTransform` takes it."""
        return {option: value for option, value in self if value != "own"}


AnyProtocolOptions: TypeAlias = OwnProtocolOptions | RegionProtocolOptions | BoxProtocolOptions


class CheckpointOptions(Options):
    """When to save, and what to do with what is there; a signal and the end of an epoch save too."""

    every_steps: Positive
    keep: Annotated[int, Field(ge=2)]  # the newest may be damaged
    on_mismatch: Literal["refuse", "set_aside", "extend"]  # run_dir holds another run, or this one shorter


class LogOptions(Options):
    """How often to report, and where besides the run folder's own files."""

    every_steps: Positive
    trackers: Annotated[list[Literal["tensorboard", "wandb", "mlflow"]], BeforeValidator(as_list)]


class TrainConfig(Options):
    """resnest-train."""

    run_dir: Annotated[str, Field(min_length=1), IS_PATH]
    seed: Seed
    device: Device
    model: ModelOptions
    data: DataOptions
    loader: LoaderOptions
    train: Recipe  # of the task: see `choose_schema`
    eval: EvalOptions  # the same
    protocol: Protocol  # the same
    checkpoint: CheckpointOptions
    log: LogOptions
    timeout_seconds: Annotated[float, Field(gt=0)]
    dry_run: bool

    @model_validator(mode="after")
    def _check(self) -> "TrainConfig":
        others, own = _KINDS_OF_OTHERS.get(self.train.task, ((), ""))
        if self.data.kind in others:
            raise ValueError(f"data.kind={self.data.kind} is not of train.task={self.train.task}: choose {own}")
        for option in ("train_json", "val_json"):
            if getattr(self.data, option) is not None and self.data.kind in _KINDS_OF_FILES - {"coco"}:
                raise ValueError(f"data.{option}={getattr(self.data, option)} needs data=coco")
        return self


class PreviewDataConfig(TrainConfig):
    """resnest-data preview."""

    out: Place
    images: Positive
    epochs: Positive


class EvalConfig(Options):
    """resnest-eval."""

    ckpt: Place
    weights: Literal["auto", "model", "ema"]
    # null: the checkpoint's own
    crop: Annotated[list[Crop], Field(min_length=1), BeforeValidator(as_list)] | None
    batch_size: Positive
    precision: Precision
    compile: bool
    device: Device
    out: Place | None
    predictions: Place | None
    protocol: AnyProtocolOptions  # of the weights' task: see `choose_schema`
    model: NetworkOptions | None
    data: DataOptions
    loader: LoaderOptions

    @model_validator(mode="after")
    def _check(self) -> "EvalConfig":
        if self.data.on_error == "substitute":
            raise ValueError("data.on_error=substitute is for training: it would falsify an evaluation's counts")
        if self.crop is not None and len(set(self.crop)) < len(self.crop):
            raise ValueError(f"crop={self.crop} has the same crop twice")
        return self


class InferenceConfig(Options):
    """What resnest-predict, resnest-explain and resnest-compare share."""

    weights: Literal["auto", "model", "ema"]
    crop: Crop | None  # null: the checkpoint's own
    batch_size: Positive
    precision: Precision
    device: Device
    loader: LoaderOptions


class PredictConfig(InferenceConfig):
    """resnest-predict."""

    protocol: AnyProtocolOptions  # of the weights' task: see `choose_schema`
    ckpt: Place
    model: NetworkOptions | None
    images: Annotated[list[Place], Field(min_length=1), BeforeValidator(as_list)]  # files, folders, patterns
    top: Positive
    score: Fraction | None  # of detection; null: 0.5
    out: Place | None


class ExplainConfig(InferenceConfig):
    """resnest-explain."""

    protocol: OwnProtocolOptions
    ckpt: Place
    model: NetworkOptions | None
    images: Annotated[list[Place], Field(min_length=1), BeforeValidator(as_list)]  # files, folders, patterns
    out: Place
    top: Positive
    target: str | int | None
    layer: Literal["layer1", "layer2", "layer3", "layer4"]

    @model_validator(mode="after")
    def _check(self) -> "ExplainConfig":
        if self.target is not None and self.top != 1:
            raise ValueError(f"give either target={self.target} or top={self.top}")
        return self


class ComparedDataOptions(Options):
    """A data set, of which the val part is compared on."""

    root: Place | None
    val_dir: Place
    val_json: Place | None  # of detection; null: annotations/instances_<val_dir>.json


class CompareConfig(InferenceConfig):
    """resnest-compare."""

    protocol: AnyProtocolOptions  # of the weights' task: see `choose_schema`
    ckpt: Annotated[list[Place], Field(min_length=2)]
    models: list[str | None] | None  # for bare weights: the networks' names, in the order of ckpt
    score: Fraction | None  # of detection: objects have a higher one; null: 0.5
    images: Place | None  # a folder, for classification with one folder per true class, in place of data.root
    data: ComparedDataOptions
    csv: Place | None
    page: Place | None

    @model_validator(mode="after")
    def _check(self) -> "CompareConfig":
        if (self.images is None) == (self.data.root is None):
            raise ValueError(
                "give either data.root=... or images=..., a folder with one folder per true class (other tasks: any)"
            )
        if self.models is not None and len(self.models) != len(self.ckpt):
            raise ValueError(f"models has {len(self.models)} names, ckpt {len(self.ckpt)}")
        return self


class ReportConfig(Options):
    """resnest-report."""

    runs: Annotated[list[Place], Field(min_length=1), BeforeValidator(as_list)]  # run folders, or patterns
    out: Place
    crop: Literal[224, 320]
    latency: bool
    device: Device


class ExportConfig(Options):
    """resnest-export."""

    ckpt: Place
    weights: Literal["auto", "model", "ema"]
    model: NetworkOptions | None
    layout: Literal["official", "timm", "mmpretrain", "mmsegmentation", "mmdetection", "detectron2"]
    format: Literal["pth", "safetensors", "onnx", "torch_export", "hub"]
    sizes: Literal["any", "crop"] | None  # of a graph's images; null: any in ONNX, the crop's in torch.export's program
    crop: Crop | None  # with the protocol: what the others tell their readers, and are tried at; null: its own
    protocol: AnyProtocolOptions  # see `choose_schema`; of segmentation the run's
    out: Place | None

    @model_validator(mode="after")
    def _check(self) -> "ExportConfig":
        if self.layout not in ("official", "timm") and self.format not in ("pth", "safetensors"):
            raise ValueError(f"layout={self.layout} is for format=pth or safetensors, not {self.format}")
        forms = ["onnx"] if self.sizes == "any" else ["onnx", "torch_export"]
        if self.sizes and self.format not in forms:
            raise ValueError(f"sizes={self.sizes} is for format={' or '.join(forms)}, not {self.format}")
        return self


class InfoConfig(Options):
    """resnest-info."""

    model: NetworkOptions | None
    models: Annotated[list[str], Field(min_length=1), BeforeValidator(as_list)] | None  # several, in place of model
    crop: Crop
    batch_size: Positive
    precision: Precision
    device: Device
    latency: bool
    rounds: Positive
    format: Literal["text", "json"]

    @model_validator(mode="after")
    def _check(self) -> "InfoConfig":
        if (self.model is None) == (self.models is None):
            raise ValueError("give either model=NAME or models=[A,B]")
        return self


class Table3Config(Options):
    """resnest-table3."""

    results: Annotated[list[Place], BeforeValidator(as_list)]
    format: Literal["markdown", "json", "csv"]


class TablesConfig(Table3Config):
    """resnest-tables."""

    table: Annotated[list[Literal[3, 5, 6, 7]], Field(min_length=1), BeforeValidator(as_list)]

    @model_validator(mode="after")
    def _check(self) -> "TablesConfig":
        if self.format == "csv" and len(set(self.table)) > 1:
            raise ValueError("format=csv is for one table, since their columns differ: give table=3, 5, 6 or 7")
        return self


class DemoDataConfig(Options):
    """resnest-data demo."""

    out: Place
    seed: Seed
    train_per_class: Positive
    val_per_class: Positive


class DemoScenesConfig(Options):
    """resnest-data demo task=segmentation."""

    out: Place
    seed: Seed
    train_scenes: Positive
    val_scenes: Positive


class DemoObjectsConfig(Options):
    """resnest-data demo task=detection."""

    out: Place
    seed: Seed
    train_images: Positive
    val_images: Positive


class PrepareDataConfig(Options):
    """resnest-data prepare."""

    archives: Place
    out: Place
    verify: bool


class FolderOptions(Options):
    """A data set in the ImageNet folder layout."""

    root: Place
    train_dir: Place | None  # null: leave this part out
    val_dir: Place | None

    @model_validator(mode="after")
    def _check(self) -> "FolderOptions":
        if self.train_dir is None and self.val_dir is None:
            raise ValueError("data.train_dir=null and data.val_dir=null leave nothing")
        if not self._may_share_folder() and PurePath(self.train_dir or "").name == PurePath(self.val_dir or "").name:
            raise ValueError(f"data.train_dir={self.train_dir} and data.val_dir={self.val_dir} have the same name")
        return self

    def _may_share_folder(self) -> bool:
        return False


class CheckedDataOptions(FolderOptions):
    """A data set in any layout of files."""

    kind: Literal["folder", "ade20k", "cityscapes", "masks", "coco"]
    # Of kind=coco; null: annotations/instances_<train_dir or val_dir>.json.
    train_json: Place | None
    val_json: Place | None

    def _may_share_folder(self) -> bool:
        return self.kind == "coco" and self.train_json != self.val_json


class CheckDataConfig(Options):
    """resnest-data check."""

    data: CheckedDataOptions
    out: Place | None
    workers: Positive | None


class ShardDataConfig(Options):
    """resnest-data shard."""

    data: FolderOptions
    out: Place
    images_per_shard: Positive
    shuffle: bool


# Commands whose protocol is of the weights' task.
_OF_ANY_TASK: tuple[type[Options], ...] = (EvalConfig, PredictConfig, CompareConfig, ExportConfig)
# The kinds of protocols, by an option that no other kind has, with the names of some.
_PROTOCOLS: dict[str, tuple[type[Protocol], tuple[str, ...]]] = {
    "order": (OwnProtocolOptions, ("paper", "ecentercrop", "full")),
    "name": (RegionProtocolOptions, ("whole", "slide", "centre", "published")),
    "short_side": (BoxProtocolOptions, ("coco",)),
}
# By task; other packages may add some.
RECIPES: dict[str, type[Recipe]] = {
    "classification": ClassificationRecipe,
    "segmentation": SegmentationRecipe,
    "detection": DetectionRecipe,
}
extensions.tasks.reserve(RECIPES)
# The published recipes of tasks that have few, to be named where one of another task is chosen.
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
    """Return a schema as it is for each task; where it is of one already, or of none, itself."""
    if schema in _OF_ANY_TASK:
        return [_specialise(schema, protocol=protocol) for protocol, _ in _PROTOCOLS.values()]
    if not issubclass(schema, TrainConfig) or schema.model_fields["train"].annotation is not Recipe:
        return [schema]
    outside = [task.recipe for task in extensions.tasks.read().values()]
    return [_of_recipe(schema, recipe) for recipe in (*RECIPES.values(), *outside)]


def choose_schema(schema: type[Schema], values: Mapping[Any, Any]) -> type[Schema]:
    """Return a schema with the options of the task that is chosen in `values`.

    A schema for each task, and not a union of recipes in one: so an error names the option as it is typed.

    Args:
        schema: of a command.
        values: what is to be checked against it; `train.task` is read, or which protocol it is.

    Raises:
        ConfigError: there is no such task, or the protocol or the recipe is another's.
    """
    protocol = values.get("protocol")
    kind = _find_kind(protocol if isinstance(protocol, Mapping) else {})
    if schema in _OF_ANY_TASK:
        return _specialise(schema, protocol=_PROTOCOLS[kind][0])
    options = values.get("train")
    task = options.get("task") if isinstance(options, Mapping) else None
    if not issubclass(schema, TrainConfig) or not isinstance(task, str):
        return schema
    outside = find_outside_task(task)
    recipe: type[Recipe] = RECIPES[task] if outside is None else outside.recipe
    own = _find_kind(recipe.PROTOCOL.model_fields)
    if protocol is not None and kind != own:
        names = ", ".join(_PROTOCOLS[own][1])
        raise ConfigError(f"protocol is not of train.task={task}: choose {names}, or start from +experiment=")
    assert isinstance(options, Mapping)
    _require_own_recipe(task, recipe, options)
    return _of_recipe(schema, recipe)


def _require_own_recipe(task: str, recipe: type[Recipe], options: Mapping[Any, Any]) -> None:
    """Raise a ConfigError for the values of another task's recipe: some that this one has not, and some missing."""
    of_others = {name for other in RECIPES.values() for name in other.model_fields} - recipe.model_fields.keys()
    if options.keys() & of_others and recipe.model_fields.keys() - options.keys():
        names = ", ".join(RECIPE_NAMES.get(task, ()))
        choice = f"choose {names}, or start from +experiment=" if names else "choose one that is"
        raise ConfigError(f"recipe={options.get('recipe')} is not of train.task={task}: {choice}")


def _find_kind(options: Mapping[str, Any]) -> str:
    """Return which of `_PROTOCOLS` has such options."""
    return next((option for option in _PROTOCOLS if option in options), "order")


def _of_recipe(schema: type[Schema], recipe: type[Recipe]) -> type[Schema]:
    return _specialise(schema, train=recipe, eval=recipe.EVAL_OPTIONS, protocol=recipe.PROTOCOL)


@cache
def _specialise(schema: type[Schema], **options: type[Options]) -> type[Schema]:
    """Return a schema whose options of these names have these types."""
    parts: dict[str, Any] = {name: (part, ...) for name, part in options.items()}
    return create_model(schema.__name__, __base__=schema, __doc__=schema.__doc__, **parts)


def flatten(options: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return options by their dotted names, as on a command line."""
    flat: dict[str, Any] = {}
    for name, value in options.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def option_names(schema: type[Options], prefix: str = "") -> list[str]:
    """Return every option of a schema and its parts, dotted; of every task."""
    names: dict[str, None] = {}
    for variant in list_schemas(schema):
        for name, field in variant.model_fields.items():
            names[prefix + name] = None
            for part in (field.annotation, *getattr(field.annotation, "__args__", ())):
                if isinstance(part, type) and issubclass(part, Options):
                    names |= dict.fromkeys(option_names(part, f"{prefix}{name}."))
    return list(names)


def list_places(schema: type[Options], prefix: str = "") -> dict[str, bool]:
    """Return the options that are files or folders, as `option_names`, and whether each takes a list of them."""
    places = {}
    for variant in list_schemas(schema):
        for name, field in variant.model_fields.items():
            if as_path.__name__ in repr((field.annotation, field.metadata)):
                places[prefix + name] = "list[" in repr(field.annotation)
            elif isinstance(field.annotation, type) and issubclass(field.annotation, Options):
                places |= list_places(field.annotation, f"{prefix}{name}.")
    return places
