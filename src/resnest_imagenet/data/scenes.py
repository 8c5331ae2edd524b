"""Scenes: images with masks that give the class of every pixel, in three layouts.

ade20k (ADE20K's SceneParsing release, unpacked): `<root>/images/training/*.jpg` with
`<root>/annotations/training/*.png`, the same with validation; class names in `<root>/objectInfo150.txt`.
cityscapes: `<root>/leftImg8bit/train/<city>/*_leftImg8bit.png` with `<root>/gtFine/train/<city>/*_gtFine_labelIds.png`.
masks: `<root>/images/train/*` with `<root>/masks/train/*.png`; a pixel's value is the line number of its class in
`<root>/classes.txt`, counted from 0, or 255 if it is not labelled.
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

VOID = 255  # in decoded masks: not labelled
UNKNOWN = 254  # in tables: the value must not occur in a mask file
CLASSES = "classes.txt"


@dataclass(frozen=True)
class Scenes:
    """One part of a data set.

    Attributes:
        images: the photographs.
        masks: mask i belongs to image i.
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
            BadImage: either cannot be used, or their sizes differ.
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
        """Return one line about why a scene cannot be used, or None if it can.

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
        encoded: a PNG file of 8 bits; if it has a palette, the indices are the values, not the colours.
        table: 256 bytes, see `Scenes.table`.

    Raises:
        BadImage: it cannot be used, or has an UNKNOWN value.
    """
    picture = decode_indices(encoded)
    values = picture.tobytes()
    labels = values.translate(table)
    if UNKNOWN in labels:
        value = values[labels.index(UNKNOWN)]
        raise BadImage(Fault("unknown label", f"a pixel has the value {value}, neither a class nor void"))
    return np.frombuffer(labels, np.uint8).reshape(picture.height, picture.width)


def describe_sizes(image: tuple[int, ...], mask: tuple[int, ...]) -> str:
    """Return the sizes (width, height) of an image and its mask in words."""
    return f"{mask[0]} x {mask[1]} pixels, the image {image[0]} x {image[1]}"


@dataclass(frozen=True)
class Layout:
    """Where the files of a kind of data set are.

    Attributes:
        images, masks: folders below the root, with a folder for each part.
        read_classes: returns the class names of a root.
        read_table: returns the table (256,) for a number of classes.
        image_end, mask_end: the ends, before the suffix, in which the names of a pair differ.
        parts: the names of the parts' folders, if they are not train and val.
    """

    images: str
    masks: str
    read_classes: Callable[[Path], tuple[str, ...]]
    read_table: Callable[[int], np.ndarray]
    image_end: str = ""
    mask_end: str = ""
    parts: Mapping[str, str] = field(default_factory=dict)

    def folder(self, part: str) -> str:
        """Return the name of a part's folder."""
        return self.parts.get(part, part)

    def name_mask(self, image: str) -> str:
        """Return the mask that belongs to an image, both below the folders of their part."""
        return os.path.splitext(image)[0].removesuffix(self.image_end) + f"{self.mask_end}.png"


def _read_ade20k_classes(root: Path) -> tuple[str, ...]:
    """Return the first synonym of each class; these differ from each other."""
    path = root / "objectInfo150.txt"
    rows = [line.split("\t") for line in read_class_names(path)[1:]]  # below Idx, Ratio, Train, Val, Name
    classes = tuple(row[-1].partition(",")[0].strip() for row in rows)
    # In the released file, some numbers are followed by a space.
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
    """Return the function that makes the table for classes with consecutive values.

    Args:
        first: value of the first class.
        void: value of pixels that are not labelled.
    """

    def read_table(num_classes: int) -> np.ndarray:
        table = np.full(256, UNKNOWN, np.uint8)
        table[first : first + num_classes] = np.arange(num_classes)
        table[void] = VOID
        return table

    return read_table


