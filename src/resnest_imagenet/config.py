"""The typed schema of every command: its options and the values that they allow; conf/ has the values themselves.

Hydra composes a configuration. These classes check it and freeze it.
"""

import re
from pathlib import PurePath
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BeforeValidator, Field, WrapValidator, model_validator

from resnest_imagenet.options import (
    IS_PATH,
    Crop,
    Device,
    Fraction,
    Layer,
    Options,
    Place,
    Positive,
    Precision,
    Seed,
    Tta,
    as_list,
    keep_own,
)
from resnest_imagenet.recipe import (
    BoxProtocolOptions,
    EvalOptions,
    Protocol,
    Recipe,
    RegionProtocolOptions,
)


class NetworkOptions(Options):
    """Which network."""

    name: str = Field(description="Name of the network; the group model sets it.")


class ModelOptions(NetworkOptions):
    """The network to train."""

    num_classes: Positive | None = Field(
        description="Outputs of the network; null: the number of classes of the data set."
    )
    split_attention: Literal["auto", "fused", "reference"] = Field(
        description="fused: one operator; reference: the formula; auto: fused unless a trial refuses it, with "
        "compile=true reference."
    )


# The kinds of data of each task.
KINDS = {
    "classification": {"folder", "webdataset", "csv"},
    "segmentation": {"ade20k", "cityscapes", "masks"},
    "detection": {"coco"},
}
# Layouts of files: all but shards.
_KINDS_OF_FILES = set().union(*KINDS.values()) - {"webdataset"}
# The choices for data of another task; a detector's are refused when its data is opened.
_CHOICES_OF_DATA = {
    "classification": "data=imagenet, data=csv or data=webdataset",
    "segmentation": "data=ade20k, data=cityscapes or data=masks",
}


def check_split(kind: str, csv: str | None, val_split: float | None, seed: int) -> None:
    """Raise a ValueError for a list or a split with a layout that does not support it."""
    if csv is not None and kind != "csv":
        raise ValueError(f"data.csv={csv} needs data=csv")
    if val_split is not None and kind not in ("folder", "csv"):
        raise ValueError(f"data.val_split={val_split} needs data=imagenet or data=csv")
    if seed and val_split is None:
        raise ValueError(f"data.split_seed={seed} needs data.val_split=..., 0.2 for example")


class DataOptions(Options):
    """Where the images are."""

    kind: str = Field(description="Layout of the data set; the group data sets it.")
    root: Place = Field(description="Folder of the data set.")
    train_dir: Place = Field(description="Folder of the training set, in root or elsewhere.")
    val_dir: Place = Field(description="Folder of the validation set, in root or elsewhere.")
    train_json: Place | None = Field(
        description="data=coco: training annotations; null: annotations/instances_<train_dir>.json."
    )
    val_json: Place | None = Field(
        description="data=coco: validation annotations; null: annotations/instances_<val_dir>.json."
    )
    csv: Place | None = Field(
        description="data=csv: the file with path,label and part, in root or elsewhere; null: labels.csv."
    )
    val_split: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        description="Share of each class that is kept for validation, if class folders have no val folder or rows of a "
        "list no part; null: the data have both parts."
    )
    split_seed: Seed = Field(description="val_split: seed of the choice, apart from the run's seed.")
    on_error: Literal["raise", "substitute"] = Field(
        description="A training image that cannot be decoded: end the run, or take the next image."
    )
    max_errors: Annotated[int, Field(ge=0)] = Field(
        description="on_error=substitute: largest number of such images on a rank; more end the run."
    )
    shuffle_shards: Positive | None = Field(
        description="data=webdataset: shuffle training images within so many shards, which are read together; null: "
        "over the whole set, and one shard is read after another."
    )
    digest: Literal["names", "sizes", "content"] = Field(
        description="What of the images must be the same when a run resumes, besides classes: their names; their sizes "
        "too; or their content too, and then every file is read at each start."
    )

    @model_validator(mode="after")
    def _check(self) -> "DataOptions":
        if self.shuffle_shards is not None and self.kind in _KINDS_OF_FILES:
            raise ValueError(f"data.shuffle_shards={self.shuffle_shards} needs data=webdataset")
        check_split(self.kind, self.csv, self.val_split, self.split_seed)
        return self


