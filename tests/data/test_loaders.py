"""Both loaders against the contract, and against each other."""

import gc
import io
import itertools
import resource
import struct
import tempfile
import threading
import weakref
import zlib
from dataclasses import dataclass, fields, replace
from multiprocessing import active_children
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import CPU
from resnest_imagenet.data.augment import PIXELWISE, POLICIES, Augmentation, Op
from resnest_imagenet.data.folder import read_image_folder
from resnest_imagenet.data.loader import build_loader, choose_loader
from resnest_imagenet.data.plan import BatchPlan, plan_evaluation
from resnest_imagenet.data.source import name_unreadable
from resnest_imagenet.data.transforms import MEAN, STD, ERandomCrop, EvalTransform, TrainTransform
from resnest_imagenet.errors import ConfigError, DataError

LOADERS = ["dali", "torchvision"]
pytestmark = pytest.mark.slow  # loaders start workers, and DALI takes seconds to import
TRAIN = TrainTransform(48, seed=5)


def write_images(root, detail):
    """Write 37 photographs-to-be: random textures of odd sizes, colour and grey, one with an EXIF rotation.

    The textures are `detail` x `detail` random colours, interpolated.
    """
    rng = np.random.default_rng(0)
    for number in range(37):
        height, width = rng.integers(40, 300, size=2).tolist()
        coarse = Image.fromarray(rng.integers(0, 256, size=(detail, detail, 3), dtype=np.uint8))
        picture = coarse.resize((width, height), Image.Resampling.BICUBIC).convert("L" if number % 5 == 0 else "RGB")
        exif = Image.Exif()
        exif[0x0112] = 6 if number == 3 else 1
        path = root / "train" / f"class{number % 3}" / f"{number:02d}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path, quality=90, exif=exif)
    return read_image_folder(str(root), "train", "data.train_dir")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Smooth: what the loaders do at the edges hardly shows."""
    return write_images(tmp_path_factory.mktemp("images"), detail=6)


@pytest.fixture(scope="module")
def rough_images(tmp_path_factory):
    """Detailed: filters differ on them by far more than a rounding."""
    return write_images(tmp_path_factory.mktemp("rough"), detail=50)


def make_loader(name, folder, transform, workers=0, **plan):
    shuffle = isinstance(transform, TrainTransform)
    batches = BatchPlan(**{"num_samples": len(folder), "batch_size": 8, "num_batches": 5, "shuffle": shuffle, **plan})
    return build_loader(name, folder, batches, transform, CPU, workers)


def to_pixels(images):
    """Undo the normalisation: 0..255 up to the mean, which differences cancel."""
    return images * torch.tensor(STD).view(1, 3, 1, 1)


def mean_of_channels():
    return torch.tensor(MEAN).view(1, 3, 1, 1)


@pytest.mark.parametrize("name", LOADERS)
@pytest.mark.parametrize("transform", [TRAIN, EvalTransform(48)])
def test_yields_what_the_contract_says(name, transform, images):
    loader = make_loader(name, images, transform)
    batches = list(loader.batches(epoch=0))
    assert [len(labels) for _, labels in batches] == [8, 8, 8, 8, 5]
    for batch, labels in batches:
        assert batch.shape == (len(labels), 3, 48, 48)
        assert (batch.dtype, labels.dtype) == (torch.float32, torch.int64)
        assert batch.is_contiguous(memory_format=torch.channels_last)
    expected = [images.labels[indices].tolist() for indices in loader.plan.batches(0)]
    assert [labels.tolist() for _, labels in batches] == expected


RESIZE_CROP = [EvalTransform(48), EvalTransform(288), EvalTransform(45, ratio=0.9), EvalTransform(48, ratio=1.0)]
CROP_RESIZE = [
    EvalTransform(48, "crop_resize", None, "bicubic"),
    EvalTransform(47, "crop_resize", 0.875, "bilinear"),
    EvalTransform(288, "crop_resize", None, "bilinear"),
    EvalTransform(288, "crop_resize", 1.0, "bicubic"),
]
ALIASED = [
    EvalTransform(48, antialias=False),
    EvalTransform(288, interpolation="bilinear", antialias=False),
    EvalTransform(47, "crop_resize", 0.875, "bilinear", antialias=False),
]


def differences(folder, transform):
    """Return how far the loaders are apart, in 0..255: (N, 3, crop, crop)."""
    pairs = zip(*(make_loader(name, folder, transform).batches(epoch=1) for name in LOADERS), strict=True)
    return torch.cat([(to_pixels(a) - to_pixels(b)).abs() for (a, _), (b, _) in pairs])


@pytest.mark.parametrize("transform", [TRAIN, replace(TRAIN, antialias=True), *RESIZE_CROP, *CROP_RESIZE])
def test_the_loaders_agree_to_a_rounding(transform, images):
    """The same crops and flips; resampling differs in the last bit of a pixel.

    And a little at the edges of what is resized, where antialiasing filters repeat the last pixel (DALI) or end there.
    """
    apart = differences(images, transform)
    assert apart.mean() < 0.3
    assert apart.max() < 2.01
    assert (apart[..., 1:-1, 1:-1] > 1.01).float().mean() < 1e-4


AUGMENTED = [
    replace(TRAIN, augmentation=Augmentation("resnest", jitter=0.4, lighting=0.1)),
    TrainTransform(48, 5, ERandomCrop(48), True, "bilinear", Augmentation("resnest_torch", 0.4, 0.1)),
    *(replace(TRAIN, augmentation=Augmentation(name)) for name in POLICIES),
    replace(TRAIN, augmentation=Augmentation(jitter=0.4, lighting=0.1, shift=20)),
]


@pytest.mark.parametrize("transform", [*AUGMENTED, TrainTransform(48, 5, ERandomCrop(48), True, "bicubic")])
def test_the_loaders_agree_on_augmented_images(transform, images):
    """Each operation is compared in test_operations.py; here that both draw the same and in the same order."""
    apart = differences(images, transform)
    assert apart.mean() < 0.7
    assert apart.quantile(0.99) < 5


@pytest.mark.parametrize("name", LOADERS)
def test_images_are_mirrored_and_normalised_as_asked(name, rough_images):
    """Mirrored exactly, and by another mean and deviation to a rounding."""

    def read(**options):
        return next(iter(make_loader(name, rough_images, replace(TRAIN, flip=0, **options)).batches(0)))[0]

    plain = read()
    assert torch.equal(read(vertical_flip=1.0), plain.flip(2))
    half = read(vertical_flip=0.5)
    is_mirrored = (half != plain).flatten(1).any(1)
    assert 0 < is_mirrored.sum() < len(plain)
    assert torch.equal(half[is_mirrored], plain[is_mirrored].flip(2))
    mean, std = (10.0, 120.0, 240.0), (30.0, 60.0, 90.0)
    scale, shift = (torch.tensor(values).view(1, 3, 1, 1) for values in (std, mean))
    evaluated = EvalTransform(48), EvalTransform(48, mean=mean, std=std)
    first, other = (next(iter(make_loader(name, rough_images, each).batches(0)))[0] for each in evaluated)
    for before, now in ((plain, read(mean=mean, std=std)), (first, other)):
        torch.testing.assert_close(now * scale + shift, to_pixels(before) + mean_of_channels(), rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", LOADERS)
def test_each_part_of_the_augmentation_changes_the_images(name, rough_images):
    parts = [Augmentation(), Augmentation("resnest"), Augmentation(jitter=0.4), Augmentation(lighting=0.1)]
    parts += [Augmentation(shift=20), Augmentation("trivialaugment")]
    transforms = [replace(TRAIN, augmentation=each) for each in parts]
    transforms += [TrainTransform(48, 5, ERandomCrop(48)), replace(TRAIN, antialias=True, interpolation="bicubic")]
    batches = [to_pixels(next(iter(make_loader(name, rough_images, each).batches(0)))[0]) for each in transforms]
    assert all((one - other).abs().mean() > 0.5 for one, other in itertools.combinations(batches, 2))


@pytest.mark.parametrize("transform", [TRAIN, *ALIASED])
def test_without_antialiasing_they_agree_on_every_texture(transform, rough_images):
    """Both repeat the last pixel at the edges, and neither rounds between the two axes."""
    apart = differences(rough_images, transform)
    assert apart.mean() < 0.3
    assert apart.max() < 1.01


@pytest.mark.parametrize("name", LOADERS)
def test_each_option_of_a_protocol_changes_the_images(name, rough_images):
    """So that neither loader can leave one out; the same options agree between them, see above."""
    options = itertools.product(["resize_crop", "crop_resize"], [0.8, 0.9], ["bilinear", "bicubic"], [True, False])
    transforms = [EvalTransform(40, *each) for each in options]
    if name == "dali":
        transforms = [each for each in transforms if each.resolved_interpolation == "bilinear" or each.antialias]
    batches = [to_pixels(next(iter(make_loader(name, rough_images, each).batches(0)))[0]) for each in transforms]
    assert all((one - other).abs().mean() > 1 for one, other in itertools.combinations(batches, 2))


@pytest.mark.parametrize("name", LOADERS)
def test_antialiasing_changes_training_crops(name, rough_images):
    one, other = (
        next(iter(make_loader(name, rough_images, each).batches(0)))[0]
        for each in (TRAIN, replace(TRAIN, antialias=True))
    )
    assert (to_pixels(one) - to_pixels(other)).abs().mean() > 1


@pytest.mark.parametrize("name", LOADERS)
@pytest.mark.parametrize("transform", [TRAIN, AUGMENTED[1]])
def test_batches_are_a_function_of_epoch_and_start_only(name, transform, images):
    loader = make_loader(name, images, transform, seed=7)
    first = list(loader.batches(epoch=0))
    other_epoch = list(loader.batches(epoch=1))
    again = list(loader.batches(epoch=0))
    rest = list(make_loader(name, images, transform, seed=7, workers=2).batches(epoch=0, start=3))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(first, again, strict=True))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(first[3:], rest, strict=True))
    assert not torch.equal(first[0][0], other_epoch[0][0])


@pytest.mark.parametrize("name", LOADERS)
def test_an_abandoned_pass_leaves_no_trace(name, images):
    loader = make_loader(name, images, TRAIN)
    next(iter(loader.batches(epoch=4)))
    expected = next(iter(make_loader(name, images, TRAIN).batches(epoch=0)))
    assert torch.equal(next(iter(loader.batches(epoch=0)))[0], expected[0])


def test_a_dali_pipeline_goes_with_its_loader(images):
    """Without the garbage collector, which could free it in a forked worker and hang there."""
    loader = make_loader("dali", images, TRAIN)
    list(loader.batches(epoch=0))
    pipeline = weakref.ref(loader._pipeline)
    gc.disable()
    try:
        del loader
        assert pipeline() is None
    finally:
        gc.enable()


def test_workers_do_not_collect_the_parents_garbage(images):
    """A pipeline in a reference cycle, as an error's traceback makes one: workers that freed it would hang."""
    garbage = [make_loader("dali", images, TRAIN)]
    list(garbage[0].batches(epoch=0))
    garbage.append(garbage)
    gc.disable()
    try:
        del garbage
        loader = make_loader("torchvision", images, CollectsGarbage(48), workers=1)
        assert len(list(loader.batches(epoch=0))) == 5
    finally:
        gc.enable()