# Those of Cityscapes' 34 labels that are evaluated, by their value in *_labelIds.png, with the data set's own colours
# (its scripts, helpers/labels.py).
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
    table[:34] = table[255] = VOID  # 255 stands for label -1, licence plates
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
        masks: their masks, in the same order.
        lone_images: images without a mask.
        lone_masks: masks without an image.
        notes: lines about the files that the listing of the images has skipped.
    """

    images: list[str]
    masks: list[str]
    lone_images: list[str]
    lone_masks: list[str]
    notes: tuple[str, ...]


def choose_layout(kind: str) -> Layout:
    """Return a layout by its name; a ConfigError lists the valid names."""
    if kind not in LAYOUTS:
        raise ConfigError(f"unknown data.kind={kind}{suggest(kind, LAYOUTS)} ({', '.join(LAYOUTS)})")
    return LAYOUTS[kind]


def pair_files(layout: Layout, images: Path, masks: Path) -> Pairing:
    """Find the mask of each image.

    Args:
        layout: how files are named.
        images: the folder of a part's images.
        masks: the folder of its masks.

    Raises:
        DataError: a folder cannot be read.
    """
    listing = Listing(str(images))
    files = sorted(name for name in listing.walk("") if os.path.splitext(name)[0].endswith(layout.image_end))
    existing = {name for name in Listing(str(masks)).walk("") if name.endswith(f"{layout.mask_end}.png")}
    mask_of = {name: layout.name_mask(name) for name in files}
    paired = [name for name in files if mask_of[name] in existing]
    return Pairing(
        images=paired,
        masks=[mask_of[name] for name in paired],
        lone_images=[name for name in files if mask_of[name] not in existing],
        lone_masks=sorted(existing.difference(mask_of.values())),
        notes=listing.notes,
    )


def open_scenes(kind: str, root: str, part: str, option: str | None = None) -> Scenes:
    """List the images and masks of one part of a data set.

    Args:
        kind: ade20k, cityscapes or masks.
        root: the data set's folder.
        part: train or val, or the name of another folder beside theirs.
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
        mask = mask_root / layout.name_mask(name)
        raise DataError(f"{image_root / name}: no mask {mask}{_count_others(pairing.lone_images)}")
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
    """Return one scene by its image, without listing its data set.

    Args:
        kind: ade20k, cityscapes or masks.
        part: train or val, or the name of another folder beside theirs.
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
    """Return <root>/<name>/<part>; a DataError names the folders there are."""
    if not Path(root, name).is_dir():
        raise DataError(f"{Path(root, name)}: no such folder: is data.root={root} the data set's own folder?")
    return find_part(str(Path(root, name)), part, option)


def _count_others(files: list[str]) -> str:
    return f" (and {len(files) - 1:,} more)" if len(files) > 1 else ""


def _list_files(root: Path, files: list[str], classes: tuple[str, ...], notes: tuple[str, ...] = ()) -> ImageFolder:
    """Return files of a folder as a source; its labels are all 0 and have no meaning."""
    names = np.array([os.fsencode(file) for file in files])
    return ImageFolder(root, classes, names, np.zeros(len(files), np.int64), notes=notes)


def _read_palette(masks: ImageSource, num_classes: int) -> np.ndarray | None:
    """Return the colours of the classes (num_classes, 3) in the first mask, or None if it has no palette."""
    try:
        colours = open_image(masks.read(0)).getpalette("RGB")
    except BadImage:  # reported when it is read in full
        return None
    if colours is None:
        return None
    palette = np.zeros((num_classes, 3), np.uint8)
    rows = np.array(colours, np.uint8).reshape(-1, 3)[:num_classes]
    palette[: len(rows)] = rows
    return palette


def make_palette(classes: tuple[str, ...]) -> np.ndarray:
    """Return a colour for each class, uint8 (num_classes, 3): PASCAL VOC's, with black for a first class "background".

    The bits of a class number, from the lowest, go to red, green and blue in turn, to their highest bits first (VOC's
    devkit).
    """
    numbers = np.arange(len(classes)) + (classes[0] != "background")
    palette = np.zeros((len(classes), 3), np.uint8)
    for bit in range(8):
        for channel in range(3):
            palette[:, channel] |= ((numbers >> (3 * bit + channel) & 1) << (7 - bit)).astype(np.uint8)
    return palette
