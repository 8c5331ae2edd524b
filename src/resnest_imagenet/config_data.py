"""The typed schemas of resnest-data."""

from pathlib import PurePath
from typing import Annotated, Literal

from pydantic import Field, model_validator

from resnest_imagenet.config import TrainConfig, check_split
from resnest_imagenet.options import Options, Place, Positive, Seed


class PreviewDataConfig(TrainConfig):
    """resnest-data preview."""

    def _check_start(self) -> None:
        """Take any start: no network is built."""

    out: Place = Field(description="A PNG file.")
    images: Positive = Field(description="Rows: training images, evenly spaced over the set.")
    epochs: Positive = Field(description="Columns after the original: the first epochs.")


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
