"""Demo objects: overlapping shapes with boxes and masks, in COCO's layout.

Classes differ only in their outline: places, sizes, rotations, colours and textures have the same distributions for
every class. A box or mask covers the visible part of a shape.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from resnest_imagenet.data.coco import FOLDERS, JSON_FOLDER
from resnest_imagenet.data.demo import FIGURES, OVERSAMPLING, Coordinates, Mask, draw_shading, write_once

SHAPES = ("disk", "square", "triangle", "star", "cross")
SIDES = (104, 136)  # of an image, in pixels
RADII = (16.0, 38.0)  # half of a shape's width
MOST_SHAPES = 4
LEAST_VISIBLE = 0.7  # visible share of a shape that others cover
TRIES = 20  # of placing a shape
CONTRAST = 80  # between a shape and the background, in 0..255, mean over the channels
# Largest amplitude of textures. The classification demo's network classified about 130 single shapes of four classes
# (chance: 25 %): 39 % of them at an amplitude of 20, 54 % at 10, 66 % at 0; with the sizes above 65 % at 8, 68 % at 4.
TEXTURE = 6.0


@dataclass(frozen=True)
class DrawnObject:
    """One shape of an image.

    Attributes:
        label: its number in SHAPES.
        mask: its visible pixels, bool (H, W).
    """

    label: int
    mask: np.ndarray


def fill_shape(name: str, x: Coordinates, y: Coordinates) -> Mask:
    """Return the pixels of a shape that fills the square from -1 to 1.

    Args:
        name: of SHAPES.
        x: (H, W).
        y: the same, downwards.
    """
    if name == "star":  # of five rays: the edge is a zigzag of the angle
        return np.hypot(x, y) < 0.4 + 0.6 * abs(2 * (np.arctan2(y, x) * 5 / (2 * np.pi) % 1) - 1)
    return FIGURES[name](x, y)


def draw_objects(rng: np.random.Generator) -> tuple[Image.Image, list[DrawnObject]]:
    """Draw an image, RGB; return it with its objects, the hindmost first."""
    height, width = rng.integers(SIDES[0], SIDES[1] + 1, size=2).tolist()
    base = rng.uniform(40, 215, 3)
    patches = Image.fromarray((base + rng.uniform(-25, 25, (4, 4, 3))).clip(0, 255).astype(np.uint8))
    image = np.array(patches.resize((width, height), Image.Resampling.BICUBIC), np.float64)
    image += draw_texture(rng, height, width)
    objects: list[DrawnObject] = []
    areas: list[int] = []
    for _ in range(rng.integers(1, MOST_SHAPES + 1)):
        label, colour = int(rng.integers(len(SHAPES))), _draw_colour(rng, base)
        coverage = _place_shape(SHAPES[label], rng, (height, width), objects, areas)
        if coverage is None:
            continue
        mask = coverage >= 0.5
        objects = [DrawnObject(below.label, below.mask & ~mask) for below in objects] + [DrawnObject(label, mask)]
        areas.append(int(mask.sum()))
        image += coverage[..., None] * (colour + draw_texture(rng, height, width) - image)
    image += draw_shading(rng, height, width) + rng.normal(0, rng.uniform(1, 8), size=image.shape)
    return Image.fromarray(image.clip(0, 255).astype(np.uint8)), objects


def draw_texture(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Draw stripes or a checker with low contrast, float64 (H, W, 1)."""
    rows, columns = np.mgrid[:height, :width]
    angle, period = rng.uniform(0, np.pi), rng.uniform(4, 12)
    along = np.sin(2 * np.pi * (columns * np.cos(angle) + rows * np.sin(angle)) / period)
    across = np.sin(2 * np.pi * (rows * np.cos(angle) - columns * np.sin(angle)) / period)
    pattern = along if rng.random() < 0.5 else along * across
    return (rng.uniform(0, TEXTURE) * np.sign(pattern))[..., None]


def _draw_colour(rng: np.random.Generator, base: np.ndarray) -> np.ndarray:
    while True:
        colour = rng.uniform(20, 235, 3)
        if np.abs(colour - base).mean() > CONTRAST:
            return colour