class LoaderOptions(Options):
    """The loader, which decodes the images."""

    name: Literal["auto", "dali", "torchvision"] = Field(
        description="Library that decodes images; auto: DALI if it is installed, but torchvision for training images "
        "on a CPU if the recipe has a policy; a run keeps its loader when it resumes."
    )
    workers: Annotated[int, Field(ge=0)] | None = Field(
        description="Threads (DALI) or processes (torchvision) per rank; null: as many as cores, at most 8."
    )


_Own = WrapValidator(keep_own)


class OwnProtocolOptions(Protocol):
    """How images are resized and cropped; own: as in the evaluation of the network's run."""

    order: Literal["own", "resize_crop", "crop_resize"] = Field(
        description="Resize the short side, then crop; or crop a square, then resize it."
    )
    ratio: Annotated[Annotated[float, Field(gt=0, le=1)] | None, _Own] = Field(
        description="Crop over the resized short side; null: crop / (crop + 32)."
    )
    interpolation: Literal["own", "auto", "bilinear", "bicubic"] = Field(
        description="How pixels are resized; auto: bicubic above 256 pixels, else bilinear."
    )
    antialias: Annotated[bool, _Own] = Field(description="Average pixels where an image is made smaller.")

    def list_changes(self) -> dict[str, Any]:
        """Return the options that differ from the network's own, as `EvalTransform` takes them."""
        return {option: value for option, value in self if value != "own"}


AnyProtocolOptions: TypeAlias = OwnProtocolOptions | RegionProtocolOptions | BoxProtocolOptions


class CheckpointOptions(Options):
    """When to save, and what to do if run_dir holds another run."""

    every_steps: Positive = Field(
        description="Steps from one checkpoint to the next; the end of an epoch and a signal save too."
    )
    keep: Annotated[int, Field(ge=2)] = Field(  # the newest may be damaged
        description="Newest checkpoints to keep, besides best.pt."
    )
    on_mismatch: Literal["refuse", "set_aside", "extend"] = Field(
        description="run_dir holds another run: refuse it; set it aside in a folder there and train from scratch; or "
        "extend it to more epochs (steps), with the schedule of the new length."
    )


class LogOptions(Options):
    """How often to log, and where besides the run folder."""

    every_steps: Positive = Field(description="Steps from one line of the log to the next.")
    trackers: Annotated[list[Literal["tensorboard", "wandb", "mlflow"]], BeforeValidator(as_list)] = Field(
        description="Where to log besides the run folder; wandb and mlflow read their own environment variables."
    )
    pictures: bool = Field(
        description="Draw the finished run: results.png, its curves, and val.png, validation images with predictions."
    )


class TrainConfig(Options):
    """resnest-train."""

    run_dir: Annotated[str, Field(min_length=1), IS_PATH] = Field(
        description="Folder of the run; the same command resumes the run in it."
    )
    seed: Seed = Field(description="Seed of all random numbers.")
    device: Device
    model: ModelOptions
    data: DataOptions
    loader: LoaderOptions
    train: Recipe  # of the task: see `choose_schema`
    eval: EvalOptions  # the same
    protocol: Protocol  # the same
    checkpoint: CheckpointOptions
    log: LogOptions
    timeout_seconds: Annotated[float, Field(gt=0)] = Field(
        description="Seconds that a rank may keep the others waiting before the run ends."
    )
    dry_run: bool = Field(description="Check everything, read one batch, print the plan, and train nothing.")

    @model_validator(mode="after")
    def _check(self) -> "TrainConfig":
        own = _CHOICES_OF_DATA.get(self.train.task)
        if own and any(self.data.kind in kinds for task, kinds in KINDS.items() if task != self.train.task):
            raise ValueError(f"data.kind={self.data.kind} is not of train.task={self.train.task}: choose {own}")
        for option in ("train_json", "val_json"):
            if getattr(self.data, option) is not None and self.data.kind in _KINDS_OF_FILES - {"coco"}:
                raise ValueError(f"data.{option}={getattr(self.data, option)} needs data=coco")
        self._check_start()
        return self

    def _check_start(self) -> None:
        self.train.check_start()


