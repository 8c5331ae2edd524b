import json

import numpy as np
import pytest

from box_sets import CATEGORY_IDS, CLASSES, SIZE, draw_objects, read_truth
from resnest_imagenet.errors import DataError

NUM_PIXELS = SIZE[0] * SIZE[1]
COUNTS, OF_SIZE = "the counts of its segmentation", f"its size is {SIZE[0]} x {SIZE[1]}"
NOT_LENGTHS = f"{COUNTS} are neither a string nor whole numbers"


def code_of(counts):
    return {"segmentation": {"size": list(SIZE), "counts": counts}}


def test_what_is_read(tmp_path):
    content = draw_objects(0)
    truth = read_truth(tmp_path / "instances.json", content)
    assert truth.classes == CLASSES and truth.masks is None and len(truth) == len(content["annotations"])
    for row, annotation in enumerate(content["annotations"]):
        assert truth.image_ids[truth.images[row]] == annotation["image_id"]
        assert CATEGORY_IDS[truth.labels[row]] == annotation["category_id"]
        assert truth.boxes[row].tolist() == annotation["bbox"] and truth.areas[row] == annotation["area"]
        assert truth.crowds[row] == bool(annotation["iscrowd"])
    assert truth.crowds.any() and truth.size(2) == SIZE
    labels = [truth.labels[row] for row in range(len(truth)) if not truth.crowds[row]]
    assert truth.count_objects().tolist() == [labels.count(label) for label in range(4)]


def test_masks_of_all_forms_are_the_same(tmp_path):
    mask = pytest.importorskip("pycocotools.mask")
    content = draw_objects(0)
    polygons = read_truth(tmp_path / "instances.json", content, masks=True)
    for form in ("text", "lengths"):
        for annotation, code in zip(content["annotations"], polygons.masks, strict=True):
            counts = code.decode()
            if form == "lengths":
                pixels = mask.decode({"size": list(SIZE), "counts": code}).ravel("F")
                edges = np.flatnonzero(np.diff(pixels, prepend=0))
                counts = np.diff(edges, prepend=0, append=pixels.size).tolist()
            annotation["segmentation"] = {"size": list(SIZE), "counts": counts}
        assert read_truth(tmp_path / "other.json", content, masks=True).masks == polygons.masks


def test_two_polygons_are_one_mask(tmp_path):
    content = draw_objects(0)
    content["annotations"][0]["segmentation"] = [[2, 2, 8, 2, 8, 8, 2, 8], [20, 2, 24, 2, 24, 6, 20, 6]]
    del content["annotations"][0]["area"]
    truth = read_truth(tmp_path / "instances.json", content, masks=True)
    assert truth.areas[0] == 6 * 6 + 4 * 4
    assert read_truth(tmp_path / "instances.json", content).areas[0] == np.prod(truth.boxes[0, 2:])


def test_objects_of_other_images_and_categories_are_not_read(tmp_path):
    content = draw_objects(0)
    content["annotations"][1]["image_id"] = 999
    content["annotations"][2]["category_id"] = "disk"
    assert len(read_truth(tmp_path / "instances.json", content)) == len(content["annotations"]) - 2
    del content["annotations"][3]["image_id"]
    with pytest.raises(DataError, match="annotation 4 is not an object with an image_id"):
        read_truth(tmp_path / "instances.json", content)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"bbox": [1, 2, 3]}, "its bbox is not [x, y, width, height]"),
        ({"bbox": [1, 2, 3, None]}, "its bbox is not [x, y, width, height]"),
        ({"bbox": [1, 2, 3, float("nan")]}, "its bbox is not [x, y, width, height]"),
        ({"bbox": None}, "its bbox is not [x, y, width, height]"),
        ({"area": "x"}, "its area is not a number"),
        ({"segmentation": None}, "it has no segmentation"),
        ({"segmentation": []}, "it has no segmentation"),
        ({"segmentation": [["a", "b"]]}, "its segmentation has a polygon that is not a list of x and y"),
        ({"segmentation": [[1, 2]]}, "its segmentation has a polygon that is not a list of x and y"),
        ({"segmentation": {"size": [1, 2], "counts": "a"}}, f"its mask is of an image of [1, 2], not of {list(SIZE)}"),
        (code_of("0\x00"), f"{COUNTS} are damaged, {OF_SIZE}"),
        (code_of("_f3"), f"{COUNTS} are of 3,791 pixels, {OF_SIZE}"),
        (code_of([2, 7]), f"{COUNTS} are of 9 pixels, {OF_SIZE}"),
        (code_of([2**32 + NUM_PIXELS]), f"{COUNTS} are of {2**32 + NUM_PIXELS:,} pixels, {OF_SIZE}"),
        (code_of(5), NOT_LENGTHS),
        (code_of(["a"]), NOT_LENGTHS),
        # NumPy 1 would take it as an unsigned number.
        (code_of([NUM_PIXELS + 5, -5]), NOT_LENGTHS),
    ],
)
def test_a_wrong_object_is_named(tmp_path, change, line):
    content = draw_objects(0)
    content["annotations"][4] |= change
    with pytest.raises(DataError) as error:
        read_truth(tmp_path / "instances.json", content, masks=True)
    assert str(error.value) == f"{tmp_path}/instances.json: annotation 5 (id 4): {line}"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "not JSON: Expecting value"),
        ('{"annotations": [{"id": 1', "not JSON: Expecting"),
        ("[" * 100_000, "not JSON: "),
        ("[]", "it has no list of annotations"),
        ('{"annotations": {}}', "it has no list of annotations"),
        ('{"annotations": [3]}', "annotation 1 is not an object with an image_id"),
        ('{"annotations": []}', "no objects in the 7 images: there is nothing to evaluate"),
        (None, "No such file or directory"),
    ],
)
def test_other_files_are_named(tmp_path, content, reason):
    from resnest_imagenet.evaluation.ground_truth import read_ground_truth

    path = tmp_path / "instances.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataError) as error:
        read_ground_truth(path, np.arange(7), np.ones((7, 2)), CATEGORY_IDS, CLASSES, masks=False)
    assert str(error.value).startswith(f"{path}: {reason}") and "\n" not in str(error.value)


def test_crowds_alone_are_nothing_to_evaluate(tmp_path):
    content = draw_objects(0)
    for annotation in content["annotations"]:
        annotation["iscrowd"] = 1
    with pytest.raises(DataError, match="nothing to evaluate"):
        read_truth(tmp_path / "instances.json", json.loads(json.dumps(content)))
