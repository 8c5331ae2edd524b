"""COCO's layout: what is read, what is skipped, and what is refused in one line."""

import json
import tracemalloc

import numpy as np
import pytest
from PIL import Image

from coco_files import CATEGORIES, POLYGON, describe_image, describe_object, write_json, write_part, write_set
from resnest_imagenet.data.coco import open_coco, require_separate_images
from resnest_imagenet.data.coco_json import read_coco
from resnest_imagenet.errors import DataError

IMAGES = [describe_image(1), describe_image(2)]


def fail(root, part="train", **options):
    with pytest.raises(DataError) as caught:
        open_coco(str(root), part, **options)
    line = str(caught.value)
    assert "\n" not in line
    return line.replace(str(root), "ROOT")


def test_reads_images_by_id_with_their_objects(tmp_path):
    instances = open_coco(str(write_set(tmp_path)), "train")
    assert instances.classes == ("dog", "cat", "owl") and instances.category_ids.tolist() == [3, 7, 20]
    assert instances.image_ids.tolist() == [10, 20, 30, 40, 50, 60]
    assert instances.sizes.tolist() == [[30, 20], [20, 30]] * 3
    assert instances.groups.tolist() == [0, 1, 0, 1, 0, 1]
    assert instances.first.tolist() == [0, 2, 3, 4, 5, 6, 7]
    boxes, labels, masks = instances.objects(0)
    assert boxes.tolist() == [[4, 3, 12, 9], [1, 1, 4, 4]] and labels.tolist() == [1, 2] and masks is None
    assert boxes.dtype == np.float32 and labels.dtype == np.int64
    assert instances.images.name(0) == str(tmp_path / "train2017/10.jpg") and instances.images.notes == ()
    assert instances.read(0).size == (20, 30)
    assert instances.json == tmp_path / "annotations/instances_train2017.json"


def test_training_skips_what_detectron2_skips_and_evaluation_keeps_every_image(tmp_path):
    annotations = [
        describe_object(1, 1),
        describe_object(2, 1, iscrowd=1, segmentation={"size": [20, 30], "counts": [0, 600]}),
        describe_object(3, 1, (4, 3, 0, 6)),  # no area
        describe_object(4, 1, (30, 3, 5, 5)),  # outside
        describe_object(5, 1, (-2, -3, 4, 40)),  # over the edges
        describe_object(6, 2, iscrowd=1),
        describe_object(7, 3, (5, 5, -3, 2)),
        describe_object(8, 99),  # of no image
    ]
    images = [describe_image(number) for number in (1, 2, 3, 4)]
    for part in ("train", "val"):
        write_part(tmp_path, part, images, annotations)
    train, val = (open_coco(str(tmp_path), part) for part in ("train", "val"))
    assert train.image_ids.tolist() == [1] and val.image_ids.tolist() == [1, 2, 3, 4]
    assert train.boxes.tolist() == val.boxes.tolist() == [[4, 3, 12, 9], [0, 0, 2, 20]]
    assert val.first.tolist() == [0, 2, 2, 2, 2]
    skipped = "2 crowds, 3 boxes of no area, 1 annotations of images that are not listed"
    path = tmp_path / "annotations/instances_train2017.json"
    assert train.images.notes == (f"{path}: skipped: {skipped}, 3 images without objects",)
    assert val.images.notes[0].endswith(skipped)


def test_a_file_without_an_object_that_can_be_used_is_named_with_what_is_skipped(tmp_path):
    annotations = [describe_object(1, 1, iscrowd=1), describe_object(2, 2, (30, 3, 5, 5))]
    line = fail(write_part(tmp_path, "train", IMAGES, annotations))
    skipped = "skipped: 1 crowds, 1 boxes of no area, 2 images without objects"
    assert line == f"ROOT/annotations/instances_train2017.json: no images with objects that can be used ({skipped})"
    write_part(tmp_path, "train", [], [])
    assert fail(tmp_path) == "ROOT/annotations/instances_train2017.json: no images"


