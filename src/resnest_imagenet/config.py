"""The typed schema of every command: what is allowed. The values stand in conf/, none here.

A configuration is composed by Hydra, then checked against these classes; what passes is frozen.
"""

import os
from collections.abc import Callable, Mapping
from pathlib import PurePath
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WrapValidator, model_validator

Positive = Annotated[int, Field(ge=1)]
# Five halvings need 32 pixels.
Crop = Annotated[int, Field(ge=32)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Device = Literal["auto", "cpu", "cuda"]
Precision = Literal["fp32", "bf16", "fp16"]
Seed = Annotated[int, Field(ge=0, lt=2**63)]


def _as_list(value: Any) -> Any:
    """Take crop=224 for crop=[224]."""
    return value if isinstance(value, list) else [value]


def _keep_own(value: Any, validate: Callable[[Any], Any]) -> Any:
    """Take "own" as it is, whatever the type is: a union would put the names of its types into an error's option."""
    return value if value == "own" else validate(value)


def _as_path(value: Any) -> Any:
    """Take run_dir=20240501, which is a number to Hydra, for text, and ~ for the home folder."""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return os.path.expanduser(value) if isinstance(value, str) else value


_IS_PATH = BeforeValidator(_as_path)
Place = Annotated[str, _IS_PATH]  # of files and folders


class Options(BaseModel):
    """Base: no unknown keys, no silent conversions, no changes."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class NetworkOptions(Options):
    """Which network; conf/model/ has one file for each."""

    name: str


class ModelOptions(NetworkOptions):
    """The network to train."""

    num_classes: Positive | None  # null: as many as there are class folders
    # auto: fused, and the formula in torch's operators (reference) where torch.compile fuses that itself.
    split_attention: Literal["auto", "fused", "reference"]


class DataOptions(Options):
    """Where the images are: in <root>/<train_dir> and <root>/<val_dir>."""

    kind: Literal["folder", "webdataset"]
    root: Place
    train_dir: Place
    val_dir: Place
    on_error: Literal["raise", "substitute"]  # training images that cannot be decoded
    max_errors: Annotated[int, Field(ge=0)]  # on_error=substitute: how many of them, per rank
    # Of kind=webdataset: training images are shuffled within so many shards at a time; null: over the whole set.
    shuffle_shards: Positive | None
    # By what a run that resumes tells that its images are still the same, besides their names and labels.
    digest: Literal["names", "sizes", "content"]

    @model_validator(mode="after")
    def _check(self) -> "DataOptions":
        if self.shuffle_shards is not None and self.kind != "webdataset":
            raise ValueError(f"data.shuffle_shards={self.shuffle_shards} needs data=webdataset")
        return self


class LoaderOptions(Options):
    """What decodes them."""

    name: Literal["auto", "dali", "torchvision"]
    workers: Annotated[int, Field(ge=0)] | None  # per rank; null: this process's cores, at most 8


class RecipeOptions(Options):
    """How to train; conf/recipe/ has the published recipes and the source of each value."""

    recipe: str  # its name: what a result says it was trained with
    epochs: Positive
    batch_size: Annotated[int, Field(ge=2)]  # images per rank and forward pass; split attention needs 2
    global_batch: Positive | None  # images per step; null: batch_size * ranks
    crop: Crop
    min_crop_area: Annotated[float, Field(gt=0, le=1)]  # smallest random crop, as a share; ERandomCrop's own is .1
    cropping: Literal["random_resized", "erandom"]
    antialias: bool  # of the crop's resize
    interpolation: Literal["bilinear", "bicubic"]  # of the same
    # Operations on the whole image, before the crop; null: none.
    policy: Literal["resnest", "resnest_torch", "autoaugment", "randaugment", "trivialaugment", "rotation"] | None
    jitter: Share  # brightness, contrast and saturation, each by up to this factor
    lighting: Annotated[float, Field(ge=0)]  # standard deviation of the weights of the principal colours
    pixel_shift: Annotated[float, Field(ge=0, le=255)]  # bound of what is added to all pixels of an image, of 255
    erasing: Share  # probability of a random rectangle of mean colour in an image
    schedule: Literal["cosine", "step"]
    step_epochs: Positive | None  # schedule=step: the learning rate is multiplied by step_factor every so many epochs
    step_factor: Annotated[float, Field(gt=0, lt=1)]
    lr_per_256: Annotated[float, Field(gt=0)]  # peak learning rate for 256 images per step, scaled linearly
    warmup_epochs: Annotated[float, Field(ge=0)]
    momentum: Fraction
    nesterov: bool
    weight_decay: Annotated[float, Field(ge=0)]
    decay_all: bool  # biases and BN weights too; otherwise convolution and fc weights only
    label_smoothing: Fraction
    mixup_alpha: Annotated[float, Field(ge=0)]  # 0: no mixup
    cutmix_alpha: Annotated[float, Field(ge=0)]  # 0: no CutMix; with mixup, half of the batches have either
    mixup_per_sample: bool  # a weight for each image, otherwise one per batch, as CutMix always has
    mixup_partner: Literal["reversed", "permuted"]  # of the image, in its batch; CutMix's too
    dropout: Fraction  # before fc
    dropblock: Fraction  # probability in the last epoch, rising linearly; 0: no DropBlock
    init: Literal["fan_in", "fan_out"]
    # Weights to start from, with a new classifier where the classes are others.
    init_from: Annotated[str, Field(min_length=1), _IS_PATH] | None
    zero_gamma: bool
    ema_decay: Fraction | None  # per step; null: no moving average
    precision: Precision
    compile: bool
    max_skipped_steps: Annotated[
        int, Field(ge=0)
    ]  # with a loss or gradient that is not finite; 0: the first ends the run

    @model_validator(mode="after")
    def _check(self) -> "RecipeOptions":
        if self.warmup_epochs >= self.epochs:
            raise ValueError(f"train.warmup_epochs={self.warmup_epochs} leaves nothing of train.epochs={self.epochs}")
        if self.nesterov and self.momentum == 0:
            raise ValueError("train.nesterov=true needs train.momentum > 0")
        if self.schedule == "step" and self.step_epochs is None:
            raise ValueError("train.schedule=step needs train.step_epochs=...")
        if self.schedule == "step" and self.warmup_epochs >= (self.step_epochs or 0):
            raise ValueError(
                f"train.warmup_epochs={self.warmup_epochs} outlasts the first train.step_epochs={self.step_epochs}"
            )
        return self


class ProtocolOptions(Options):
    """How images are brought to the crop in evaluation; conf/protocol/ has the named protocols and their sources."""

    order: Literal["resize_crop", "crop_resize"]
    ratio: Annotated[float, Field(gt=0, le=1)] | None  # crop over the short side; null: crop / (crop + 32)
    interpolation: Literal["auto", "bilinear", "bicubic"]  # auto: bicubic above 256 pixels, else bilinear
    antialias: bool


_Own = WrapValidator(_keep_own)


class OwnProtocolOptions(Options):
    """The same for a network that is there: "own" stands for what its own evaluation has."""

    order: Literal["own", "resize_crop", "crop_resize"]
    ratio: Annotated[Annotated[float, Field(gt=0, le=1)] | None, _Own]
    interpolation: Literal["own", "auto", "bilinear", "bicubic"]
    antialias: Annotated[bool, _Own]

    def list_changes(self) -> dict[str, Any]:
        """Return what is not the network's own, as `EvalTransform` takes it."""
        return {option: value for option, value in self if value != "own"}


class EvalOptions(Options):
    """The evaluation after each epoch."""

    crop: Crop


class CheckpointOptions(Options):
    """When to save, and what to do with what is there; a signal and the end of an epoch save too."""

    every_steps: Positive
    keep: Annotated[int, Field(ge=2)]  # the newest may be damaged
    on_mismatch: Literal["refuse", "set_aside", "extend"]  # run_dir holds another run, or this with fewer epochs


class LogOptions(Options):
    """How often to report, and where besides the run folder's own files."""

    every_steps: Positive
    trackers: Annotated[list[Literal["tensorboard", "wandb", "mlflow"]], BeforeValidator(_as_list)]


class TrainConfig(Options):
    """resnest-train."""

    run_dir: Annotated[str, Field(min_length=1), _IS_PATH]
    seed: Seed
    device: Device
    model: ModelOptions
    data: DataOptions
    loader: LoaderOptions
    train: RecipeOptions
    eval: EvalOptions
    protocol: ProtocolOptions
    checkpoint: CheckpointOptions
    log: LogOptions
    timeout_seconds: Annotated[float, Field(gt=0)]
    dry_run: bool


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
    crop: Annotated[list[Crop], Field(min_length=1), BeforeValidator(_as_list)] | None
    batch_size: Positive
    precision: Precision
    compile: bool
    device: Device
    out: Place | None
    predictions: Place | None
    protocol: OwnProtocolOptions
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
    """What resnest-predict and resnest-compare share."""

    weights: Literal["auto", "model", "ema"]
    crop: Crop | None  # null: the checkpoint's own
    batch_size: Positive
    precision: Precision
    device: Device
    protocol: OwnProtocolOptions
    loader: LoaderOptions


class PredictConfig(InferenceConfig):
    """resnest-predict."""

    ckpt: Place
    model: NetworkOptions | None
    images: Annotated[list[Place], Field(min_length=1), BeforeValidator(_as_list)]  # files, folders, patterns
    top: Positive
    out: Place | None


class ExplainConfig(InferenceConfig):
    """resnest-explain."""

    ckpt: Place
    model: NetworkOptions | None
    images: Annotated[list[Place], Field(min_length=1), BeforeValidator(_as_list)]  # files, folders, patterns
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
    """A data set in the ImageNet folder layout, of which the val folder is compared on."""

    root: Place | None
    val_dir: Place


class CompareConfig(InferenceConfig):
    """resnest-compare."""

    ckpt: Annotated[list[Place], Field(min_length=2)]
    models: list[str | None] | None  # for bare weights: the networks' names, in the order of ckpt
    images: Place | None  # a folder with one folder per true class, in place of data.root
    data: ComparedDataOptions
    csv: Place | None
    page: Place | None

    @model_validator(mode="after")
    def _check(self) -> "CompareConfig":
        if (self.images is None) == (self.data.root is None):
            raise ValueError("give either data.root=... or images=..., a folder with one folder per true class")
        if self.models is not None and len(self.models) != len(self.ckpt):
            raise ValueError(f"models has {len(self.models)} names, ckpt {len(self.ckpt)}")
        return self


class ReportConfig(Options):
    """resnest-report."""

    runs: Annotated[list[Place], Field(min_length=1), BeforeValidator(_as_list)]  # run folders, or patterns
    out: Place
    crop: Literal[224, 320]
    latency: bool
    device: Device


class ExportConfig(Options):
    """resnest-export."""

    ckpt: Place
    weights: Literal["auto", "model", "ema"]
    model: NetworkOptions | None
    layout: Literal["official", "timm", "mmpretrain", "detectron2"]
    format: Literal["pth", "safetensors", "onnx", "torch_export", "hub"]
    crop: Crop | None  # with the protocol: what the others tell their readers, and are tried at; null: its own
    protocol: OwnProtocolOptions
    out: Place | None

    @model_validator(mode="after")
    def _check(self) -> "ExportConfig":
        if self.layout in ("mmpretrain", "detectron2") and self.format not in ("pth", "safetensors"):
            raise ValueError(f"layout={self.layout} is for format=pth or safetensors, not {self.format}")
        return self


class InfoConfig(Options):
    """resnest-info."""

    model: NetworkOptions | None
    models: Annotated[list[str], Field(min_length=1), BeforeValidator(_as_list)] | None  # several, in place of model
    crop: Crop
    batch_size: Annotated[int, Field(ge=2)]  # split attention trains with 2 or more
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

    results: Annotated[list[Place], BeforeValidator(_as_list)]
    format: Literal["markdown", "json", "csv"]


class DemoDataConfig(Options):
    """resnest-data demo."""

    out: Place
    seed: Seed
    train_per_class: Positive
    val_per_class: Positive


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
        if PurePath(self.train_dir or "").name == PurePath(self.val_dir or "").name:
            raise ValueError(f"data.train_dir={self.train_dir} and data.val_dir={self.val_dir} have the same name")
        return self


class CheckDataConfig(Options):
    """resnest-data check."""

    data: FolderOptions
    out: Place | None
    workers: Positive | None


class ShardDataConfig(Options):
    """resnest-data shard."""

    data: FolderOptions
    out: Place
    images_per_shard: Positive
    shuffle: bool


def flatten(options: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return options by their dotted names, as on a command line."""
    flat: dict[str, Any] = {}
    for name, value in options.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def option_names(schema: type[Options], prefix: str = "") -> list[str]:
    """Return every option of a schema and its parts, dotted."""
    names = []
    for name, field in schema.model_fields.items():
        names.append(prefix + name)
        for part in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if isinstance(part, type) and issubclass(part, Options):
                names += option_names(part, f"{prefix}{name}.")
    return names


def list_places(schema: type[Options], prefix: str = "") -> dict[str, bool]:
    """Return the options of a schema that are files or folders, dotted, and whether each takes a list of them."""
    places = {}
    for name, field in schema.model_fields.items():
        if _as_path.__name__ in repr((field.annotation, field.metadata)):
            places[prefix + name] = "list[" in repr(field.annotation)
        elif isinstance(field.annotation, type) and issubclass(field.annotation, Options):
            places |= list_places(field.annotation, f"{prefix}{name}.")
    return places
