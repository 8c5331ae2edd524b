"""The demo objects: sound, the same for a seed, and their boxes and masks where the shapes are."""

import hashlib
import json

import numpy as np
import pytest
from PIL import Image

from resnest_imagenet.data.coco import open_coco
from resnest_imagenet.data.demo_objects import SHAPES, draw_objects, encode_runs, fill_shape, write_demo_objects
from resnest_imagenet.errors import DataError


def test_writes_a_set_that_can_be_opened(tmp_path):
    codec = pytest.importorskip("pycocotools.mask")
    assert write_demo_objects(tmp_path / "demo", 0, train_images=20, val_images=8)
    for part, count in (("train", 20), ("val", 8)):
        instances = open_coco(str(tmp_path / "demo"), part, masks=True)
        assert (len(instances), instances.classes, instances.images.notes) == (count, SHAPES, ())
        for index in range(count):
            picture = instances.read(index)
            assert min(picture.size) >= 104 and max(picture.size) <= 136
            boxes, _, masks = instances.objects(index)
            for box, mask in zip(boxes.tolist(), masks, strict=True):
                left, top, width, height = codec.toBbox(mask).tolist()
                assert box == [left, top, left + width, top + height]
        content = json.loads(instances.json.read_text())
        areas = [annotation["area"] for annotation in content["annotations"]]
        assert areas == [codec.area(mask) for mask in instances.masks]
        assert [annotation["id"] for annotation in content["annotations"]] == list(range(1, len(areas) + 1))


def test_shapes_cover_one_another_but_none_is_hidden_and_all_classes_are_alike_often():
    counts, pairs = np.zeros(len(SHAPES)), 0
    for number in range(60):
        _, objects = draw_objects(np.random.default_rng(number))
        masks = np.array([drawn.mask for drawn in objects])
        assert 1 <= len(objects) <= 4 and masks.sum(0).max() == 1 and masks.sum((1, 2)).min() > 20
        counts += np.bincount([drawn.label for drawn in objects], minlength=len(SHAPES))
        boxes = [(np.flatnonzero(mask.any(1))[[0, -1]], np.flatnonzero(mask.any(0))[[0, -1]]) for mask in masks]
        pairs += sum(
            all(one[axis][0] <= other[axis][1] and other[axis][0] <= one[axis][1] for axis in (0, 1))
            for place, one in enumerate(boxes)
            for other in boxes[:place]
        )
    assert 2.2 < counts.sum() / 60 < 3.0 and counts.min() > 0.5 * counts.max() and pairs > 30


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_fills_its_square_and_lies_within_reach(name):
    y, x = np.mgrid[-1.6:1.6:97j, -1.6:1.6:97j]
    inside = fill_shape(name, x, y)
    assert inside[48, 48] and 0.12 < inside.mean() < 0.4 and not inside[np.hypot(x, y) > 1.5].any()


def test_runs_are_what_pycocotools_reads():
    codec = pytest.importorskip("pycocotools.mask")
    rng = np.random.default_rng(0)
    patterns = [rng.random((7, 9)) < share for share in (0.1, 0.5, 0.9)]
    for mask in [*patterns, np.ones((3, 4), bool), np.arange(12).reshape(3, 4) == 0]:
        code = encode_runs(mask)
        assert sum(code["counts"]) == mask.size
        assert np.array_equal(codec.decode(codec.frPyObjects(code, *mask.shape)), mask)


def test_is_deterministic_by_seed_and_differs_between_parts(tmp_path):
    def digest(name):
        files = sorted(path for path in (tmp_path / name).rglob("*") if path.suffix in (".JPEG", ".json"))
        return hashlib.sha256(b"".join(path.read_bytes() for path in files[:-1])).hexdigest()

    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_demo_objects(tmp_path / name, seed, train_images=2, val_images=1)
    assert digest("a") == digest("b") != digest("c")
    first = [Image.open(tmp_path / f"a/{part}2017/objects_1_00000.JPEG") for part in ("train", "val")]
    assert first[0].tobytes() != first[1].tobytes()
    assert not write_demo_objects(tmp_path / "a", 1, train_images=2, val_images=1)
    with pytest.raises(DataError, match="not empty"):
        write_demo_objects(tmp_path / "a", 1, train_images=3, val_images=1)
