"""Demo images: ten classes of shapes and textures, in the ImageNet folder layout.

Only the figure tells the class. Its position, size and rotation, all colours, whether figure or background is brighter,
the shading, the noise, the size of the image and its JPEG quality have the same distribution in every class.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from resnest_imagenet.errors import DataError
from resnest_imagenet.files import name_temporary

Mask = np.ndarray  # bool (H, W)
Coordinates = np.ndarray  # float64 (H, W)

CELL = 0.4  # side of a cell of the textures, which are four cells wide and high


def _within(x: Coordinates, y: Coordinates, side: float = 2 * CELL) -> Mask:
    return np.maximum(abs(x), abs(y)) < side


def _wave(x: Coordinates) -> Coordinates:
    return np.sin(np.pi * x / CELL)


def _triangle(x: Coordinates, y: Coordinates) -> Mask:
    return (y < 0.6) & (np.sqrt(3) * abs(x) - y < 1.1)


# Each function maps coordinates, in which the figure fills the square from -1 to 1, to the mask of the figure.
FIGURES: dict[str, Callable[[Coordinates, Coordinates], Mask]] = {
    "checker": lambda x, y: _within(x, y) & (_wave(x) * _wave(y) > 0),
    "cross": lambda x, y: _within(x, y, 1) & (np.minimum(abs(x), abs(y)) < 0.28),
    "disk": lambda x, y: np.hypot(x, y) < 0.9,
    "dots": lambda x, y: _within(x, y) & (np.hypot(x % CELL - CELL / 2, y % CELL - CELL / 2) < 0.13),
    "ring": lambda x, y: abs(np.hypot(x, y) - 0.78) < 0.2,
    "spokes": lambda x, y: (np.hypot(x, y) < 1) & (np.sin(5 * np.arctan2(y, x)) > 0),
    "square": _within,
    "stripes": lambda x, y: _within(x, y) & (_wave(2 * x) > 0),
    "target": lambda x, y: (np.hypot(x, y) < 1) & (np.cos(2.5 * np.pi * np.hypot(x, y)) > 0),
    "triangle": _triangle,
}

OVERSAMPLING = 3  # of the mask, for smooth edges


def draw_figure(name: str, rng: np.random.Generator) -> Image.Image:
    """Draw one image of a class, 64 to 96 pixels on each side, with the figure near the centre."""
    height, width = rng.integers(64, 97, size=2).tolist()
    short = min(height, width)
    radius = rng.uniform(0.33, 0.43) * short
    reach = 0.46 * short - radius
    centre_y, centre_x = height / 2 + rng.uniform(-reach, reach), width / 2 + rng.uniform(-reach, reach)
    angle = rng.uniform(0, 2 * np.pi)
    rows, columns = np.mgrid[: height * OVERSAMPLING, : width * OVERSAMPLING] / OVERSAMPLING
    dy, dx = (rows - centre_y) / radius, (columns - centre_x) / radius
    mask = FIGURES[name](dx * np.cos(angle) + dy * np.sin(angle), dy * np.cos(angle) - dx * np.sin(angle))
    coverage = mask.reshape(height, OVERSAMPLING, width, OVERSAMPLING).mean((1, 3))[..., None]
    figure, background = draw_colours(rng)
    image = coverage * figure + (1 - coverage) * background
    image += draw_shading(rng, height, width) + rng.normal(0, rng.uniform(1, 8), size=image.shape)
    return Image.fromarray(image.clip(0, 255).astype(np.uint8))


def draw_colours(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draw two RGB colours that can be told apart."""
    while True:
        first, second = rng.uniform(20, 235, size=(2, 3))
        if np.abs(first - second).mean() > 80:
            return first, second


def draw_shading(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Draw a slope of brightness across the image, (H, W, 1)."""
    slope_y, slope_x = rng.uniform(-15, 15, size=2)
    rows, columns = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    return (slope_y * rows + slope_x * columns)[..., None]


def write_demo_images(out: Path, seed: int, train_per_class: int, val_per_class: int) -> bool:
    """Write train/<class>/*.JPEG and val/<class>/*.JPEG; the same seed gives the same pixels.

    Returns:
        False if `out` holds these images already.

    Raises:
        DataError: `out` holds something else or cannot be written.
    """

    def write(folder: Path) -> None:
        for part, name in ((0, "train"), (1, "val")):
            for label, figure in enumerate(FIGURES):
                place = folder / name / figure
                place.mkdir(parents=True)
                for number in range((train_per_class, val_per_class)[part]):
                    rng = np.random.default_rng([seed, part, label, number])
                    image = draw_figure(figure, rng)
                    image.save(place / f"{figure}_{seed}_{number:05d}.JPEG", quality=int(rng.integers(70, 96)))

    settings = {"seed": seed, "train_per_class": train_per_class, "val_per_class": val_per_class}
    return write_once(out, settings, write)


def write_once(
    out: Path, settings: Mapping[str, int | str], write: Callable[[Path], None], marker: str = "demo.json"
) -> bool:
    """Write a data set whole or not at all, unless it exists.

    Args:
        out: its folder, new or empty.
        settings: what determines its content; written into it.
        write: writes the data set into a folder.
        marker: name of the file with the settings.

    Returns:
        False if `out` holds a data set of these settings already.

    Raises:
        DataError: `out` holds something else or cannot be written.
    """
    out = out.absolute()
    unfinished = name_temporary(out)
    try:
        if (out / marker).exists() and (out / marker).read_text() == json.dumps(settings):
            return False
        if out.exists() and any(out.iterdir()):
            raise DataError(f"out={out}: is not empty; remove it or choose another folder")
        write(unfinished)
        (unfinished / marker).write_text(json.dumps(settings))
        unfinished.replace(out)
    except OSError as error:
        raise DataError(f"out={out}: cannot be written ({error.strerror})") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return True