def test_masks_are_polygons_or_run_length_codes(tmp_path):
    mask = pytest.importorskip("pycocotools.mask")
    pixels = np.zeros((20, 30), np.uint8, order="F")
    pixels[3:9, 4:12] = 1
    code = mask.encode(pixels)
    annotations = [
        describe_object(1, 1, segmentation=[POLYGON, [1, 2], [1.5] * 7, [20, 1, 25, 1, 25, 6.25]]),
        describe_object(2, 1, segmentation={"size": [20, 30], "counts": code["counts"].decode()}),
        describe_object(3, 1, segmentation={"size": [20, 30], "counts": [83, 6, 14, 6, 491]}),
        describe_object(4, 1, segmentation=[[1, 2, 3, 4]]),
        describe_object(5, 1, segmentation=[]),
    ]
    instances = open_coco(str(write_part(tmp_path, "train", IMAGES, annotations)), "train", masks=True)
    polygons, compressed, runs = instances.objects(0)[2]
    assert [polygon.tolist() for polygon in polygons] == [POLYGON, [20, 1, 25, 1, 25, 6.25]]
    assert polygons[0].dtype == np.float64
    assert np.array_equal(mask.decode(compressed), pixels)
    expected = np.zeros(600, np.uint8)
    expected[[*range(83, 89), *range(103, 109)]] = 1
    assert np.array_equal(mask.decode(runs).ravel(order="F"), expected)
    assert instances.images.notes[0].endswith("skipped: 2 objects of no mask, 1 images without objects")


OBJECTS = {
    "no id": ({"id": ...}, "annotations[1]: no id (a whole number)"),
    "id": ({"id": "x"}, "annotations[1]: id='x' is not a whole number"),
    "huge id": ({"id": 2**64}, "is not a whole number"),
    "image id": ({"image_id": 1.5}, "annotations[1]: annotation 2: image_id=1.5 is not a whole number"),
    "no image id": ({"image_id": ...}, "annotations[1]: not an object with an image_id"),
    "category": ({"category_id": None}, "annotation 2: category_id=None is not a whole number"),
    "missing category": ({"category_id": 4}, "annotation 2: no category has its category_id=4"),
    "no box": ({"bbox": ...}, "annotation 2: no bbox (four numbers: x, y, width, height)"),
    "box of strings": ({"bbox": ["1", 2, 3, 4]}, "bbox=['1', 2, 3, 4] is not four numbers"),
    "short box": ({"bbox": [1, 2, 3]}, "bbox=[1, 2, 3] is not four numbers"),
    "box of nan": ({"bbox": [1, 2, float("nan"), 3]}, "bbox=[1, 2, nan, 3] is not in pixels"),
    "crowd": ({"iscrowd": "no"}, "annotation 2: iscrowd='no' is not 0 or 1"),
    "no segmentation": ({"segmentation": ...}, "annotation 2: no segmentation, which masks need: train.masks=false"),
    "segmentation": ({"segmentation": "x"}, "annotation 2: its segmentation is neither lists of numbers"),
    "flat polygon": ({"segmentation": POLYGON}, "annotation 2: its segmentation is neither lists of numbers"),
    "polygon of strings": ({"segmentation": [["1"] * 6]}, "its segmentation is neither lists of numbers"),
    "polygon of nan": ({"segmentation": [[float("inf"), *POLYGON[1:]]]}, "its segmentation has nan or infinity"),
    "mask of no size": ({"segmentation": {"counts": [600]}}, "the size of its segmentation is not [height, width]"),
    "mask of no counts": ({"segmentation": {"size": [20, 30]}}, "the counts of its segmentation are neither"),
    "short counts": ({"segmentation": {"size": [20, 30], "counts": [5, 5]}}, "are of 10 pixels, its size is 20 x 30"),
    "negative counts": (
        {"segmentation": {"size": [20, 30], "counts": [-5, 605]}},
        "neither a string nor whole numbers",
    ),
    "damaged counts": ({"segmentation": {"size": [20, 30], "counts": "oooo"}}, "are damaged, its size is 20 x 30"),
    "empty counts": ({"segmentation": {"size": [20, 30], "counts": ""}}, "are damaged, its size is 20 x 30"),
    "turned mask": ({"segmentation": {"size": [30, 20], "counts": [600]}}, "its mask is 30 x 20, its image 20 x 30"),
    "duplicate": ({"id": 1}, "2 annotations have the id 1"),
}


@pytest.mark.parametrize("case", OBJECTS)
def test_an_annotation_that_cannot_be_used_is_named(case, tmp_path):
    pytest.importorskip("pycocotools")
    change, expected = OBJECTS[case]
    annotation = {key: value for key, value in (describe_object(2, 1) | change).items() if value is not ...}
    write_part(tmp_path, "train", IMAGES, [describe_object(1, 2), annotation, describe_object(3, 1)])
    line = fail(tmp_path, masks=True)
    assert line.startswith("ROOT/annotations/instances_train2017.json: ") and expected in line


