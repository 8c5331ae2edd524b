"""Demo scenes: figures on clutter with the class of every pixel, in the layout of data=masks.

Only the figure tells the class: places, sizes, rotations, colours and noise have the same distribution in every class.
The figures are large, because a network with output stride 8 turns a scene's side into 13 to 18 cells.
"""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from resnest_imagenet.data.demo import FIGURES, OVERSAMPLING, Coordinates, Mask, draw_colours, draw_shading, write_once
from resnest_imagenet.data.scenes import CLASSES

BACKGROUND = "background"
SHAPES = ("cross", "disk", "stripes", "target", "triangle")
SIDES = (104, 144)  # of a scene, in pixels
RADII = (28.0, 44.0)  # half of a figure's width
MOST_FIGURES = 2
NUM_STROKES = (4, 10)  # of the clutter


def fill_outline(name: str, x: Coordinates, y: Coordinates) -> Mask:
    """Return the pixels that belong to a figure, including those between its stripes or rings.

    Args:
        name: of FIGURES.
        x: (H, W); the figure lies in -1..1.
        y: the same, downwards.
    """
    if name == "target":
        return np.hypot(x, y) < 1
    return FIGURES["square" if name == "stripes" else name](x, y)


def draw_scene(rng: np.random.Generator) -> tuple[Image.Image, Image.Image]:
    """Draw a scene: its image, RGB, and its mask, L, with 0 for the background and n for the n-th of SHAPES."""
    height, width = rng.integers(SIDES[0], SIDES[1] + 1, size=2).tolist()
    image = _draw_clutter(rng, height, width)
    labels = np.zeros((height, width), np.uint8)
    for _ in range(rng.integers(1, MOST_FIGURES + 1)):
        _draw_figure(int(rng.integers(len(SHAPES))), image, labels, rng)
    image += draw_shading(rng, height, width) + rng.normal(0, rng.uniform(1, 8), size=image.shape)
    return Image.fromarray(image.clip(0, 255).astype(np.uint8)), Image.fromarray(labels)


def _draw_clutter(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Draw a background without figures: soft patches, lines and bars; float64 (H, W, 3)."""
    patches = Image.fromarray(rng.integers(20, 236, (5, 5, 3), dtype=np.uint8))
    image = patches.resize((width, height), Image.Resampling.BICUBIC)
    pen = ImageDraw.Draw(image)
    for _ in range(rng.integers(*NUM_STROKES)):
        ends = [tuple(point) for point in (rng.uniform(0, 1, (2, 2)) * (width, height)).tolist()]
        colour = tuple(rng.integers(20, 236, 3).tolist())
        pen.line(ends, fill=colour, width=int(rng.integers(1, 8)))
    return np.array(image, np.float64)


def _draw_figure(shape: int, image: np.ndarray, labels: np.ndarray, rng: np.random.Generator) -> None:
    """Draw a figure into an image (H, W, 3) and its mask (H, W), over their content."""
    height, width = labels.shape
    radius, angle = rng.uniform(*RADII), rng.uniform(0, 2 * np.pi)
    reach = 0.7 * radius  # a part of it may be outside
    centre_y, centre_x = rng.uniform(reach, height - reach), rng.uniform(reach, width - reach)
    rows, columns = np.mgrid[: height * OVERSAMPLING, : width * OVERSAMPLING] / OVERSAMPLING
    dy, dx = (rows - centre_y) / radius, (columns - centre_x) / radius
    x, y = dx * np.cos(angle) + dy * np.sin(angle), dy * np.cos(angle) - dx * np.sin(angle)
    inside, figure = (_average(mask) for mask in (fill_outline(SHAPES[shape], x, y), FIGURES[SHAPES[shape]](x, y)))
    colour, gap_colour = draw_colours(rng)
    image *= (1 - inside)[..., None]
    image += figure[..., None] * colour + (inside - figure)[..., None] * gap_colour
    labels[inside >= 0.5] = shape + 1


def _average(mask: Mask) -> np.ndarray:
    """Return the share of each pixel that a mask of OVERSAMPLING times the size covers."""
    height, width = (side // OVERSAMPLING for side in mask.shape)
    return mask.reshape(height, OVERSAMPLING, width, OVERSAMPLING).mean((1, 3))


def write_demo_scenes(out: Path, seed: int, train_scenes: int, val_scenes: int) -> bool:
    """Write images/{train,val}/*.JPEG, masks/{train,val}/*.png and classes.txt; the same seed gives the same pixels.

    Returns:
        False if `out` holds these scenes already.

    Raises:
        DataError: `out` holds something else or cannot be written.
    """

    def write(folder: Path) -> None:
        for part, (name, count) in enumerate((("train", train_scenes), ("val", val_scenes))):
            images, masks = folder / "images" / name, folder / "masks" / name
            images.mkdir(parents=True)
            masks.mkdir(parents=True)
            for number in range(count):
                rng = np.random.default_rng([seed, part, number])
                image, mask = draw_scene(rng)
                image.save(images / f"scene_{seed}_{number:05d}.JPEG", quality=int(rng.integers(70, 96)))
                mask.save(masks / f"scene_{seed}_{number:05d}.png")
        (folder / CLASSES).write_text("\n".join((BACKGROUND, *SHAPES)) + "\n")

    counts = {"train_scenes": train_scenes, "val_scenes": val_scenes}
    return write_once(out, {"task": "segmentation", "seed": seed, **counts}, write)
