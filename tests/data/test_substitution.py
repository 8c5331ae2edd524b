"""Images that cannot be decoded: both loaders see the same in their place."""

import os
import signal
from dataclasses import replace
from errno import EACCES, EIO, EMFILE, ENOENT, ESTALE
from multiprocessing import active_children

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import CPU
from resnest_imagenet.data import reading
from resnest_imagenet.data.folder import ImageFolder, read_image_folder
from resnest_imagenet.data.loader import build_loader
from resnest_imagenet.data.plan import BatchPlan
from resnest_imagenet.data.shards import write_shards
from resnest_imagenet.data.transforms import STD, RandomResizedCrop, TrainTransform
from resnest_imagenet.data.webdataset import read_shards
from resnest_imagenet.errors import DataError, LoadingError

LOADERS = ["dali", "torchvision"]
pytestmark = pytest.mark.slow  # loaders start workers, and DALI takes seconds to import
TRAIN = TrainTransform(32, seed=4)
BAD = (4, 15, 16, 30, 44)  # two neighbours of different classes, the last one
USED = {4: 5, 15: 17, 16: 17, 30: 31, 44: 0}


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """45 smooth images of three classes."""
    root = tmp_path_factory.mktemp("sound")
    rng = np.random.default_rng(1)
    for number in range(45):
        height, width = rng.integers(60, 120, size=2).tolist()
        colours = Image.fromarray(rng.integers(0, 256, size=(6, 6, 3), dtype=np.uint8))
        path = root / "train" / f"class{number // 16}" / f"{number:02d}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        colours.resize((width, height), Image.Resampling.BICUBIC).save(path, quality=90)
    return read_image_folder(str(root), "train", "x")


