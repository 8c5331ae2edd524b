"""Drawn objects and detections, as columns and as the files that COCO's tools read."""

import json

import numpy as np

from resnest_imagenet.evaluation.detections import DetectionTable
from resnest_imagenet.evaluation.ground_truth import read_ground_truth

# Neither ascends, and both have gaps: their order is not that of the set.
CATEGORY_IDS = np.array([7, 2, 90, 11])
CLASSES = ("disk", "cross", "=star", "a,\nb")
SIZE = (110, 130)


def draw_box(rng):
    """Draw a box, small, medium or large by COCO's rule, within an image."""
    low, high = ((4, 30), (30, 90), (105, 110))[rng.integers(3)]
    width, height = rng.integers(low, high, 2)
    return [int(rng.integers(SIZE[1] - width + 1)), int(rng.integers(SIZE[0] - height + 1)), int(width), int(height)]


def outline(box, rng):
    """Return a polygon of five corners near those of a box."""
    x, y, width, height = box
    corners = np.array([[0.5, 0], [1, 0.3], [0.9, 1], [0.1, 1], [0, 0.4]]) + rng.uniform(-0.1, 0.1, (5, 2))
    return (corners.clip(0, 1) * (width, height) + (x, y)).round(2).ravel().tolist()


def draw_objects(seed, images=7, objects=30):
    """Draw a file in COCO's form: every area, crowds, images and classes without objects."""
    rng = np.random.default_rng(seed)
    image_ids = rng.permutation(np.arange(images) * 5 + 3)
    annotations = []
    for number in range(objects):
        box = draw_box(rng)
        annotations.append(
            {
                "id": number,  # from 0 on: as pycocotools has it, what fits that object would not be found
                "image_id": int(image_ids[rng.integers(images - 1)]),
                "category_id": int(rng.choice(CATEGORY_IDS[:3])),
                "bbox": box,
                "area": round(float(box[2] * box[3] * rng.uniform(0.9, 1)), 2),
                "iscrowd": int(rng.random() < 0.15),
                "segmentation": [outline(box, rng)],
            }
        )
    return {
        "images": [{"id": int(number), "height": SIZE[0], "width": SIZE[1]} for number in image_ids],
        "categories": [{"id": int(n), "name": name} for n, name in zip(CATEGORY_IDS, CLASSES, strict=True)],
        "annotations": annotations,
    }


def read_truth(path, content, masks=False):
    """Write a file in COCO's form, and read its objects."""
    path.write_text(json.dumps(content))
    image_ids = np.array([image["id"] for image in content["images"]])
    sizes = np.array([(image["height"], image["width"]) for image in content["images"]])
    category_ids = np.array([category["id"] for category in content["categories"]])
    classes = [category["name"] for category in content["categories"]]
    return read_ground_truth(path, image_ids, sizes, category_ids, classes, masks=masks)


def draw_detections(seed, truth, count=120, masks=False, has_ties=True):
    """Draw detections: some near an object, of its class or another, some anywhere."""
    rng = np.random.default_rng([seed, 1])
    rows = []
    for _ in range(count):
        near = int(rng.integers(len(truth)))
        image, label, box = int(truth.images[near]), int(truth.labels[near]), truth.boxes[near].astype(int).tolist()
        if rng.random() < 0.3:
            image, label, box = int(rng.integers(len(truth.image_ids))), int(rng.integers(len(CLASSES))), draw_box(rng)
        elif rng.random() < 0.2:
            label = int(rng.integers(len(CLASSES)))
        shift = int(max(box[2:]) * 0.15) + 1
        box = (np.array(box) + rng.integers(-shift, shift + 1, 4)).clip([0, 0, 1, 1]).astype(float)
        score = rng.integers(1, 12) / 12 if has_ties else rng.random()
        rows.append((image, label, *box, score))
    table = np.array(sorted(rows, key=lambda row: row[0]))
    codes = tuple(_code(box.tolist(), rng) for box in table[:, 2:6]) if masks else None
    images, labels = table[:, :2].T.astype(np.int64)
    return DetectionTable(images, table[:, 2:6], table[:, 6], labels, codes)


def _code(box, rng):
    from pycocotools import mask

    return mask.merge(mask.frPyObjects([outline(box, rng)], *SIZE))["counts"]
