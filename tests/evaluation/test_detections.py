import hashlib
import json
import math
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from box_sets import SIZE, draw_objects, read_truth
from coco_files import describe_image, describe_object, write_part
from conftest import ALONE
from forked import compute_on_ranks
from resnest_imagenet.data.coco import open_coco
from resnest_imagenet.data.instance_geometry import InstanceTransform
from resnest_imagenet.data.instance_loader import InstanceLoader
from resnest_imagenet.data.plan import plan_evaluation
from resnest_imagenet.errors import DataError, NonFiniteError
from resnest_imagenet.evaluation.boxes import measure_boxes
from resnest_imagenet.evaluation.detections import bring_back, detect_over_ranks, encode_results, read_results
from resnest_imagenet.evaluation.ground_truth import open_ground_truth
from resnest_imagenet.instances import Detections, Target
from resnest_imagenet.models.zoo import find_pixels

SHOWN = (64, 80)  # the size that images of SIZE are shown in
PADDED = (64, 96)
NUM_IMAGES = 7


class Detector(nn.Module):
    """What it finds depends on all pixels of an image; nothing in the last one, of which the mean is the highest."""

    def __init__(self, masks=True):
        super().__init__()
        self.masks = masks
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, images, sizes):
        assert not self.training and images.shape[1:] == (3, *PADDED)
        return [self.find(image, *size) for image, size in zip(images, sizes, strict=True)]

    def find(self, image, height, width):
        seed = int(image.sum() * 1000)
        rng = np.random.default_rng(seed)
        count = 0 if image.max() > NUM_IMAGES - 1 else 12
        corners = rng.uniform(-5, 60, (count, 2))
        boxes = np.concatenate([corners, corners + rng.uniform(1, 40, (count, 2))], 1).astype(np.float32)
        scores = np.sort(rng.integers(1, 9, count) / 9)[::-1].astype(np.float32).copy()
        masks = torch.from_numpy(rng.random((count, 28, 28), np.float32)) if self.masks else None
        labels = torch.from_numpy(rng.integers(0, 3, count))
        return Detections(torch.from_numpy(boxes) * self.scale, torch.from_numpy(scores), labels, masks)


