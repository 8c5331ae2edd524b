"""The typed schema of a run: its options and the values that they allow; conf/ has the values themselves.

Hydra composes a configuration. These classes check it and freeze it; config_reading.py and config_data.py have those of
the other commands.
"""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from resnest_imagenet.options import IS_PATH, Device, Options, Place, Positive, Seed, as_list
from resnest_imagenet.recipe import EvalOptions, Protocol, Recipe


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
