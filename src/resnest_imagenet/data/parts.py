"""The two parts of a set of classified images: in folders or shards of their own, in a list, or of a split."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from resnest_imagenet.data.csv_list import NAME, CsvList, find_csv, read_csv
from resnest_imagenet.data.folder import ImageFolder, read_image_folder
from resnest_imagenet.data.loader import open_source
from resnest_imagenet.data.source import ImageSource, require_same_classes, require_separate
from resnest_imagenet.data.validation import choose_val, find_class_folders, has_folders
from resnest_imagenet.errors import DataError


@dataclass(frozen=True)
class ClassifiedData:
    """Where the images are; the attributes are the options of `data` of the same names."""

    kind: str
    root: str
    train_dir: str = "train"
    val_dir: str = "val"
    csv: str | None = None
    val_split: float | None = None
    split_seed: int = 0

    @staticmethod
    def of(options: Mapping[str, Any]) -> "ClassifiedData":
        """Take the options of a command's `data`, or of a run's."""
        names = {field.name for field in fields(ClassifiedData)}
        return ClassifiedData(**{name: value for name, value in options.items() if name in names})

    def open_parts(self) -> tuple[ImageSource, ImageSource]:
        """List the images of training and of validation.

        Raises:
            DataError: there are none, parts overlap, or their classes differ.
        """
        train_set, val_set = self._open_both()
        places = None
        if self.kind == "csv":  # both parts have one folder
            file = find_csv(self.root, self.csv)
            places = f"part {self.train_dir} of {file}", f"part {self.val_dir} of {file}"
        require_same_classes(train_set, val_set, places)
        return train_set, val_set

    def _open_both(self) -> tuple[ImageSource, ImageSource]:
        if self.kind == "csv":
            listed = self._read_csv()
            listed.require_parts()
            if self.train_dir == self.val_dir:
                raise DataError(
                    f"data.train_dir and data.val_dir are both {self.val_dir}: name two parts of {listed.path}"
                )
            return listed.open(self.train_dir, "data.train_dir"), listed.open(self.val_dir, "data.val_dir")
        if self.val_split is not None:
            return self._split_folder(self.val_split)
        train_set = open_source(self.kind, self.root, self.train_dir, "data.train_dir")
        val_set = open_source(self.kind, self.root, self.val_dir, "data.val_dir")
        require_separate(train_set.root, val_set.root)
        return train_set, val_set

    def open_part(self, part: Literal["train", "val"]) -> ImageSource:
        """List the images of one part alone."""
        directory, name = (self.train_dir if part == "train" else self.val_dir), f"data.{part}_dir"
        if self.kind == "csv":
            return self._read_csv().open(directory, name)
        if self.val_split is not None:
            return self._split_folder(self.val_split)[part == "val"]
        return open_source(self.kind, self.root, directory, name)

    def _read_csv(self) -> CsvList:
        listed = read_csv(self.root, self.csv)
        if self.val_split is None:
            return listed
        return listed.split(self.train_dir, self.val_dir, self.val_split, self.split_seed)

    def _split_folder(self, share: float) -> tuple[ImageFolder, ImageFolder]:
        folder = find_class_folders(self.root, self.train_dir, self.val_dir)
        images = read_image_folder(str(folder), ".", "data.root")
        is_val = choose_val(images.files, images.labels, images.classes, share, self.split_seed, images.root)
        train_set, val_set = (
            replace(images, files=images.files[chosen], labels=images.labels[chosen]) for chosen in (~is_val, is_val)
        )
        return train_set, val_set

    def adopt(self, run: Mapping[str, Any] | None) -> "ClassifiedData":
        """Return the layout of the run that trained a network, where this one names no images of validation.

        That is a folder without the part `val_dir`, or a list that is the run's or not named. The run's list or split
        then chooses the images in `root`, the same as in the run if it is the same data set.

        Args:
            run: the options of the run's `data`; None for weights of no run.
        """
        is_list_or_folder = self.kind == "csv" or (self.kind == "folder" and not self._has_val())
        if run is None or not is_list_or_folder or self.val_split is not None:
            return self
        own = ClassifiedData.of(run)
        if self.csv not in (None, own.csv or NAME):
            return self
        if own.kind == "csv":
            return replace(own, root=self.root, val_dir=self.val_dir if self.kind == "csv" else own.val_dir)
        splits = own.kind == self.kind == "folder" and own.val_split is not None
        return replace(own, root=self.root) if splits else self

    def _has_val(self) -> bool:
        return self.val_dir != "val" or has_folders(Path(self.root, self.val_dir))

    def describe_split(self) -> str:
        """Return the options that choose the images of validation, as they are typed; "" if folders do."""
        chosen = {"data.csv": self.csv, "data.val_split": self.val_split}
        split = [f"data.split_seed={self.split_seed}"] if self.split_seed and self.val_split is not None else []
        kind = ["data=csv"] if self.kind == "csv" else []
        return " ".join([*kind, *(f"{name}={value}" for name, value in chosen.items() if value is not None), *split])