class Batches:
    """A loader of an evaluation, two images a batch; the pixels of an image are its index, and noise."""

    def __init__(self, rank=0, world_size=1, num_images=NUM_IMAGES, shown=NUM_IMAGES):
        self.plan = plan_evaluation(num_images, 2, rank, world_size)
        self._shown = shown

    def batches(self, epoch, start=0):
        for samples in self.plan.batches(epoch, start):
            indices = [index for index in samples.tolist() if index < self._shown]
            if indices:
                images = torch.stack([self._draw(index) for index in indices])
                empty = (torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
                yield images, [Target(index, SHOWN, SIZE, *empty) for index in indices]

    def _draw(self, index):
        return index + torch.rand(3, *PADDED, generator=torch.Generator().manual_seed(index)) / 2


def columns(table):
    arrays = (table.images, table.boxes, table.scores, table.labels)
    return [array.tolist() for array in arrays] + [table.masks]


def read_objects(folder):
    """Read objects of which the detector finds some: each third of its boxes, somewhat larger."""
    content = draw_objects(0, NUM_IMAGES)
    table = detect_over_ranks(Detector(masks=False), Batches(), ALONE)
    for image, (x, y, width, height), label in zip(table.images[::3], table.boxes[::3], table.labels[::3], strict=True):
        annotation = dict(content["annotations"][0], id=len(content["annotations"]), iscrowd=0)
        annotation |= {"image_id": content["images"][image]["id"], "category_id": content["categories"][label]["id"]}
        annotation |= {"bbox": [x, y, width * 1.1, height], "area": width * height}
        annotation["segmentation"] = [[x, y, x + width, y, x + width, y + height, x, y + height]]
        content["annotations"].append(annotation)
    return read_truth(folder / "instances.json", content, masks=True)


def measure_on_rank(ranks, truth):
    calls = []

    def before_batch(*call):
        calls.append(call)

    loader = Batches(ranks.rank, ranks.world_size)
    scores = measure_boxes(Detector(), loader, ranks, truth, before_batch=before_batch, masks=True)
    content = repr(columns(scores.detections)).encode()  # of no more than a pipe holds, which is read at the end
    return hashlib.sha256(content).hexdigest(), scores.values(), calls


@pytest.mark.process
@pytest.mark.slow
def test_any_number_of_ranks(tmp_path):
    truth = read_objects(tmp_path)
    alone = measure_on_rank(ALONE, truth)
    assert alone[2] == [(number, True) for number in range(4)]
    assert alone[1]["box_ap50"] > 5 and alone[1]["mask_ap50"] > 0
    for world_size in (2, 3):
        results = compute_on_ranks(partial(measure_on_rank, truth=truth), world_size)
        for rank, (table, values, calls) in enumerate(results):
            assert (table, values) == alone[:2]
            assert calls == [(batch, batch < 4 // world_size) for batch in range(len(range(rank, 4, world_size)))]


def test_a_rank_that_finds_nothing_has_its_share():
    table = detect_over_ranks(Detector(), Batches(num_images=1), ALONE)
    assert len(table) and set(table.images) == {0}
    shown = Batches(num_images=7)
    table = detect_over_ranks(Detector(masks=False), shown, ALONE)
    assert table.masks is None and set(table.images.tolist()) == set(range(6))
    assert len(table.of_image(6)) == 0 and len(table.of_image(2)) == (table.images == 2).sum()


def test_what_stands_in_the_table():
    """In pixels of the image as it was: clipped to it, without boxes that have no area there, in order."""
    detector = Detector(masks=False).eval()
    table = detect_over_ranks(detector, Batches(), ALONE)
    assert (np.diff(table.images) >= 0).all()
    for index in range(NUM_IMAGES):
        image = Batches()._draw(index)
        rows = []
        found = detector.find(image, *SHOWN)
        for box, score, label in zip(found.boxes.tolist(), found.scores.tolist(), found.labels.tolist(), strict=True):
            x1, x2 = (min(max(value * SIZE[1] / SHOWN[1], 0), SIZE[1]) for value in box[::2])
            y1, y2 = (min(max(value * SIZE[0] / SHOWN[0], 0), SIZE[0]) for value in box[1::2])
            if x2 > x1 and y2 > y1:
                rows.append((x1, y1, x2 - x1, y2 - y1, score, label))
        found = table.of_image(index)
        actual = np.concatenate([found.boxes, found.scores[:, None], found.labels[:, None]], 1)
        np.testing.assert_allclose(actual, np.array(rows).reshape(-1, 6), atol=1e-4)


def test_masks_belong_to_their_boxes():
    table = detect_over_ranks(Detector(), Batches(), ALONE)
    mask = pytest.importorskip("pycocotools.mask")
    assert len(table.masks) == len(table)
    for code, corners in zip(table.masks, table.corners, strict=True):
        x, y, width, height = mask.toBbox({"size": list(SIZE), "counts": code})
        if width and height:
            assert corners[0] - 1 <= x and x + width <= corners[2] + 1
            assert corners[1] - 1 <= y and y + height <= corners[3] + 1


def test_boxes_of_no_area_are_dropped_with_their_masks():
    boxes = torch.tensor([[-9.0, -9, -1, -1], [1, 2, 5, 6], [3, 3, 3, 9], [90, 0, 99, 5]])
    masks = torch.arange(4.0)[:, None, None].expand(4, 28, 28)
    found = bring_back(Detections(boxes, torch.ones(4), torch.arange(4), masks), (10, 50), original=(20, 100))
    assert found.boxes.tolist() == [[2, 4, 10, 12]] and found.labels.tolist() == [1]
    assert found.masks.shape == (1, 28, 28) and found.masks[0, 0, 0] == 1


def test_a_missing_image_is_an_error():
    with pytest.raises(RuntimeError, match="evaluated 6 images of 7"):
        detect_over_ranks(Detector(), Batches(shown=6), ALONE)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_named(value):
    detector = Detector()
    detector.scale.data.fill_(value)
    with pytest.raises(NonFiniteError, match="^image 0: its logits are not finite in fp32, like those of 6 of 7"):
        detect_over_ranks(detector, Batches(), ALONE, name="image {}".format)


GOOD = {"image_id": 3, "category_id": 7, "bbox": [1, 2, 3, 4], "score": 0.5}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "Expecting value"),
        ("{", "Expecting"),
        ('{"a": 1}', "string indices"),
        ("[1]", "not subscriptable"),
        (json.dumps([GOOD | {"image_id": 999}]), "the set has no image_id 999"),
        (json.dumps([GOOD | {"category_id": 1}]), "the set has no category_id 1"),
        (json.dumps([GOOD | {"score": "x"}]), "could not convert"),
        (json.dumps([{key: GOOD[key] for key in ("image_id", "category_id", "score")}]), "no 'bbox'"),
        (json.dumps([GOOD | {"segmentation": {"size": [1, 2], "counts": "a"}}]), "the mask of image_id 3 is of"),
    ],
)
def test_other_files_are_named(tmp_path, content, reason):
    truth = read_objects(tmp_path)
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(DataError, match=r"results.json: not COCO's results of this set \(.*" + reason):
        read_results(tmp_path / "results.json", truth)