class PreviewDataConfig(TrainConfig):
    """resnest-data preview."""

    def _check_start(self) -> None:
        """Take any start: no network is built."""

    out: Place = Field(description="A PNG file.")
    images: Positive = Field(description="Rows: training images, evenly spaced over the set.")
    epochs: Positive = Field(description="Columns after the original: the first epochs.")


# Options of several commands.
_Checkpoint = Annotated[Place, Field(description="A checkpoint, a file of weights, official:NAME or timm:NAME.")]
_Weights = Annotated[
    Literal["auto", "model", "ema"],
    Field(description="Which weights of a checkpoint; auto: the moving average if there is one."),
]
_Images = Annotated[
    list[Place],
    Field(min_length=1, description="Files, folders, patterns (quoted for the shell) or web addresses."),
    BeforeValidator(as_list),
]


_Layer = Annotated[
    Literal["layer1", "layer2", "layer3", "layer4"] | None,
    Field(
        description="Layer of the map. Earlier layers give finer maps with rougher evidence; the places of layer4 add "
        "up to the logit. null: the deepest layer with 7 x 7 places."
    ),
]


class EvalConfig(Options):
    """resnest-eval."""

    ckpt: _Checkpoint
    weights: _Weights
    crop: Annotated[list[Crop], Field(min_length=1), BeforeValidator(as_list)] | None = Field(
        description="Side of the crop in pixels, or a list of them; null: the checkpoint's own."
    )
    batch_size: Positive = Field(description="Images per rank and forward pass.")
    precision: Precision
    tta: Tta
    compile: bool = Field(description="Compile the network: a minute at first, then some percent faster.")
    device: Device
    out: Place | None = Field(description="A JSON file for the results.")
    predictions: Place | None = Field(description="A CSV file for the prediction of each image.")
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
    """The options that resnest-predict, resnest-explain and resnest-compare share."""

    weights: _Weights
    crop: Crop | None = Field(description="Side of the crop in pixels; null: the checkpoint's own.")
    batch_size: Positive = Field(
        description="Images per forward pass, of a classifier; other networks see one at a time."
    )
    precision: Precision
    device: Device
    loader: LoaderOptions


class PredictConfig(InferenceConfig):
    """resnest-predict."""

    protocol: AnyProtocolOptions  # of the weights' task: see `choose_schema`
    ckpt: _Checkpoint
    model: NetworkOptions | None
    images: _Images
    top: Positive = Field(description="Classes or objects to show of each image.")
    score: Fraction | None = Field(description="Detection: objects have a higher score than this; null: 0.5.")
    tta: Tta
    features: Layer | None = Field(
        description="Write a vector for each image in place of its classes: the mean of a layer's maps over their "
        "places, or head, the classifier's input; out=FILE.npz gets them."
    )
    out: Place | None = Field(
        description="A .csv or .json file besides, or the .npz file of features. Segmentation: a folder for the masks; "
        "detection: a file or a folder."
    )

    @model_validator(mode="after")
    def _check(self) -> "PredictConfig":
        is_npz = PurePath(self.out or "").suffix == ".npz"
        if self.features is not None and not is_npz:
            other = "" if self.out is None else f", not out={self.out}"
            raise ValueError(f"features={self.features} writes a .npz file: give out=NAME.npz{other}")
        if self.features is None and is_npz:
            raise ValueError(f"out={self.out} is a file of features: give features=layer4")
        if self.features is not None and self.tta is not None:
            raise ValueError(f"give either features={self.features} or tta={self.tta}")
        return self