def test_only_faults_that_the_check_lists_are_left_to_it(tmp_path):
    """It needs no masks: a data set of boxes alone has no segmentations."""
    pytest.importorskip("pycocotools")
    annotations = [describe_object(number, 1) for number in range(1, 5)]
    for annotation in annotations[1:]:
        del annotation["segmentation"]
    write_part(tmp_path, "train", IMAGES, annotations)
    path = "ROOT/annotations/instances_train2017.json"
    line = "no segmentation, which masks need: train.masks=false trains boxes alone (and 2 more)"
    assert fail(tmp_path, masks=True) == f"{path}: annotations[1]: annotation 2: {line}"
    for number in (0, 3):
        annotations[number]["category_id"] = 4
        annotations[number]["segmentation"] = [POLYGON]
    write_part(tmp_path, "train", IMAGES, annotations)
    line = "annotation 1: no category has its category_id=4 (and 1 more: resnest-data check lists them)"
    assert fail(tmp_path, masks=True) == f"{path}: {line}"


@pytest.mark.parametrize("key", ["area", "iscrowd"])
def test_only_the_evaluation_needs_area_and_iscrowd(key, tmp_path):
    annotation = describe_object(2, 1)
    del annotation[key]
    for part in ("train", "val"):
        write_part(tmp_path, part, IMAGES, [annotation])
    assert len(open_coco(str(tmp_path), "train").boxes) == 1
    assert f"annotations[0]: annotation 2: no {key} (a number, which the evaluation needs)" in fail(tmp_path, "val")


def change_image(**change):
    return {"images": [IMAGES[0], {key: value for key, value in (IMAGES[1] | change).items() if value is not ...}]}


FILES = {
    "images without id": (change_image(id=...), "images[1]: no id (a whole number)"),
    "images with a wrong name": (change_image(file_name=5), "images[1]: image 2: file_name=5 is not a name"),
    "images without height": (change_image(height=0), "images[1]: image 2: height=0 is not a number of pixels"),
    "images of strings": ({"images": ["a.jpg"]}, "images[0]: not an object"),
    "an image twice": (change_image(id=1), "2 images have the id 1"),
    "a file twice": (change_image(file_name="1.jpg"), "2 images have the file_name 1.jpg"),
    "no images": ({"images": ...}, "no list of images: not in COCO's layout; set data.train_json or data.val_json"),
    "images in an object": ({"images": {}}, "no list of images: not in COCO's layout"),
    "no two lists": ({"images": ..., "categories": ...}, "no list of images and none of categories"),
    "no categories": ({"categories": []}, "categories: none"),
    "category without name": ({"categories": [{"id": 3}]}, "categories[0]: no name (a name)"),
    "category twice": ({"categories": [*CATEGORIES, {"id": 3, "name": "x"}]}, "categories[3]: id=3 is there twice"),
    "name twice": ({"categories": [*CATEGORIES, {"id": 4, "name": "dog"}]}, "categories[3]: name=dog is there twice"),
}


@pytest.mark.parametrize("case", FILES)
def test_a_list_that_cannot_be_used_is_named(case, tmp_path):
    change, expected = FILES[case]
    write_part(tmp_path, "train", IMAGES, [describe_object(1, 2)])
    path = tmp_path / "annotations/instances_train2017.json"
    content = json.loads(path.read_text()) | change
    write_json(path, {key: value for key, value in content.items() if value is not ...})
    assert expected in fail(tmp_path)


TEXTS = {
    "empty": ("", "is empty"),
    "a list": ("[]", "not in COCO's layout: no object with images, annotations, categories: results of a detector"),
    "a number": ("5", "not in COCO's layout: no object with images, annotations, categories"),
    "no JSON": ("<html>", "not JSON (Expecting value) (line 1, character 1)"),
    "more than JSON": ('{"images": []} x', "not JSON (Extra data) (line 1, character 16)"),
    "deep": ("[" * 200_000, "nested too deeply"),
}


@pytest.mark.parametrize("case", TEXTS)
def test_a_file_that_is_no_such_file_is_named(case, tmp_path):
    text, expected = TEXTS[case]
    write_part(tmp_path, "train", IMAGES, [])
    write_json(tmp_path / "annotations/instances_train2017.json", text)
    assert expected in fail(tmp_path)


def test_a_file_that_is_cut_off_anywhere_is_named(tmp_path):
    write_part(tmp_path, "train", IMAGES, [describe_object(1, 2)])
    path = tmp_path / "annotations/instances_train2017.json"
    whole = path.read_text()
    for length in range(1, len(whole) - 1, 7):
        path.write_text(whole[:length])
        assert "ends too early: is it cut off?" in fail(tmp_path), whole[:length]
    path.write_bytes(whole.encode("utf-16"))
    assert "no text in UTF-8 (byte 0)" in fail(tmp_path)
    path.write_text("\ufeff" + whole)  # as some editors begin a file
    assert len(open_coco(str(tmp_path), "train")) == 1