def test_no_results(tmp_path):
    truth = read_objects(tmp_path)
    (tmp_path / "results.json").write_text("[]")
    table = read_results(tmp_path / "results.json", truth)
    assert len(table) == 0 and encode_results(table, truth, "box") == b"[]\n"


class Oracle(nn.Module):
    """Finds all objects of a set that are no crowds, in order, as they are shown."""

    def __init__(self, instances):
        super().__init__()
        self._instances = instances
        self._next = 0

    def forward(self, images, sizes):
        found = []
        for height, width in sizes:
            boxes, labels, masks = self._instances.objects(self._next)
            original = torch.from_numpy(self._instances.sizes[self._next])
            scales = torch.tensor([width, height, width, height]) / original.flip(0).repeat(2)
            assert masks is not None
            full = torch.ones(len(boxes), 28, 28)
            found.append(Detections(torch.from_numpy(boxes) * scales, full[:, 0, 0], torch.from_numpy(labels), full))
            self._next += 1
        return found


def test_the_whole_path_from_files(tmp_path):
    """Images of two formats, scaled up; crowds and boxes of no area are in the file, and what fits scores 100."""
    annotations = [
        describe_object(3, 10),
        describe_object(4, 10, (1, 1, 3, 3), 20, iscrowd=1),
        describe_object(5, 20, (2, 3, 11, 7), 7, area=77),
        describe_object(6, 40, (5, 5, 8, 12), 7, area=96),
    ]
    for annotation in annotations:
        x, y, width, height = annotation["bbox"]
        annotation["segmentation"] = [[x, y, x + width, y, x + width, y + height, x, y + height]]
    images = [describe_image(number, *size) for number, size in ((40, (20, 33)), (10, (30, 20)), (20, (31, 21)))]
    instances = open_coco(str(write_part(tmp_path, "val", images, annotations)), "val", masks=True)
    plan = plan_evaluation(len(instances), 2, 0, 1)
    transform = InstanceTransform(0, (48,), 70, flip=0)
    loader = InstanceLoader(instances, plan, transform, torch.device("cpu"), find_pixels("resnest50"), workers=0)
    truth = open_ground_truth(instances, masks=True)
    assert len(truth) == 4 and truth.crowds.sum() == 1
    scores = measure_boxes(Oracle(instances), loader, ALONE, truth, name=instances.images.name, masks=True)
    for name in ("box_ap", "mask_ap", "box_ar100", "mask_ar1"):
        assert scores.values()[name] == pytest.approx(100)
    table = scores.detections
    np.testing.assert_allclose(table.boxes, [[4, 3, 8, 6], [2, 3, 11, 7], [5, 5, 8, 12]], atol=1e-4)
    assert truth.image_ids[table.images].tolist() == [10, 20, 40]