@pytest.fixture
def damaged(sound, tmp_path):
    """The same, but for an empty and an HTML file, one cut near its end, a GIF, and a folder."""
    images = replace(sound, root=tmp_path / "train")
    for index in range(45):
        path = tmp_path / "train" / sound.files[index].decode()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(sound.read(index))
    empty, html, cut, gif, folder = (tmp_path / "train" / sound.files[index].decode() for index in BAD)
    empty.write_bytes(b"")
    html.write_bytes(b"<html>not found</html>")
    cut.write_bytes(cut.read_bytes()[: -len(cut.read_bytes()) // 20])
    Image.new("RGB", (60, 60)).save(gif, format="GIF")
    folder.unlink()
    folder.mkdir()
    return images


def make_loader(name, images, max_errors=5, workers=1, rank=0, world_size=1, transform=TRAIN):
    plan = BatchPlan(len(images), 7, len(images) // 7, rank, world_size, shuffle=True, seed=1)
    return build_loader(name, images, plan, transform, CPU, workers, max_errors)


def assert_equal(batches, expected):
    for (images, labels), (expected_images, expected_labels) in zip(batches, expected, strict=True):
        assert torch.equal(images, expected_images) and torch.equal(labels, expected_labels)


def with_successors(images):
    """The images, with the successors in the bad ones' places."""
    used = [USED.get(index, index) for index in range(len(images))]
    return replace(images, files=images.files[used], labels=images.labels[used])


@pytest.mark.parametrize("name", LOADERS)
def test_the_next_good_image_stands_in_with_its_label(name, sound, damaged):
    """In the crop of the image it replaces; whatever the workers, the ranks and the batch a pass begins with."""
    reference = make_loader(name, with_successors(sound), max_errors=0)
    expected = [list(reference.batches(epoch)) for epoch in (0, 1)]
    for workers in (0, 2):
        loader = make_loader(name, damaged, workers=workers)
        for epoch in (0, 1):
            assert_equal(loader.batches(epoch), expected[epoch])
    for rank in range(3):
        assert_equal(make_loader(name, damaged, rank=rank, world_size=3).batches(1), expected[1][rank::3])
    assert_equal(make_loader(name, damaged).batches(1, start=2), expected[1][2:])


def test_both_loaders_see_the_same(damaged):
    batches = [list(make_loader(name, damaged).batches(0)) for name in LOADERS]
    for (one, one_labels), (other, other_labels) in zip(*batches, strict=True):
        assert torch.equal(one_labels, other_labels)
        assert ((one - other).abs() * torch.tensor(STD).view(1, 3, 1, 1)).mean() < 0.3


@pytest.mark.parametrize("name", LOADERS)
def test_sound_images_are_the_same_with_and_without_substitution(name, sound):
    """Although DALI then decodes whole images, not windows."""
    assert_equal(make_loader(name, sound).batches(0), list(make_loader(name, sound, max_errors=0).batches(0)))


@pytest.mark.parametrize("name", LOADERS)
def test_damage_outside_the_crop_counts(name, sound, damaged):
    """Most of the cut file is sound, and windows often lie there."""
    first = slice(16, 23)
    images = replace(damaged, files=damaged.files[first], labels=damaged.labels[first])
    successors = replace(sound, files=sound.files[[17, *range(17, 23)]], labels=sound.labels[first])
    transform = replace(TRAIN, cropping=RandomResizedCrop(0.01))
    for epoch in range(12):
        loaders = (make_loader(name, each, transform=transform) for each in (images, successors))
        assert_equal(*(list(loader.batches(epoch)) for loader in loaders))


@pytest.mark.parametrize("name", LOADERS)
def test_each_bad_image_is_reported_once(name, damaged, capfd):
    loader = make_loader(name, damaged)
    for epoch in range(3):
        list(loader.batches(epoch))
    lines = sorted(line for line in capfd.readouterr().err.splitlines() if "replaced by" in line)
    reasons = ["not a readable image ("] * 3 + ["a GIF image (not one of", "not a file but a folder"]
    for line, index, reason in zip(lines, BAD, reasons, strict=True):
        assert line.startswith(f"{damaged.name(index)}: {reason}")
        assert line.endswith(f"; replaced by {damaged.name(USED[index])}")


@pytest.mark.parametrize("name", LOADERS)
@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_end_the_pass_and_the_last_is_named(name, workers, damaged):
    loader = make_loader(name, damaged, max_errors=3, workers=workers)
    with pytest.raises(DataError, match=r"\.JPEG: .*: bad image number 4, data.max_errors=3$"):
        for epoch in range(3):
            list(loader.batches(epoch))


@pytest.mark.parametrize("name", LOADERS)
def test_without_substitution_the_first_is_named(name, damaged):
    with pytest.raises(DataError, match=r"\.JPEG: (not a file but a folder|(not a readable|a GIF) image \([^)]*\)+)$"):
        list(make_loader(name, damaged, max_errors=0).batches(0))


@pytest.mark.parametrize("name", LOADERS)
def test_a_set_of_bad_images_ends(name, damaged):
    """Also where the limit lies above the number of images."""
    images = replace(damaged, files=damaged.files[list(BAD) * 3], labels=damaged.labels[:15])
    with pytest.raises(DataError, match="bad image number 15, data.max_errors=1000"):
        list(make_loader(name, images, max_errors=1000).batches(0))


def fail_reading(monkeypatch, index, error, times):
    """Let the storage fail so many times for an image; return how often it was asked."""
    asked = []

    def fetch(images, number, real=ImageFolder.fetch):
        if number == index:
            asked.append(number)
            if len(asked) <= times:
                raise OSError(error, os.strerror(error))
        return real(images, number)

    monkeypatch.setattr(reading, "PAUSES", (0, 0, 0))
    monkeypatch.setattr(ImageFolder, "fetch", fetch)
    return asked


@pytest.mark.parametrize(("name", "error"), [("torchvision", EIO), ("torchvision", ESTALE), ("dali", EMFILE)])
def test_a_storage_error_that_passes_changes_nothing(name, error, sound, monkeypatch):
    expected = list(make_loader(name, sound).batches(0))
    fail_reading(monkeypatch, 20, error, times=3)
    loader = make_loader(name, sound, workers=0)
    assert_equal(loader.batches(0), expected)
    assert not loader.substitution.bad


@pytest.mark.parametrize(("error", "tries"), [(EIO, 4), (EMFILE, 4), (ENOENT, 1), (EACCES, 1)])
@pytest.mark.parametrize(("name", "workers"), [("torchvision", 0), ("torchvision", 1), ("dali", 0)])
def test_a_storage_error_that_stays_replaces_no_image(error, tries, name, workers, sound, monkeypatch):
    asked = fail_reading(monkeypatch, 20, error, times=9)
    loader = make_loader(name, sound, workers=workers)
    with pytest.raises(LoadingError) as caught:
        list(loader.batches(0))
    assert str(caught.value).startswith(f"{sound.name(20)}: cannot be read ({os.strerror(error)})")
    assert (caught.value.exit_code, caught.value.errno) == (6, error)
    assert not loader.substitution.bad and len(asked) == (0 if workers else tries)


def test_a_worker_that_is_killed_is_one_line_with_the_way_out(sound):
    others = active_children()
    batches = make_loader("torchvision", sound).batches(0)
    next(batches)
    (worker,) = set(active_children()).difference(others)
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(LoadingError, match=r"^a worker process of the loader has died .*loader.workers=0$"):
        list(batches)


@pytest.mark.parametrize(
    ("text", "way_out"),
    [
        ("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)", "--ipc=host"),
        ("Too many open files. Communication with the workers is no longer possible.", "ulimit -n"),
    ],
)
def test_what_torch_says_of_short_resources_has_a_way_out(text, way_out):
    from resnest_imagenet.data.workers import _explain_failure

    assert way_out in str(_explain_failure(RuntimeError(text)))
    assert _explain_failure(RuntimeError("another")) is None


def test_any_other_failure_of_dali_stays_what_it_is(sound, monkeypatch):
    from resnest_imagenet.data.dali import _Inputs

    def fail(inputs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(_Inputs, "__call__", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        list(make_loader("dali", sound).batches(0))


@pytest.mark.parametrize("name", LOADERS)
def test_bad_images_in_shards(name, sound, damaged, tmp_path):
    path = tmp_path / "train" / damaged.files[44].decode()
    path.rmdir()
    path.write_bytes(b"not an image")
    write_shards(str(tmp_path), {"data.train_dir": "train"}, tmp_path / "shards", 10, shuffle=False)
    shards = read_shards(str(tmp_path / "shards"), "train", "x")
    expected = list(make_loader(name, with_successors(sound), max_errors=0).batches(0))
    assert_equal(make_loader(name, shards).batches(0), expected)
    with pytest.raises(DataError, match=r"train-00000\d.tar: class\d/\d\d.jpeg: .*bad image number 3"):
        list(make_loader(name, shards, max_errors=2).batches(0))