class ExplainConfig(InferenceConfig):
    """resnest-explain."""

    protocol: OwnProtocolOptions
    ckpt: _Checkpoint
    model: NetworkOptions | None
    images: _Images
    precision: Precision = Field(description="Precision of probabilities and attention; the maps are always fp32.")
    out: Place = Field(description="A folder for the pictures and tables.")
    top: Positive = Field(description="Number of the likeliest classes that get a map.")
    target: str | int | None = Field(description="Map this class instead: its name, synset, number or words.")
    layer: _Layer

    @model_validator(mode="after")
    def _check(self) -> "ExplainConfig":
        if self.target is not None and self.top != 1:
            raise ValueError(f"give either target={self.target} or top={self.top}")
        return self


class AppConfig(Options):
    """resnest-app."""

    ckpt: _Checkpoint
    weights: _Weights
    model: NetworkOptions | None
    protocol: AnyProtocolOptions  # of the weights' task: see `choose_schema`
    top: Positive = Field(description="Classes or objects to list; each class has a map.")
    layer: _Layer
    score: Fraction | None = Field(description="Detection: objects have a higher score than this; null: 0.5.")
    crop: Crop | None = Field(description="Side of the crop in pixels; null: the checkpoint's own.")
    precision: Precision
    device: Device
    port: Annotated[int, Field(ge=0, lt=65536)] = Field(
        description="Of the page's address; 0: a free one from 7860 on."
    )


class ComparedDataOptions(Options):
    """The data set to compare on."""

    root: Place | None = Field(description="Folder of a data set, in place of images.")
    val_dir: Place = Field(description="Folder of the part to compare on, in root or elsewhere.")
    val_json: Place | None = Field(description="Detection: annotations; null: annotations/instances_<val_dir>.json.")


class CompareConfig(InferenceConfig):
    """resnest-compare."""

    protocol: AnyProtocolOptions  # of the weights' task: see `choose_schema`
    ckpt: Annotated[list[Place], Field(min_length=2)] = Field(
        description="[A,B]: two or more checkpoints, files of weights, official:NAME or timm:NAME."
    )
    models: list[str | None] | None = Field(
        description="[NAME,NAME]: names of the networks of bare weights, in the order of ckpt."
    )
    score: Fraction | None = Field(description="Detection: objects have a higher score than this; null: 0.5.")
    images: Place | None = Field(
        description="A folder with one folder per true class; for other tasks any folder, file or pattern."
    )
    data: ComparedDataOptions
    csv: Place | None = Field(description="A CSV file with a row for each image.")
    page: Place | None = Field(
        description="An HTML page with the tables and the images on which the networks disagree."
    )

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

    runs: Annotated[list[Place], Field(min_length=1), BeforeValidator(as_list)] = Field(
        description="Run folders, folders with resnest-eval's eval.json and predictions.csv, or patterns."
    )
    out: Place = Field(description="The HTML page to write.")
    crop: Literal[224, 320] = Field(description="Column of Table 3 beside which the runs are placed.")
    latency: bool = Field(description="Measure the networks of Table 3 on this machine: half a minute.")
    device: Device = Field(description="Device for latencies and worst scenes; auto: CUDA where there is one.")