@dataclass(frozen=True)
class CollectsGarbage(EvalTransform):
    """Forces a collection in the worker."""

    def resized(self, height, width):
        gc.collect()
        return super().resized(height, width)


@pytest.mark.parametrize("name", LOADERS)
def test_ranks_share_the_batches(name, images):
    alone = list(make_loader(name, images, TRAIN, num_batches=4).batches(epoch=0))
    for rank in range(2):
        share = make_loader(name, images, TRAIN, num_batches=4, rank=rank, world_size=2).batches(epoch=0)
        assert all(torch.equal(a[0], b[0]) for a, b in zip(alone[rank::2], share, strict=True))


@pytest.mark.parametrize("name", LOADERS)
def test_a_rank_may_have_nothing_to_evaluate(name, images):
    plan = plan_evaluation(len(images), 64, rank=2, world_size=3)
    assert list(build_loader(name, images, plan, EvalTransform(48), CPU, 1).batches(epoch=0)) == []


@pytest.mark.parametrize("name", LOADERS)
@pytest.mark.parametrize("damage", [b"", b"<html>not found</html>", None])
def test_an_unreadable_file_is_named(name, damage, images, tmp_path):
    files = [Path(images.path(index).decode()) for index in range(len(images))]
    for index, source in enumerate(files):
        data = source.read_bytes()
        if index == 20:
            data = data[: len(data) // 2] if damage is None else damage
        target = tmp_path / "train" / source.parent.name / source.name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
    broken = replace(images, root=tmp_path / "train")
    loader = make_loader(name, broken, EvalTransform(48), workers=1)
    others = active_children()
    with pytest.raises(DataError, match=str(broken.path(20).decode())) as _raised:
        list(loader.batches(epoch=0))
    assert set(active_children()) <= set(others)  # while the exception is there, whose frames hold the loader


def test_dali_refuses_a_filter_that_is_another_there(images):
    aliased = EvalTransform(288, antialias=False)
    with pytest.raises(ConfigError, match="DALI's bicubic then differs from OpenCV's: set loader=torchvision"):
        make_loader("dali", images, aliased)
    batch, _ = next(iter(make_loader("torchvision", images, aliased).batches(epoch=0)))
    assert batch.shape == (8, 3, 288, 288)


def test_choice(monkeypatch):
    """DALI where it is installed, but not for operations on whole images on a CPU."""
    assert choose_loader("auto") == "dali"
    light, jitter, policy = (Augmentation(lighting=0.1, shift=20), Augmentation(jitter=0.1), Augmentation("rotation"))
    cases = [(light, "cpu", "dali"), (jitter, "cpu", "dali"), (policy, "cpu", "torchvision")]
    cases += [(policy, "mps", "torchvision"), (policy, "cuda", "dali"), (light, "cuda", "dali")]
    for augmentation, device, expected in cases:
        assert choose_loader("auto", augmentation, torch.device(device)) == expected
        assert choose_loader("dali", augmentation, torch.device(device)) == "dali"
    assert choose_loader("torchvision") == "torchvision"
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert choose_loader("auto") == "torchvision"
    with pytest.raises(
        ConfigError,
        match=r"DALI is not installed: set loader=auto, or add the extra \[dali\] of resnest-imagenet: pip install ",
    ):
        choose_loader("dali")


def test_auto_takes_the_loader_of_the_transform(images):
    plan = BatchPlan(len(images), 8, 5)
    for transform, kind in (
        (AUGMENTED[0], "TorchvisionLoader"),
        (TRAIN, "DaliLoader"),
        (EvalTransform(48), "DaliLoader"),
    ):
        assert type(build_loader("auto", images, plan, transform, CPU, 0)).__name__ == kind


def test_dali_decodes_the_crop_alone_only_where_it_does_not_matter(images, monkeypatch):
    """The batches are those of whole images, bit for bit."""
    from resnest_imagenet.data import dali

    rule, alone = dali._find_decoded_and_window, []

    def record(cropping, height, width, draw, operations):
        vectors = rule(cropping, height, width, draw, operations)
        alone[-1].append(vectors[1] == vectors[3] != (height, width))
        return vectors

    def read(pixelwise):
        monkeypatch.setattr(dali, "PIXELWISE", pixelwise)
        alone.append([])
        return torch.cat([batch for batch, _ in make_loader("dali", images, policy).batches(epoch=0)])

    policy = replace(TRAIN, augmentation=Augmentation("resnest"))
    monkeypatch.setattr(dali, "_find_decoded_and_window", record)
    batches = [read(pixelwise) for pixelwise in (PIXELWISE, {Op.IDENTITY}, ())]
    assert torch.equal(batches[0], batches[2]) and torch.equal(batches[1], batches[2])
    assert sum(alone[0]) > sum(alone[1]) > sum(alone[2]) == 0


def test_the_training_thread_neither_reads_nor_draws(images):
    """With one thread of the loader too; what happens there is the training thread's to raise."""
    threads = set()

    @dataclass(frozen=True)
    class Draws(TrainTransform):
        def draw_crops(self, epoch, indices):
            threads.add(threading.current_thread())
            return super().draw_crops(epoch, indices)

    class Reads(type(images)):
        def fetch(self, index):
            threads.add(threading.current_thread())
            return super().fetch(index)

    watched = Reads(**{field.name: getattr(images, field.name) for field in fields(images)})
    assert len(list(make_loader("dali", watched, Draws(48, seed=5), workers=1).batches(epoch=0))) == 5
    assert threads and threading.main_thread() not in threads
    for thread in threads:  # after a pass: the next may fork workers
        thread.join(timeout=10)
        assert not thread.is_alive()


def test_dali_leaves_no_generated_file(images, tmp_path, monkeypatch):
    """A graph with operations has conditionals; DALI itself deletes its files where a process ends by itself."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    next(iter(make_loader("dali", images, AUGMENTED[0]).batches(epoch=0)))
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_gpu_without_a_number_is_the_current_one(monkeypatch):
    from resnest_imagenet.data.dali_decoding import find_device_id

    monkeypatch.setattr("torch.cuda.current_device", lambda: 3)
    devices = ("cuda", "cuda:0", "cpu")
    assert [find_device_id(torch.device(name)) for name in devices] == [3, 0, None]


def write_hard_images():
    """Return (name, encoded) of images that decoders treat differently, all of them sound."""
    rng = np.random.default_rng(0)
    rgb = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize((90, 70), Image.Resampling.BICUBIC)
    alpha = Image.fromarray(rng.integers(0, 256, (70, 90), dtype=np.uint8))
    rgba = rgb.copy()
    rgba.putalpha(alpha)
    palette = rgb.quantize(30)
    deep = Image.fromarray(rng.integers(0, 2**16, (70, 90), dtype=np.uint16))
    rotated = Image.Exif()
    rotated[0x0112] = 6

    def encode(image, kind, **options):
        file = io.BytesIO()
        image.save(file, format=kind, **options)
        return file.getvalue()

    return {
        "rgb": encode(rgb, "JPEG"),
        "progressive": encode(rgb, "JPEG", progressive=True),
        "rotated by EXIF": encode(rgb, "JPEG", exif=rotated),
        "grey": encode(rgb.convert("L"), "JPEG"),
        "CMYK": encode(rgb.convert("CMYK"), "JPEG"),
        "without an end marker": encode(rgb, "JPEG")[:-2],
        "with bytes after its end": encode(rgb, "JPEG") + bytes(1000),
        "PNG": encode(rgb, "PNG"),
        "grey PNG": encode(rgb.convert("L"), "PNG"),
        "black and white PNG": encode(rgb.convert("1"), "PNG"),
        "palette PNG": encode(palette, "PNG"),
        "palette PNG with a transparent colour": encode(palette, "PNG", transparency=3),
        "RGBA PNG": encode(rgba, "PNG"),
        "grey PNG with transparency": encode(rgba.convert("LA"), "PNG"),
        "16-bit PNG": encode(deep, "PNG"),
        "WebP": encode(rgb, "WEBP", lossless=True),
        "BMP": encode(rgb, "BMP"),
        "TIFF": encode(rgb, "TIFF"),
    }


@pytest.mark.parametrize("name", LOADERS)
def test_hard_files_are_decoded_as_pillow_does(name, tmp_path):
    """All of them named .JPEG; an evaluation that neither resizes nor crops shows the decoded pixels."""
    files = write_hard_images()
    for number, encoded in enumerate(files.values()):
        path = tmp_path / "val" / "x" / f"{number:02d}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded)
    folder = read_image_folder(str(tmp_path), "val", "data.val_dir")
    assert name_unreadable(folder, range(len(folder))) is None
    loader = make_loader(name, folder, EvalTransform(70, ratio=1.0), batch_size=1, num_batches=len(files))
    mean = mean_of_channels()
    for (kind, encoded), (batch, _) in zip(files.items(), loader.batches(0), strict=True):
        pixels = (to_pixels(batch) + mean)[0].permute(1, 2, 0).numpy()
        picture = Image.open(io.BytesIO(encoded))
        expected = np.array(picture).astype(float) / 257 if picture.mode == "I;16" else np.array(picture.convert("RGB"))
        expected = expected.round().reshape(70, 90, -1)[:, 10:80]
        assert np.abs(pixels - expected).max() < 1e-3, kind


SHAPES = [(1, 1), (1, 2), (2, 1), (3, 3), (1, 20000), (20000, 1), (4, 160), (160, 4)]


@pytest.mark.parametrize("transform", [EvalTransform(224), EvalTransform(48, "crop_resize"), AUGMENTED[0]])
def test_extreme_shapes(transform, tmp_path):
    """Points and lines of pixels: nothing fails, and the centre is what it was in the whole image, resized."""
    from torchvision.transforms.v2 import functional as F

    for number, size in enumerate(SHAPES):
        path = tmp_path / "val" / "x" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = np.random.default_rng(number).integers(0, 256, (5, 5, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize(size[::-1], Image.Resampling.BICUBIC).save(path)
    folder = read_image_folder(str(tmp_path), "val", "x")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    pairs = zip(*(make_loader(name, folder, transform, num_batches=1).batches(0) for name in LOADERS), strict=True)
    ((one, _), (other, _)) = next(pairs)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # KiB; 5 GiB when all was resized
    assert one.shape == other.shape == (len(SHAPES), 3, transform.crop, transform.crop)
    if isinstance(transform, EvalTransform):
        assert (to_pixels(one) - to_pixels(other)).abs().max() < 2.01
    if transform.crop == 224:
        whole = F.resize(torch.from_numpy(np.array(Image.open(folder.path(6).decode()))).permute(2, 0, 1), [256, 10240])
        assert (to_pixels(one)[6] + mean_of_channels()[0] - F.center_crop(whole, [224, 224])).abs().max() < 2.01


def test_what_only_dali_refuses_is_decoded_by_pillow(images, tmp_path):
    """PNGs whose rows are whole, but not the checksum behind them."""
    for index in range(len(images)):
        path = tmp_path / "val" / "x" / f"{index:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        encoded = io.BytesIO()
        Image.open(images.path(index).decode()).convert("RGB").save(encoded, "PNG")
        png = encoded.getvalue()
        if index in (3, 36):
            start, end = png.rindex(b"IDAT"), len(png) - 16
            data = png[start : end - 2]
            png = png[: start - 4] + struct.pack(">I", len(data) - 4) + data + struct.pack(">I", zlib.crc32(data))
            png += encoded.getvalue()[-12:]
        path.write_bytes(png)
    folder = read_image_folder(str(tmp_path), "val", "x")
    assert name_unreadable(folder, range(len(folder))) is None
    assert differences(folder, EvalTransform(48)).max() < 2.01
    loader = make_loader("dali", folder, EvalTransform(48))
    assert sum(len(labels) for _, labels in loader.batches(0)) == len(images)
    assert loader._inputs.by_pillow == {3, 36}


@pytest.mark.parametrize("name", LOADERS)
def test_neither_loader_decodes_a_gif(name, images, tmp_path):
    (tmp_path / "val" / "x").mkdir(parents=True)
    Image.new("RGB", (60, 60)).save(tmp_path / "val" / "x" / "0.JPEG", format="GIF")
    folder = read_image_folder(str(tmp_path), "val", "data.val_dir")
    with pytest.raises(DataError, match=r"x/0.JPEG: a GIF image \(not one of JPEG"):
        list(make_loader(name, folder, EvalTransform(48), num_batches=1).batches(0))
