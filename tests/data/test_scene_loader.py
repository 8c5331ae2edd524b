"""The loader of scenes: what the contract says, the same for any workers, ranks and first batch."""

import os
from errno import EIO

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import CPU
from resnest_imagenet.data import reading
from resnest_imagenet.data.folder import ImageFolder
from resnest_imagenet.data.geometry import SceneTransform
from resnest_imagenet.data.loader import to_pixels
from resnest_imagenet.data.plan import BatchPlan, plan_evaluation
from resnest_imagenet.data.scene_loader import SceneLoader
from resnest_imagenet.data.scenes import VOID, open_scenes
from resnest_imagenet.errors import DataError, LoadingError

pytestmark = pytest.mark.process
TRAIN = SceneTransform(crop=48, base=60, seed=5, blur=0.5)
BAD = (2, 5, 6)


@pytest.fixture
def root(tmp_path):
    """14 scenes of different sizes."""
    rng = np.random.default_rng(0)
    (tmp_path / "classes.txt").write_text("a\nb\nc\n")
    for folder in ("images/train", "masks/train"):
        (tmp_path / folder).mkdir(parents=True)
    for number in range(14):
        height, width = rng.integers(30, 90, 2).tolist()
        colours = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
        colours.resize((width, height), Image.Resampling.BICUBIC).save(tmp_path / f"images/train/{number:02d}.jpg")
        mask = rng.integers(0, 3, (height, width), dtype=np.uint8)
        mask[::7] = VOID
        Image.fromarray(mask).save(tmp_path / f"masks/train/{number:02d}.png")
    return tmp_path


@pytest.fixture
def scenes(root):
    return open_scenes("masks", str(root), "train")


def train_on(scenes, workers=0, rank=0, world_size=1, max_errors=0):
    plan = BatchPlan(len(scenes), 3, len(scenes) // 3, rank, world_size, shuffle=True, seed=1)
    return SceneLoader(scenes, plan, TRAIN, CPU, workers, max_errors)


def assert_equal(batches, expected):
    for (images, masks), (expected_images, expected_masks) in zip(batches, expected, strict=True):
        assert torch.equal(images, expected_images) and torch.equal(masks, expected_masks)


def test_training_yields_crops_as_the_contract_says(scenes):
    loader = train_on(scenes)
    batches = list(loader.batches(epoch=1))
    for (images, masks), indices in zip(batches, loader.plan.batches(1), strict=True):
        assert (images.shape, masks.shape) == ((3, 3, 48, 48), (3, 48, 48))
        assert (images.dtype, masks.dtype) == (torch.float32, torch.int64)
        assert images.is_contiguous(memory_format=torch.channels_last)
        for index, pixels, mask in zip(indices.tolist(), to_pixels(images), masks.numpy(), strict=True):
            image, labels = TRAIN.apply(*scenes.read(index), 1, index)
            assert np.array_equal(pixels, image) and np.array_equal(mask, labels)


def test_training_is_the_same_for_any_workers_ranks_and_first_batch(scenes):
    expected = list(train_on(scenes).batches(0))
    loader = train_on(scenes, workers=2)
    for _ in range(2):
        assert_equal(loader.batches(0), expected)
    assert_equal(loader.batches(0, start=2), expected[2:])
    for rank in range(2):
        assert_equal(train_on(scenes, rank=rank, world_size=2).batches(0), expected[rank::2])
    assert not torch.equal(next(loader.batches(1))[0], expected[0][0])


@pytest.mark.parametrize("workers", [0, 1])
def test_evaluation_yields_each_scene_as_it_is(workers, scenes):
    seen = []
    for rank in range(3):
        plan = plan_evaluation(len(scenes), 1, rank, 3)
        loader = SceneLoader(scenes, plan, None, CPU, workers)
        for (images, masks), (index,) in zip(loader.batches(0), plan.batches(0), strict=True):
            picture, mask = scenes.read(index)
            assert (images.dtype, masks.dtype) == (torch.uint8, torch.uint8)
            assert np.array_equal(images[0].permute(1, 2, 0).numpy(), np.array(picture))
            assert masks.shape == (1, *mask.shape) and np.array_equal(masks[0].numpy(), mask)
            seen.append(index)
    assert sorted(seen) == list(range(14))


def damage(root):
    """Damage two images and a mask, two of them neighbours."""
    (root / "images/train/02.jpg").write_bytes(b"")
    (root / "images/train/05.jpg").write_bytes(b"<html>")
    Image.new("RGB", (9, 9)).save(root / "masks/train/06.png")


@pytest.mark.parametrize("workers", [0, 2])
def test_the_next_usable_scene_stands_in_with_its_own_mask(workers, root, scenes, capfd):
    damage(root)
    loader = train_on(scenes, workers, max_errors=3)
    used = {2: 3, 5: 7, 6: 7}
    for epoch in range(3):
        for (images, masks), indices in zip(loader.batches(epoch), loader.plan.batches(epoch), strict=True):
            for index, pixels, mask in zip(indices.tolist(), to_pixels(images), masks.numpy(), strict=True):
                image, labels = TRAIN.apply(*scenes.read(used.get(index, index)), epoch, index)
                assert np.array_equal(pixels, image) and np.array_equal(mask, labels)
    assert loader.substitution.bad == set(BAD)
    lines = sorted(line for line in capfd.readouterr().err.splitlines() if "replaced by" in line)
    assert [line.replace(f"{root}/", "") for line in lines] == [
        "images/train/02.jpg: not a readable image (it is empty); replaced by images/train/03.jpg",
        "images/train/05.jpg: not a readable image (of no known format); replaced by images/train/07.jpg",
        "images/train/06.jpg: its mask masks/train/06.png: a PNG image of mode RGB, not class indices: save them as a "
        "grey PNG of 8 bits; replaced by images/train/07.jpg",
    ]


@pytest.mark.parametrize("workers", [0, 1])
def test_without_substitution_the_bad_scene_is_named(workers, root, scenes):
    Image.new("L", (9, 9)).save(root / "masks/train/06.png")
    plan = plan_evaluation(len(scenes), 1, 0, 1)
    with pytest.raises(DataError, match=r"images/train/06.jpg: its mask .*/06.png: 9 x 9 pixels, the image \d+ x \d+$"):
        list(SceneLoader(scenes, plan, None, CPU, workers).batches(0))
    with pytest.raises(DataError, match=r"/06.png: 9 x 9 pixels"):
        list(train_on(scenes, workers).batches(0))


def test_a_storage_error_of_a_mask_names_it_and_replaces_nothing(scenes, monkeypatch):
    def fetch(images, index, real=ImageFolder.fetch):
        if images.name(index).endswith("masks/train/06.png"):
            raise OSError(EIO, os.strerror(EIO))
        return real(images, index)

    monkeypatch.setattr(reading, "PAUSES", ())
    monkeypatch.setattr(ImageFolder, "fetch", fetch)
    loader = train_on(scenes, max_errors=3)
    with pytest.raises(LoadingError, match=r"masks/train/06.png: cannot be read \(Input/output error\)"):
        for epoch in range(3):
            list(loader.batches(epoch))
    assert not loader.substitution.bad
