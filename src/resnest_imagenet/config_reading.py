"""The typed schemas of the commands that read trained networks, pictures and results."""

import re
from pathlib import PurePath
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BeforeValidator, Field, WrapValidator, model_validator

from resnest_imagenet.config import DataOptions, LoaderOptions, NetworkOptions
from resnest_imagenet.options import (
    Crop,
    Device,
    Fraction,
    Layer,
    Options,
    Place,
    Positive,
    Precision,
    Tta,
    as_list,
    keep_own,
)
from resnest_imagenet.recipe import BoxProtocolOptions, Protocol, RegionProtocolOptions

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
