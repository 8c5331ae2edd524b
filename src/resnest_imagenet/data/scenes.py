"""Scenes: images with a mask that has the class of every pixel, in the three layouts that are read.

ade20k (ADE20K's SceneParsing release, as it is unpacked): `<root>/images/training/*.jpg` with
`<root>/annotations/training/*.png`, the same with validation; class names in `<root>/objectInfo150.txt`.
cityscapes: `<root>/leftImg8bit/train/<city>/*_leftImg8bit.png` with `<root>/gtFine/train/<city>/*_gtFine_labelIds.png`.
masks: `<root>/images/train/*` with `<root>/masks/train/*.png`, the value of a pixel the line of its class in
`<root>/classes.txt`, counted from 0, or 255 for what is not labelled.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image

from resnest_imagenet.data.decoding import BadImage, Fault, decode_indices, decode_picture, open_image
from resnest_imagenet.data.folder import ImageFolder, Listing
from resnest_imagenet.data.source import ImageSource, find_part, read_class_names, require_root
from resnest_imagenet.errors import ConfigError, DataError, suggest

VOID = 255  # in masks as they are used: not labelled
UNKNOWN = 254  # in tables: must not occur in a mask file
CLASSES = "classes.txt"


@dataclass(frozen=True)
class Scenes:
    """One part of a data set.

    Attributes:
        images: the photographs.
        masks: in the same order: mask i belongs to image i.
        classes: names, in the order of the class indices.
        table: (256,) uint8, the class index for each value of a mask file; VOID: not labelled; UNKNOWN: must not occur.
        palette: (num_classes, 3) uint8, a colour for each class.
    """

    images: ImageSource
    masks: ImageSource
    classes: tuple[str, ...]
    table: np.ndarray
    palette: np.ndarray

    def __len__(self) -> int:
        return len(self.images)

    @cached_property
    def _translation(self) -> bytes:
        return self.table.tobytes()

    def read(self, index: int) -> tuple[Image.Image, np.ndarray]:
        """Return an image, RGB, and its mask, uint8 (H, W): class indices and VOID.

        Raises:
            BadImage: either cannot be used, or they do not fit each other.
            LoadingError: the storage does not return one.
        """
        picture = decode_picture(self.images.read(index))
        try:
            mask = decode_mask(self.masks.read(index), self._translation)
            if mask.shape != (picture.height, picture.width):
                raise BadImage(Fault("other size", describe_sizes(picture.size, mask.shape[::-1])))
        except BadImage as error:
            raise BadImage(Fault(error.fault.kind, f"its mask {self.masks.name(index)}: {error}")) from error
        return picture, mask

    def name_fault(self, index: int) -> str | None:
        """Return one line about why a scene cannot be used, or None where it can.

        Raises:
            LoadingError: the storage does not return it.
        """
        try:
            self.read(index)
        except BadImage as error:
            return f"{self.images.name(index)}: {error}"
        return None


def decode_mask(encoded: bytes, table: bytes) -> np.ndarray:
    """Decode a mask to class indices and VOID, uint8 (H, W).

    Args:
        encoded: a PNG file of 8 bits; of one with a palette the indices count, not the colours.
        table: 256 bytes, see `Scenes.table`.

    Raises:
        BadImage: it cannot be used, or has a value that is UNKNOWN.
    """
    picture = decode_indices(encoded)
    values = picture.tobytes()
    labels = values.translate(table)
    if UNKNOWN in labels:
        value = values[labels.index(UNKNOWN)]
        raise BadImage(Fault("unknown label", f"a pixel has the value {value}, which is no class and not void"))
    return np.frombuffer(labels, np.uint8).reshape(picture.height, picture.width)


def describe_sizes(image: tuple[int, ...], mask: tuple[int, ...]) -> str:
    """Say of which (width, height) an image and its mask are."""
    return f"{mask[0]} x {mask[1]} pixels, the image {image[0]} x {image[1]}"


@dataclass(frozen=True)
class Layout:
    """Where the files of a kind of data set are.

    Attributes:
        images, masks: folders below the root, with a folder for each part.
        read_classes: returns the class names of a root.
        read_table: returns the table (256,) of so many classes.
        image_end, mask_end: with what the names of a pair differ, before the suffix.
        parts: what the folders of the parts are called, where it is not train and val.
    """

    images: str
    masks: str
    read_classes: Callable[[Path], tuple[str, ...]]
    read_table: Callable[[int], np.ndarray]
    image_end: str = ""
    mask_end: str = ""
    parts: Mapping[str, str] = field(default_factory=dict)

    def folder(self, part: str) -> str:
        """Return what the folder of a part is called."""
        return self.parts.get(part, part)

    def name_mask(self, image: str) -> str:
        """Return the mask that belongs to an image, both below the folders of their part."""
        return os.path.splitext(image)[0].removesuffix(self.image_end) + f"{self.mask_end}.png"


def _read_ade20k_classes(root: Path) -> tuple[str, ...]:
    """Return the first synonym of each class: they differ."""
    path = root / "objectInfo150.txt"
    rows = [line.split("\t") for line in read_class_names(path)[1:]]  # below Idx, Ratio, Train, Val, Name
    classes = tuple(row[-1].partition(",")[0].strip() for row in rows)
    # As released, some of the numbers have a space behind them.
    is_numbered = [row[0].strip() for row in rows] == [str(number) for number in range(1, 151)]
    if not is_numbered or len(set(classes)) < len(classes):
        raise DataError(f"{path}: not ADE20K's list of classes: below its first line, 1 to 150 with names that differ")
    return classes


def _read_named_classes(root: Path) -> tuple[str, ...]:
    classes = read_class_names(root / CLASSES)
    if len(classes) >= UNKNOWN:
        raise DataError(f"{root / CLASSES}: {len(classes)} classes; masks of 8 bits have at most {UNKNOWN - 1}")
    return classes


def _label_from(first: int, void: int) -> Callable[[int], np.ndarray]:
    """Return what makes the table of classes whose values are consecutive.

    Args:
        first: value of the first class.
        void: value of what is not labelled.
    """

    def read_table(num_classes: int) -> np.ndarray:
        table = np.full(256, UNKNOWN, np.uint8)
        table[first : first + num_classes] = np.arange(num_classes)
        table[void] = VOID
        return table

    return read_table


# Of the 34 labels of Cityscapes those that are evaluated, by their value in *_labelIds.png, with the colours that the
# data set shows them in (its scripts, helpers/labels.py).
CITYSCAPES = {
    7: ("road", (128, 64, 128)),
    8: ("sidewalk", (244, 35, 232)),
    11: ("building", (70, 70, 70)),
    12: ("wall", (102, 102, 156)),
    13: ("fence", (190, 153, 153)),
    17: ("pole", (153, 153, 153)),
    19: ("traffic light", (250, 170, 30)),
    20: ("traffic sign", (220, 220, 0)),
    21: ("vegetation", (107, 142, 35)),
    22: ("terrain", (152, 251, 152)),
    23: ("sky", (70, 130, 180)),
    24: ("person", (220, 20, 60)),
    25: ("rider", (255, 0, 0)),
    26: ("car", (0, 0, 142)),
    27: ("truck", (0, 0, 70)),
    28: ("bus", (0, 60, 100)),
    31: ("train", (0, 80, 100)),
    32: ("motorcycle", (0, 0, 230)),
    33: ("bicycle", (119, 11, 32)),
}


def _read_cityscapes_table(num_classes: int) -> np.ndarray:
    table = np.full(256, UNKNOWN, np.uint8)
    table[:34] = table[255] = VOID  # 255 is -1, licence plates
    table[list(CITYSCAPES)] = np.arange(num_classes)
    return table


LAYOUTS = {
    "ade20k": Layout(
        "images",
        "annotations",
        _read_ade20k_classes,
        _label_from(first=1, void=0),
        parts={"train": "training", "val": "validation"},
    ),
    "cityscapes": Layout(
        "leftImg8bit",
        "gtFine",
        lambda root: tuple(name for name, _ in CITYSCAPES.values()),
        _read_cityscapes_table,
        image_end="_leftImg8bit",
        mask_end="_gtFine_labelIds",
    ),
    "masks": Layout("images", "masks", _read_named_classes, _label_from(first=0, void=VOID)),
}


@dataclass(frozen=True)
class Pairing:
    """The files of one part, below the folders of the part; sorted.

    Attributes:
        images: those that have a mask.
        masks: theirs, in the same order.
        lone_images: images without a mask.
        lone_masks: masks without an image.
        notes: lines about what the listing of the images has skipped.
    """

    images: list[str]
    masks: list[str]
    lone_images: list[str]
    lone_masks: list[str]
    notes: tuple[str, ...]


def choose_layout(kind: str) -> Layout:
    """Return a layout by its name; a ConfigError names those there are."""
    if kind not in LAYOUTS:
        raise ConfigError(f"unknown data.kind={kind}{suggest(kind, LAYOUTS)} ({', '.join(LAYOUTS)})")
    return LAYOUTS[kind]


def pair_files(layout: Layout, images: Path, masks: Path) -> Pairing:
    """Find the mask of each image.

    Args:
        layout: how they are named.
        images: the folder of one part.
        masks: the same.

    Raises:
        DataError: a folder cannot be read.
    """
    listing = Listing(str(images))
    files = sorted(name for name in listing.walk("") if os.path.splitext(name)[0].endswith(layout.image_end))
    there = {name for name in Listing(str(masks)).walk("") if name.endswith(f"{layout.mask_end}.png")}
    mask_of = {name: layout.name_mask(name) for name in files}
    paired = [name for name in files if mask_of[name] in there]
    return Pairing(
        images=paired,
        masks=[mask_of[name] for name in paired],
        lone_images=[name for name in files if mask_of[name] not in there],
        lone_masks=sorted(there.difference(mask_of.values())),
        notes=listing.notes,
    )


def open_scenes(kind: str, root: str, part: str, option: str | None = None) -> Scenes:
    """List the images and masks of one part of a data set.

    Args:
        kind: ade20k, cityscapes or masks.
        root: the data set's folder.
        part: train or val, or the name of another folder beside those of these parts.
        option: the option that names the part, for the error message; None: data.train_dir or data.val_dir.

    Raises:
        ConfigError: an unknown kind.
        DataError: folders, images or masks are missing, or the class names.
    """
    layout = choose_layout(kind)
    image_root, mask_root = find_folders(kind, root, part, option or f"data.{part}_dir")
    pairing = pair_files(layout, image_root, mask_root)
    if pairing.lone_images:
        name = pairing.lone_images[0]
        wanted = mask_root / layout.name_mask(name)
        raise DataError(f"{image_root / name}: no mask {wanted}{_count_others(pairing.lone_images)}")
    if pairing.lone_masks:
        name = pairing.lone_masks[0]
        raise DataError(f"{mask_root / name}: no image for it in {image_root}{_count_others(pairing.lone_masks)}")
    if not pairing.images:
        raise DataError(f"{image_root}: no images (*{layout.image_end}.jpg, .png, ...)")
    classes = layout.read_classes(Path(root))
    masks = _list_files(mask_root, pairing.masks, classes)
    palette = _read_palette(masks, len(classes))
    notes = pairing.notes
    if palette is not None:
        notes += (f"{mask_root}: its masks have a palette: the indices are the classes, not the colours",)
    elif kind == "cityscapes":
        palette = np.array([colour for _, colour in CITYSCAPES.values()], np.uint8)
    else:
        palette = make_palette(classes)
    images = _list_files(image_root, pairing.images, classes, notes)
    return Scenes(images, masks, classes, layout.read_table(len(classes)), palette)


def open_scene(kind: str, part: str, file: str, classes: tuple[str, ...], palette: np.ndarray) -> Scenes:
    """Return one scene by its image, without a look at the others of its data set.

    Args:
        kind: ade20k, cityscapes or masks.
        part: train or val, or the name of another folder beside those of these parts.
        file: the path of the image.
        classes: names, in the order of the class indices.
        palette: uint8 (num_classes, 3).

    Raises:
        ConfigError: an unknown kind.
        DataError: the image is not in a folder of this part.
    """
    layout = choose_layout(kind)
    folder = os.path.normpath(layout.folder(part))
    root, is_there, name = file.rpartition(f"/{layout.images}/{folder}/")
    if not is_there:
        raise DataError(f"{file}: not in a folder {layout.images}/{folder}, where data.kind={kind} has its images")
    images = _list_files(Path(root, layout.images, folder), [name], classes)
    masks = _list_files(Path(root, layout.masks, folder), [layout.name_mask(name)], classes)
    return Scenes(images, masks, classes, layout.read_table(len(classes)), palette)


def find_folders(kind: str, root: str, part: str, option: str) -> tuple[Path, Path]:
    """Return the folders of the images and of the masks of a part; a DataError names what there is instead.

    Args: see `open_scenes`.
    """
    layout = choose_layout(kind)
    require_root(root)
    names = (layout.images, layout.masks)
    images, masks = (_find_folder(root, name, layout.folder(part), option) for name in names)
    return images, masks


def _find_folder(root: str, name: str, part: str, option: str) -> Path:
    """Return <root>/<name>/<part>; a DataError names what there is instead."""
    if not Path(root, name).is_dir():
        raise DataError(f"{Path(root, name)}: no such folder: is data.root={root} the data set's own folder?")
    return find_part(str(Path(root, name)), part, option)


def _count_others(files: list[str]) -> str:
    return f" (and {len(files) - 1:,} more)" if len(files) > 1 else ""


def _list_files(root: Path, files: list[str], classes: tuple[str, ...], notes: tuple[str, ...] = ()) -> ImageFolder:
    """Return files of a folder as a source, whose labels say nothing."""
    names = np.array([os.fsencode(file) for file in files])
    return ImageFolder(root, classes, names, np.zeros(len(files), np.int64), notes=notes)


def _read_palette(masks: ImageSource, num_classes: int) -> np.ndarray | None:
    """Return the colours of the classes (num_classes, 3) in the first mask, or None where it has no palette."""
    try:
        colours = open_image(masks.read(0)).getpalette("RGB")
    except BadImage:  # which is named when it is read
        return None
    if colours is None:
        return None
    palette = np.zeros((num_classes, 3), np.uint8)
    given = np.array(colours, np.uint8).reshape(-1, 3)[:num_classes]
    palette[: len(given)] = given
    return palette


def make_palette(classes: tuple[str, ...]) -> np.ndarray:
    """Return a colour for each class, uint8 (num_classes, 3): those of PASCAL VOC, black for a first "background".

    The bits of a class number are dealt to red, green and blue in turn, the lowest to their highest (VOC's devkit).
    """
    numbers = np.arange(len(classes)) + (classes[0] != "background")
    palette = np.zeros((len(classes), 3), np.uint8)
    for bit in range(8):
        for channel in range(3):
            palette[:, channel] |= ((numbers >> (3 * bit + channel) & 1) << (7 - bit)).astype(np.uint8)
    return palette
