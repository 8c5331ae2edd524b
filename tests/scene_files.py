"""Small data sets with masks, in the three layouts that are read."""

import io

import numpy as np
from PIL import Image

CLASSES = ("background", "disk", "cross")


def encode(array, kind="PNG", mode=None, **options):
    file = io.BytesIO()
    image = Image.fromarray(array)
    (image.convert(mode) if mode else image).save(file, kind, **options)
    return file.getvalue()


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def draw(number, height=20, width=30):
    """Return the colours and the values of a mask of one scene, values 0 to 2."""
    rng = np.random.default_rng(number)
    return rng.integers(0, 256, (height, width, 3), np.uint8), rng.integers(0, 3, (height, width), np.uint8)


def write_masks(root, train=3, val=2):
    """Write scenes in the layout of data=masks, of different sizes."""
    write(root / "classes.txt", "\n".join(CLASSES).encode())
    for part, count in (("train", train), ("val", val)):
        for number in range(count):
            colours, values = draw([len(part), number], 20 + number)
            values[0, 0] = 255
            write(root / f"images/{part}/{number}.jpg", encode(colours, "JPEG"))
            write(root / f"masks/{part}/{number}.png", encode(values))
    return root


def write_ade20k(root):
    numbers = [f"{number} " if number in (22, 24) else f"{number}" for number in range(1, 151)]  # as released
    rows = "".join(f"{number}\t0.1\t5\t5\tclass {number.strip()}, thing \n" for number in numbers)
    write(root / "objectInfo150.txt", f"Idx\tRatio\tTrain\tVal\tName\n{rows}".encode())
    for part in ("training", "validation"):
        colours, values = draw(len(part))
        values[0] = range(121, 151)
        write(root / f"images/{part}/ADE_{part}_00000001.jpg", encode(colours, "JPEG"))
        write(root / f"annotations/{part}/ADE_{part}_00000001.png", encode(values))
    return root


def write_cityscapes(root):
    for part, city in (("train", "aachen"), ("val", "lindau")):
        colours, _ = draw(len(part), 8, 5)
        values = np.arange(40, dtype=np.uint8).reshape(8, 5) % 34
        values[7, 4] = 255
        name = f"{part}/{city}/{city}_000000_000019"
        write(root / f"leftImg8bit/{name}_leftImg8bit.png", encode(colours))
        write(root / f"gtFine/{name}_gtFine_labelIds.png", encode(values))
        write(root / f"gtFine/{name}_gtFine_instanceIds.png", encode(values.astype(np.uint16)))
        write(root / f"gtFine/{name}_gtFine_color.png", encode(colours))
        write(root / f"gtFine/{name}_gtFine_polygons.json", b"{}")
    return root
