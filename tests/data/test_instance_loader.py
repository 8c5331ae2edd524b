"""The loader of images with objects: by the contract, the same for any workers, ranks and first batch."""

import os
from errno import EIO

import numpy as np
import pytest
import torch

from coco_files import POLYGON, describe_image, describe_object, write_part, write_set
from conftest import CPU
from resnest_imagenet.data import reading
from resnest_imagenet.data.coco import open_coco
from resnest_imagenet.data.folder import ImageFolder
from resnest_imagenet.data.instance_geometry import InstanceTransform
from resnest_imagenet.data.instance_loader import InstanceLoader, pad_images, restore_pixels
from resnest_imagenet.data.plan import BatchPlan, plan_evaluation
from resnest_imagenet.errors import DataError, LoadingError
from resnest_imagenet.models.zoo import find_pixels

pytestmark = pytest.mark.process
TRAIN = InstanceTransform(5, tuple(range(40, 61)), longest=80)
VAL = InstanceTransform(5, (50,), longest=80, flip=0.0)
RGB, MSRA = find_pixels("resnest50"), find_pixels("resnet50_msra")
BAD = (2, 5, 6)
NUM_IMAGES = 14


@pytest.fixture
def root(tmp_path):
    """14 images of two formats, with one or two objects."""
    images = [describe_image(n + 1, *((30 + n, 20) if n % 3 else (20, 30 + n))) for n in range(NUM_IMAGES)]
    objects = [describe_object(n + 1, n + 1, category=(3, 7)[n % 2]) for n in range(NUM_IMAGES)]
    more = [describe_object(100 + n, n + 1, (1, 1, 6, 5), 20) for n in range(0, NUM_IMAGES, 2)]
    return write_part(tmp_path, "train", images, [*objects, *more])


@pytest.fixture
def instances(root):
    return open_coco(str(root), "train")


def train_on(instances, workers=0, rank=0, world_size=1, max_errors=0, pixels=RGB):
    num_batches = len(instances) // 3
    plan = BatchPlan(len(instances), 3, num_batches, rank, world_size, shuffle=True, seed=1, groups=instances.groups)
    return InstanceLoader(instances, plan, TRAIN, CPU, pixels, workers, max_errors)


def assert_equal(batches, expected):
    for (images, targets), (expected_images, expected_targets) in zip(batches, expected, strict=True):
        assert torch.equal(images, expected_images)
        for target, other in zip(targets, expected_targets, strict=True):
            assert (target.index, target.size, target.original) == (other.index, other.size, other.original)
            assert torch.equal(target.boxes, other.boxes) and torch.equal(target.labels, other.labels)