class ExportConfig(Options):
    """resnest-export."""

    ckpt: _Checkpoint
    weights: _Weights
    model: NetworkOptions | None
    layout: Literal["official", "timm", "mmpretrain", "mmsegmentation", "mmdetection", "detectron2"] = Field(
        description="Names in a state dict; mmsegmentation, mmdetection and detectron2: of the backbone alone."
    )
    format: Literal["pth", "safetensors", "onnx", "openvino", "torch_export", "hub"] = Field(
        description="State dict (pth, safetensors), graph (onnx, openvino, torch_export), or a folder for timm (hub)."
    )
    int8: Place | None = Field(
        description="format=onnx or openvino: write 8-bit integers, calibrated with the images of this folder; in "
        "class folders they give the accuracy before and after."
    )
    push: str | None = Field(
        description="format=hub: send the folder to the Hugging Face hub too, as OWNER/NAME; a new one is private."
    )
    sizes: Literal["any", "crop"] | None = Field(
        description="Graphs: images of any size, or of the crop's; null: any, but the crop's in torch_export."
    )
    crop: Crop | None = Field(description="Graphs and hub: side of their images in pixels; null: the checkpoint's own.")
    protocol: AnyProtocolOptions  # see `choose_schema`; of segmentation the run's
    out: Place | None = Field(
        description="The file or folder to write; null: named after the network, the layout and the format."
    )

    @model_validator(mode="after")
    def _check(self) -> "ExportConfig":
        if self.layout not in ("official", "timm") and self.format not in ("pth", "safetensors"):
            raise ValueError(f"layout={self.layout} is for format=pth or safetensors, not {self.format}")
        forms = ["onnx", "openvino", *(["torch_export"] if self.sizes == "crop" else [])]
        if self.sizes and self.format not in forms:
            names = f"{', '.join(forms[:-1])} or {forms[-1]}"
            raise ValueError(f"sizes={self.sizes} is for format={names}, not {self.format}")
        for option, value, forms in (("int8", self.int8, ["onnx", "openvino"]), ("push", self.push, ["hub"])):
            if value is not None and self.format not in forms:
                raise ValueError(f"{option}={value} is for format={' or '.join(forms)}, not {self.format}")
        if self.push is not None and not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", self.push, re.ASCII):
            raise ValueError(f"push={self.push}: write OWNER/NAME, as the hub names a repository")
        return self


class InfoConfig(Options):
    """resnest-info."""

    model: NetworkOptions | None
    models: Annotated[list[str], Field(min_length=1), BeforeValidator(as_list)] | None = Field(
        description="Several networks, in place of model: [resnet50,resnest50]."
    )
    crop: Crop = Field(description="Side of the images in pixels.")
    batch_size: Positive = Field(
        description="Images of the training step whose memory is counted, and of the second latency."
    )
    precision: Precision
    device: Device
    latency: bool = Field(description="Measure latencies.")
    rounds: Positive = Field(description="Rounds of the measurement of latencies.")
    format: Literal["text", "json"] = Field(description="Form of the output.")

    @model_validator(mode="after")
    def _check(self) -> "InfoConfig":
        if (self.model is None) == (self.models is None):
            raise ValueError("give either model=NAME or models=[A,B]")
        return self


class Table3Config(Options):
    """resnest-table3."""

    results: Annotated[list[Place], BeforeValidator(as_list)] = Field(
        description="Run folders, files of resnest-eval's out=, or patterns."
    )
    format: Literal["auto", "text", "markdown", "json", "csv"] = Field(
        description="Form of the output; auto: text in aligned columns on a terminal, markdown elsewhere."
    )


class TablesConfig(Table3Config):
    """resnest-tables."""

    table: Annotated[list[Literal[3, 5, 6, 7]], Field(min_length=1), BeforeValidator(as_list)] = Field(
        description="Tables of the paper to print; format=csv takes one of them."
    )

    @model_validator(mode="after")
    def _check(self) -> "TablesConfig":
        if self.format == "csv" and len(set(self.table)) > 1:
            raise ValueError("format=csv is for one table, since their columns differ: give table=3, 5, 6 or 7")
        return self


class DemoDataConfig(Options):
    """resnest-data demo."""

    out: Place = Field(description="Folder for the images.")
    seed: Seed = Field(description="Seed of the images.")
    train_per_class: Positive = Field(description="Training images of each of the ten classes.")
    val_per_class: Positive = Field(description="Validation images of each class.")