def test_missing_folders_and_files_are_named_with_the_option(tmp_path):
    write_set(tmp_path)
    (tmp_path / "train2017/30.jpg").unlink()
    (tmp_path / "train2017/50.jpg").unlink()
    line = "ROOT/train2017/30.jpg: no such file, but an image of ROOT/annotations/instances_train2017.json (and 1 more"
    assert fail(tmp_path).startswith(line)
    assert "set data.val_dir" in fail(tmp_path, "val", images="nowhere")
    line = fail(tmp_path, json="wrong.json")
    assert line == "ROOT/wrong.json: no such file (no .json in ROOT); set data.train_json"
    (tmp_path / "annotations/instances_val2017.json").unlink()
    line = fail(tmp_path, "val")
    assert "no such file (in ROOT/annotations: instances_train2017.json); set data.val_json" in line
    assert "no such folder" in fail(tmp_path / "nowhere")


def test_any_names_of_files_and_folders(tmp_path):
    write_set(tmp_path)
    (tmp_path / "train2017").rename(tmp_path / "pictures")
    (tmp_path / "pictures/a").mkdir()
    (tmp_path / "pictures/10.jpg").rename(tmp_path / "pictures/a/10.jpg")
    path = tmp_path / "annotations/instances_train2017.json"
    content = json.loads(path.read_text().replace('"10.jpg"', '"a/10.jpg"'))
    write_json(tmp_path / "own.json", content)
    instances = open_coco(str(tmp_path), "train", "own.json", "pictures")
    assert instances.images.name(0).endswith("pictures/a/10.jpg")
    assert instances.read(0).size == (20, 30)
    again = open_coco(str(tmp_path), "train", str(tmp_path / "own.json"), str(tmp_path / "pictures"))
    assert again.digest() == instances.digest()


def test_parts_may_share_a_folder_but_no_image(tmp_path):
    write_set(tmp_path)
    train, val = (open_coco(str(tmp_path), part) for part in ("train", "val"))
    require_separate_images(train, val)
    write_part(tmp_path, "train", [*IMAGES, describe_image(3)], [describe_object(1, 2), describe_object(2, 3)])
    write_json(tmp_path / "val.json", {"images": IMAGES[1:], "annotations": [], "categories": CATEGORIES})
    train = open_coco(str(tmp_path), "train")
    with pytest.raises(DataError, match=r"2\.jpg: of 1 images in both .*train2017.json and .*val.json"):
        require_separate_images(train, open_coco(str(tmp_path), "val", "val.json", "train2017"))


def test_an_image_of_another_size_is_bad_and_exif_is_applied(tmp_path):
    write_part(
        tmp_path, "train", [describe_image(1), describe_image(2)], [describe_object(1, 1), describe_object(2, 2)]
    )
    exif = Image.Exif()
    exif[0x0112] = 6
    lying = Image.new("RGB", (20, 30))
    lying.paste((255, 255, 255), (0, 0, 20, 10))
    lying.save(tmp_path / "train2017/1.jpg", exif=exif, quality=95)
    lying.save(tmp_path / "train2017/2.jpg")
    instances = open_coco(str(tmp_path), "train")
    picture = instances.read(0)
    assert picture.size == (30, 20) and picture.getpixel((25, 5))[0] > 200
    assert picture.getpixel((5, 5))[0] < 50
    assert instances.name_fault(0) is None
    fault = instances.name_fault(1)
    assert fault.endswith("2.jpg: 20 x 30 pixels, in instances_train2017.json 30 x 20")


def test_the_digest_is_of_all_objects(tmp_path):
    pytest.importorskip("pycocotools")
    annotations = [describe_object(1, 1), describe_object(2, 2)]

    def digest(**change):
        annotations[1] = describe_object(2, 2, **change)
        return open_coco(str(write_part(tmp_path, "train", IMAGES, annotations)), "train", masks=True).digest()

    digests = [digest(), digest(box=(4, 3, 8, 5)), digest(category=7), digest(segmentation=[[1.0, *POLYGON[1:]]])]
    assert len(set(digests)) == 4 and digest() == digests[0]


def test_reading_takes_little_more_memory_than_the_text(tmp_path):
    """The figures of a file of 490 MB stand in coco_json.py; objects of all of it would take 7 times its size."""
    polygon = [round(number * 1.37 % 500, 2) for number in range(60)]
    annotations = [describe_object(number, 1 + number % 2, segmentation=[polygon]) for number in range(1, 3001)]
    write_part(tmp_path, "train", IMAGES, annotations)
    path = tmp_path / "annotations/instances_train2017.json"
    tracemalloc.start()
    file = read_coco(path, masks=True)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(file.masks) == 3000 and peak < 2.5 * path.stat().st_size, peak