@pytest.mark.parametrize("pixels", [RGB, MSRA])
def test_training_yields_padded_batches_by_the_contract(instances, pixels):
    loader = train_on(instances, pixels=pixels)
    seen = []
    for (images, targets), indices in zip(loader.batches(1), loader.plan.batches(1), strict=True):
        assert images.dtype == torch.float32 and images.is_contiguous(memory_format=torch.channels_last)
        height, width = (max(target.size[side] for target in targets) for side in (0, 1))
        assert images.shape == (3, 3, -(-height // 32) * 32, -(-width // 32) * 32)
        assert [target.index for target in targets] == indices.tolist()
        for image, target, index in zip(images, targets, indices.tolist(), strict=True):
            shown, expected = TRAIN.apply(instances.read(index), *instances.objects(index), 1, index)
            height, width = expected.size
            values = shown[..., ::-1] if pixels.is_bgr else shown
            values = (values.astype(np.float64) - pixels.mean) / pixels.std
            assert np.allclose(image[:, :height, :width].permute(1, 2, 0), values, atol=2e-5)
            assert image[:, height:].abs().sum() == 0 and image[:, :, width:].abs().sum() == 0
            assert target.original == tuple(instances.sizes[index].tolist()) and target.masks is None
            assert torch.equal(target.boxes, expected.boxes) and torch.equal(target.labels, expected.labels)
            assert target.boxes.dtype == torch.float32 and target.labels.dtype == torch.int64
            assert (restore_pixels(images, pixels)[indices.tolist().index(index), :height, :width] == shown).all()
        seen += indices.tolist()
        assert len({size[1] > size[0] for size in instances.sizes[indices]}) == 1  # of one format
    assert len(seen) == 12


def test_training_is_the_same_for_any_workers_ranks_and_first_batch(instances):
    expected = list(train_on(instances).batches(0))
    loader = train_on(instances, workers=2)
    for _ in range(2):
        assert_equal(loader.batches(0), expected)
    assert_equal(loader.batches(0, start=2), expected[2:])
    for rank in range(2):
        assert_equal(train_on(instances, rank=rank, world_size=2).batches(0), expected[rank::2])
    other = next(loader.batches(1))[1]
    assert [target.size for target in other] != [target.size for target in expected[0][1]]


def test_masks_come_from_workers(tmp_path):
    codec = pytest.importorskip("pycocotools.mask")
    code = {"size": [20, 30], "counts": [83, 6, 14, 6, 491]}
    objects = [describe_object(1, 1), describe_object(2, 1, segmentation=code), describe_object(3, 2)]
    write_part(tmp_path, "train", [describe_image(1), describe_image(2)], objects)
    instances = open_coco(str(tmp_path), "train", masks=True)
    plan = BatchPlan(2, 2, 1, shuffle=True, seed=1)
    _, targets = next(InstanceLoader(instances, plan, TRAIN, CPU, RGB, workers=1).batches(0))
    for target in targets:
        expected = TRAIN.apply(instances.read(target.index), *instances.objects(target.index), 0, target.index)[1]
        assert len(target.masks) == len(target.boxes) == (2, 1)[target.index]
        x, y = target.masks[0][0].reshape(-1, 2).T
        assert np.allclose([x.min(), y.min(), x.max(), y.max()], target.boxes[0], atol=1e-4)
        assert np.array_equal(target.masks[0][0], expected.masks[0][0])
        if target.index == 0:
            assert target.masks[1] == expected.masks[1] and target.masks[1]["size"] == list(target.size)
            assert codec.area(target.masks[1]) > 0
    assert POLYGON[0] == instances.objects(0)[2][0][0][0]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_evaluation_yields_each_image_once_on_one_rank(root, batch_size):
    instances = open_coco(str(root), "train", is_training=False)
    seen = []
    for rank in range(2):
        plan = plan_evaluation(len(instances), batch_size, rank, 2)
        for images, targets in InstanceLoader(instances, plan, VAL, CPU, RGB, workers=1).batches(0):
            assert len(images) == len(targets) <= batch_size
            for target in targets:
                scale = min(50 / min(target.original), 80 / max(target.original))
                assert target.size == tuple(int(side * scale + 0.5) for side in target.original)
                seen.append(target.index)
    assert sorted(seen) == list(range(len(instances)))


def test_an_image_without_objects_has_an_empty_target(tmp_path):
    instances = open_coco(str(write_set(tmp_path)), "val")
    loader = InstanceLoader(instances, plan_evaluation(2, 2, 0, 1), VAL, CPU, RGB, workers=0)
    _, targets = next(loader.batches(0))
    assert [len(target) for target in targets] == [1, 0]
    assert targets[1].boxes.shape == (0, 4) and targets[1].boxes.dtype == torch.float32


def damage(root):
    for number in BAD:
        (root / f"train2017/{number + 1}.jpg").write_bytes(b"no image")


def test_bad_images_are_replaced_by_the_next_with_its_objects(root, instances, capsys):
    sound = list(train_on(instances).batches(0))
    damage(root)
    loader = train_on(instances, workers=2, max_errors=3)
    order = list(loader.plan.batches(0))
    for (_, targets), (_, expected), indices in zip(loader.batches(0), sound, order, strict=True):
        for target, other, index in zip(targets, expected, indices.tolist(), strict=True):
            used = {2: 3, 5: 7, 6: 7}.get(index, index)
            assert target.index == used and len(target) == len(instances.objects(used)[0])
            if used == index:
                assert torch.equal(target.boxes, other.boxes)
    lines = capsys.readouterr().err.splitlines()
    used = set(np.concatenate(order).tolist())
    assert loader.substitution.bad >= used & set(BAD) and len(lines) == len(loader.substitution.bad)
    assert all("no known format" in line and "replaced by" in line for line in lines)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_image_ends_the_run_and_is_named(root, instances, workers):
    damage(root)
    with pytest.raises(DataError, match=r"train2017/(3|6|7)\.jpg: not a readable image"):
        list(train_on(instances, workers).batches(0))


def test_a_failing_storage_is_no_bad_image(instances, monkeypatch):
    monkeypatch.setattr(reading, "PAUSES", ())
    monkeypatch.setattr(ImageFolder, "fetch", lambda self, index: (_ for _ in ()).throw(OSError(EIO, os.strerror(EIO))))
    with pytest.raises(LoadingError, match="cannot be read"):
        list(train_on(instances, max_errors=3).batches(0))


def test_padding_is_zero_after_normalisation_and_at_least_one_stride():
    images = [torch.full((5, 7, 3), 255, dtype=torch.uint8), torch.zeros(33, 2, 3, dtype=torch.uint8)]
    batch = pad_images(images, RGB, CPU)
    assert batch.shape == (2, 3, 64, 32)
    assert (batch != 0).sum().item() == 3 * (5 * 7 + 33 * 2)