class DemoScenesConfig(Options):
    """resnest-data demo task=segmentation."""

    out: Place = Field(description="Folder for the scenes and masks.")
    seed: Seed = Field(description="Seed of the scenes.")
    train_scenes: Positive = Field(description="Training scenes.")
    val_scenes: Positive = Field(description="Validation scenes.")


class DemoObjectsConfig(Options):
    """resnest-data demo task=detection."""

    out: Place = Field(description="Folder for the images and annotations.")
    seed: Seed = Field(description="Seed of the images.")
    train_images: Positive = Field(description="Training images.")
    val_images: Positive = Field(description="Validation images.")


class PrepareDataConfig(Options):
    """resnest-data prepare."""

    archives: Place = Field(description="Folder with the three archives, as they were downloaded.")
    out: Place = Field(description="Folder for the images.")
    verify: bool = Field(description="Compare the MD5 of the archives first.")


class FolderOptions(Options):
    """The data set, a folder for each class."""

    root: Place = Field(description="Folder of the data set.")
    train_dir: Place | None = Field(description="Folder of the training set; null: skip it.")
    val_dir: Place | None = Field(description="Folder of the validation set; null: skip it.")

    @model_validator(mode="after")
    def _check(self) -> "FolderOptions":
        if self.train_dir is None and self.val_dir is None:
            raise ValueError("data.train_dir=null and data.val_dir=null leave no part of the data")
        if not self._may_share_folder() and PurePath(self.train_dir or "").name == PurePath(self.val_dir or "").name:
            raise ValueError(f"data.train_dir={self.train_dir} and data.val_dir={self.val_dir} have the same name")
        return self

    def _may_share_folder(self) -> bool:
        return False


class CheckedDataOptions(FolderOptions):
    """The data set, in any layout of files."""

    kind: Literal["folder", "csv", "ade20k", "cityscapes", "masks", "coco"] = Field(
        description="Layout of the data set."
    )
    train_json: Place | None = Field(
        description="data.kind=coco: training annotations; null: annotations/instances_<train_dir>.json."
    )
    val_json: Place | None = Field(
        description="data.kind=coco: validation annotations; null: annotations/instances_<val_dir>.json."
    )
    csv: Place | None = Field(description="data.kind=csv: the file, in root or elsewhere; null: labels.csv.")
    val_split: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        description="Share of each class that a run would keep for validation; null: the data have both parts."
    )
    split_seed: Seed = Field(description="val_split: seed of the choice.")

    @model_validator(mode="after")
    def _check_split(self) -> "CheckedDataOptions":
        check_split(self.kind, self.csv, self.val_split, self.split_seed)
        if self.val_split is not None and None in (self.train_dir, self.val_dir):
            raise ValueError(f"data.val_split={self.val_split} needs data.train_dir and data.val_dir")
        return self

    def _may_share_folder(self) -> bool:
        return self.kind == "coco" and self.train_json != self.val_json


class CheckDataConfig(Options):
    """resnest-data check."""

    data: CheckedDataOptions
    out: Place | None = Field(description="A JSON file for all findings; the table has the first few of each kind.")
    workers: Positive | None = Field(description="Processes; null: as many as this process's cores.")


class ShardDataConfig(Options):
    """resnest-data shard."""

    data: FolderOptions
    out: Place = Field(description="A new or empty folder for the shards.")
    images_per_shard: Positive = Field(description="Images in each shard.")
    shuffle: bool = Field(description="Write images in a random order, so that each shard has images of many classes.")


class ClassFolderOptions(Options):
    """A folder with one folder of images per class."""

    root: Place = Field(description="A folder with one folder of images per class.")


class SplitDataConfig(Options):
    """resnest-data split."""

    data: ClassFolderOptions
    out: Place = Field(description="A new or empty folder for train and val.")
    val_share: float = Field(gt=0, lt=1, description="Share of each class that goes to val: at least one image.")
    seed: Seed = Field(description="Seed of the choice of images.")