def _place_shape(
    name: str, rng: np.random.Generator, size: tuple[int, int], objects: list[DrawnObject], areas: list[int]
) -> np.ndarray | None:
    """Place a shape where it hides no other; return the share of each pixel that it covers, (H, W), or None."""
    height, width = size
    for _ in range(TRIES):
        radius, angle = rng.uniform(*RADII), rng.uniform(0, 2 * np.pi)
        reach = 0.8 * radius  # a small part may be outside the image
        centre_y, centre_x = rng.uniform(reach, height - reach), rng.uniform(reach, width - reach)
        coverage = np.zeros(size)
        window = _find_window(centre_y, radius, height), _find_window(centre_x, radius, width)
        coverage[window] = _cover(name, window, (centre_y, centre_x), radius, angle)
        visible = [int((below.mask & (coverage < 0.5)).sum()) for below in objects]
        if all(seen >= LEAST_VISIBLE * area for seen, area in zip(visible, areas, strict=True)):
            return coverage
    return None


def _find_window(centre: float, radius: float, side: int) -> slice:
    """Return the pixels that a shape may touch, along one axis: those within 1.5 times its radius."""
    return slice(max(0, int(centre - 1.5 * radius)), min(side, int(centre + 1.5 * radius) + 1))


def _cover(
    name: str, window: tuple[slice, slice], centre: tuple[float, float], radius: float, angle: float
) -> np.ndarray:
    """Return the share of each pixel of a window (rows, columns) that a shape covers."""
    dy, dx = (
        (np.arange(pixels.start * OVERSAMPLING, pixels.stop * OVERSAMPLING) / OVERSAMPLING - middle) / radius
        for pixels, middle in zip(window, centre, strict=True)
    )
    dy, dx = np.meshgrid(dy, dx, indexing="ij")
    inside = fill_shape(name, dx * np.cos(angle) + dy * np.sin(angle), dy * np.cos(angle) - dx * np.sin(angle))
    height, width = (pixels.stop - pixels.start for pixels in window)
    return inside.reshape(height, OVERSAMPLING, width, OVERSAMPLING).mean((1, 3))


def encode_runs(mask: np.ndarray) -> dict[str, Any]:
    """Encode a mask as an uncompressed run-length code: alternating runs of 0 and 1 by columns, 0 first."""
    values = np.concatenate(([0], mask.T.ravel().astype(np.int8), [1 - mask[-1, -1]]))
    counts = np.diff(np.flatnonzero(np.diff(values)), prepend=0)
    return {"size": list(mask.shape), "counts": counts.tolist()}


def write_demo_objects(out: Path, seed: int, train_images: int, val_images: int) -> bool:
    """Write {train2017,val2017}/*.JPEG and annotations/instances_*.json; the same seed writes the same pixels.

    Returns:
        False if `out` holds these images already.

    Raises:
        DataError: `out` holds something else, or cannot be written.
    """

    def write(folder: Path) -> None:
        (folder / JSON_FOLDER).mkdir(parents=True)
        for part, (name, count) in enumerate((("train", train_images), ("val", val_images))):
            images = folder / FOLDERS[name]
            images.mkdir()
            content = _describe_set()
            for number in range(count):
                rng = np.random.default_rng([seed, part, number])
                image, objects = draw_objects(rng)
                file = f"objects_{seed}_{number:05d}.JPEG"
                image.save(images / file, quality=int(rng.integers(70, 96)))
                content["images"].append(
                    {"id": number + 1, "file_name": file, "height": image.height, "width": image.width}
                )
                content["annotations"] += [_annotate(drawn, number + 1) for drawn in objects]
            for number, annotation in enumerate(content["annotations"]):
                annotation["id"] = number + 1  # pycocotools takes a match with id 0 for no match
            (folder / JSON_FOLDER / f"instances_{FOLDERS[name]}.json").write_text(json.dumps(content))

    counts = {"train_images": train_images, "val_images": val_images}
    return write_once(out, {"task": "detection", "seed": seed, **counts}, write)


def _describe_set() -> dict[str, list[dict[str, Any]]]:
    categories = [{"id": label + 1, "name": name, "supercategory": "shape"} for label, name in enumerate(SHAPES)]
    return {"images": [], "annotations": [], "categories": categories}


def _annotate(drawn: DrawnObject, image_id: int) -> dict[str, Any]:
    rows, columns = (np.flatnonzero(drawn.mask.any(axis)) for axis in (1, 0))
    top, left = int(rows[0]), int(columns[0])
    return {
        "image_id": image_id,
        "category_id": drawn.label + 1,
        "bbox": [left, top, int(columns[-1]) + 1 - left, int(rows[-1]) + 1 - top],
        "area": int(drawn.mask.sum()),
        "iscrowd": 0,
        "segmentation": encode_runs(drawn.mask),
    }
