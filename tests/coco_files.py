"""Small data sets in COCO's layout."""

import json

import numpy as np
from PIL import Image

CATEGORIES = [{"id": 7, "name": "cat"}, {"id": 3, "name": "dog"}, {"id": 20, "name": "owl"}]
POLYGON = [4.0, 3.0, 12.0, 3.0, 12.0, 9.0, 4.0, 9.0]


def describe_image(identity, width=30, height=20, **more):
    return {"id": identity, "file_name": f"{identity}.jpg", "width": width, "height": height, **more}


def describe_object(identity, image, box=(4, 3, 8, 6), category=3, **more):
    return {
        "id": identity,
        "image_id": image,
        "category_id": category,
        "bbox": list(box),
        "area": 48,
        "iscrowd": 0,
        "segmentation": [POLYGON],
        **more,
    }


def write_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def write_part(root, part, images, annotations, categories=CATEGORIES):
    """Write a JSON file and its images: noise, in the size that the file has."""
    folder = root / f"{part}2017"
    folder.mkdir(parents=True, exist_ok=True)
    for image in images:
        rng = np.random.default_rng([len(part), image["id"]])
        pixels = rng.integers(0, 256, (image["height"], image["width"], 3), np.uint8)
        Image.fromarray(pixels).save(folder / image["file_name"])
    content = {"info": {}, "images": images, "annotations": annotations, "categories": categories}
    write_json(root / f"annotations/instances_{part}2017.json", content)
    return root


def write_set(root):
    """Write six training images of two formats, ids with gaps, and two of evaluation."""
    images = [describe_image(10 * n, *(((30, 20), (20, 30))[n % 2]), note=n) for n in (5, 1, 4, 2, 6, 3)]
    boxes = [describe_object(n, 10 * n, category=(3, 7, 20)[n % 3]) for n in range(1, 7)]
    write_part(root, "train", images, [*boxes, describe_object(8, 10, (1, 1, 3, 3), 20)])
    return write_part(root, "val", [describe_image(1), describe_image(2)], [describe_object(1, 1)])
