import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from conftest import ALONE
from forked import compute_on_ranks
from resnest_imagenet.data.plan import plan_evaluation
from resnest_imagenet.errors import ConfigError, DataError, NonFiniteError
from resnest_imagenet.evaluation.regions import (
    VOID,
    RegionProtocol,
    Regions,
    cut_centre,
    measure_regions,
    place_windows,
    score_pixels,
)

NUM_CLASSES = 5
WHOLE = RegionProtocol("whole")
PUBLISHED = RegionProtocol("published", crop=24, base=30, scales=(0.5, 0.75, 1, 1.75), flip=True)
PROTOCOLS = {
    "own size": WHOLE,
    "long side": RegionProtocol("whole", base=45),
    "larger": RegionProtocol("whole", scales=(1.5,), flip=True),
    "slide": RegionProtocol("slide", crop=25),
    "slide flipped": RegionProtocol("slide", crop=20, base=45, scales=(1.0, 0.5), flip=True),
    "published": PUBLISHED,
    "published plainly": RegionProtocol("published", crop=24, base=30),
}
# Each side may be below, equal to or above the crop of 24, and the scaled ones as well.
SIZES = [(37, 53), (61, 40), (24, 24), (9, 70), (17, 19)]


class TinySegmenter(nn.Module):
    """What a window shows changes all its scores: strided, with a pooled branch, and sensitive to its borders."""

    def __init__(self, seed: int = 0, num_classes: int = NUM_CLASSES):
        super().__init__()
        torch.manual_seed(seed)
        self.body = nn.Conv2d(3, 8, 5, stride=2, padding=2)
        self.norm = nn.BatchNorm2d(8)
        self.norm.running_mean.normal_()
        self.pooled = nn.Conv2d(8, num_classes, 1)
        self.head = nn.Conv2d(8, num_classes, 3, padding=1)

    def forward(self, images):
        features = self.norm(self.body(images)).relu()
        logits = self.head(features) + self.pooled(features.mean((2, 3), keepdim=True))
        return F.interpolate(logits, images.shape[2:], mode="bilinear", align_corners=True)


class SceneBatches:
    """A loader of an evaluation: each scene at its own size."""

    def __init__(self, scenes, rank=0, world_size=1, num_samples=None):
        self.plan = plan_evaluation(num_samples or len(scenes), 1, rank, world_size)
        self._scenes = scenes

    def batches(self, epoch, start=0):
        for (index,) in self.plan.batches(epoch, start):
            if index < len(self._scenes):
                image, mask = self._scenes[index]
                yield torch.from_numpy(image)[None], torch.from_numpy(mask)[None]


def draw_scenes(sizes=SIZES, classes=(0, 2, 3, 4)):
    """Draw smooth noise, and masks with void in which class 1 is absent."""
    rng = np.random.default_rng(0)
    scenes = []
    for height, width in sizes:
        coarse = Image.fromarray(rng.integers(0, 256, (7, 7, 3), dtype=np.uint8))
        image = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).transpose(2, 0, 1).copy()
        scenes.append((image, rng.choice(np.array([*classes, VOID], np.uint8), (height, width))))
    return scenes


def measure(protocol=WHOLE, scenes=None, network=None, ranks=ALONE, **options):
    scenes = draw_scenes() if scenes is None else scenes
    loader = SceneBatches(scenes, ranks.rank, ranks.world_size)
    return measure_regions(network or TinySegmenter(), loader, ranks, protocol, NUM_CLASSES, **options)


def predict(image, protocol, network=None):
    network = (network or TinySegmenter()).eval()
    return score_pixels(network, torch.from_numpy(image)[None], protocol)[0].argmax(0).numpy()


def count_naively(pairs, num_classes):
    """Count pixel by pixel: confusions, and IoU as sums over the set of intersections and of unions."""
    confusions = [[0] * num_classes for _ in range(num_classes)]
    intersections, unions = [0] * num_classes, [0] * num_classes
    for truth, predicted in pairs:
        for true, guess in zip(truth.ravel().tolist(), predicted.ravel().tolist(), strict=True):
            if true == 255:
                continue
            confusions[true][guess] += 1
            intersections[true] += true == guess
            for number in {true, guess}:
                unions[number] += 1
    return confusions, [100 * i / u if u else 0.0 for i, u in zip(intersections, unions, strict=True)]


def test_equals_a_naive_count():
    scenes = draw_scenes()
    regions = measure(scenes=scenes)
    pairs = [(mask, predict(image, WHOLE)) for image, mask in scenes]
    confusions, iou = count_naively(pairs, NUM_CLASSES)
    assert regions.matrix.tolist() == confusions and regions.matrix.dtype == np.int64
    assert len(np.unique(np.concatenate([predicted.ravel() for _, predicted in pairs]))) >= 3
    np.testing.assert_allclose(regions.iou, iou, rtol=1e-12)
    for (truth, predicted), correct, labelled in zip(pairs, regions.correct, regions.labelled, strict=True):
        assert (labelled, correct) == ((truth != VOID).sum(), (truth == predicted).sum())
    assert regions.count == len(scenes)
    assert regions.pixel_accuracy == pytest.approx(100 * regions.correct.sum() / regions.labelled.sum())


def test_absent_classes():
    """Class 1 is neither true nor predicted, class 2 is predicted only: both are absent from the ground truth."""
    matrix = np.array([[6, 0, 2, 0], [0, 0, 0, 0], [0, 0, 0, 0], [1, 0, 0, 3]])
    regions = Regions(matrix, np.array([9]), np.array([12]))
    np.testing.assert_allclose(regions.iou, [600 / 9, 0, 0, 300 / 4])
    assert regions.miou == pytest.approx((600 / 9 + 75) / 4)
    assert regions.miou_present == pytest.approx((600 / 9 + 75) / 2)
    assert regions.is_present.tolist() == [True, False, False, True]
    assert regions.pixel_accuracy == 75


def test_a_set_without_labels():
    scenes = [(image, np.full_like(mask, VOID)) for image, mask in draw_scenes()]
    regions = measure(scenes=scenes)
    assert (regions.miou, regions.miou_present, regions.pixel_accuracy) == (0, 0, 0)
    assert regions.labelled.tolist() == [0] * len(scenes)


def compute_on_rank(ranks):
    calls = []
    regions = measure(PUBLISHED, ranks=ranks, before_batch=lambda *call: calls.append(call))
    return regions.matrix, regions.correct, regions.labelled, calls


@pytest.mark.process
def test_any_number_of_ranks():
    alone = compute_on_rank(ALONE)
    assert alone[3] == [(number, True) for number in range(len(SIZES))]
    world_size = 3  # 5 scenes: 2, 2 and 1
    results = compute_on_ranks(compute_on_rank, world_size)
    for result in results:
        for values, expected in zip(result[:3], alone[:3], strict=True):
            np.testing.assert_array_equal(values, expected)
    common = len(SIZES) // world_size
    for rank, (*_, calls) in enumerate(results):
        assert calls == [(batch, batch < common) for batch in range(len(range(rank, len(SIZES), world_size)))]


def test_a_missing_scene_is_an_error():
    scenes = draw_scenes()
    with pytest.raises(RuntimeError, match="evaluated 5 scenes of 6"):
        measure_regions(TinySegmenter(), SceneBatches(scenes, num_samples=6), ALONE, WHOLE, NUM_CLASSES)


def test_what_is_not_finite_is_named():
    network = TinySegmenter()
    network.head.bias.data[3] = math.inf
    with pytest.raises(NonFiniteError, match="^scene 0: its logits are not finite in fp32, like those of 5 of 5"):
        measure(network=network, name="scene {}".format)


@pytest.mark.parametrize("value", [NUM_CLASSES, 254])
def test_other_values_in_a_mask_are_named(value):
    scenes = draw_scenes()
    scenes[2][1][3, 4] = value
    with pytest.raises(DataError, match="^scene 2: its mask has values that are neither one of 5 classes nor 255$"):
        measure(scenes=scenes, name="scene {}".format)


def test_the_centre_is_pillows():
    """Short side to the crop, the long side rounded down, centre crop, half a pixel to the even side."""
    crop = 24
    for image, mask in draw_scenes([(61, 40), (37, 53), (24, 24), (9, 70)]):
        height, width = mask.shape
        size = (int(width * crop / height), crop) if width > height else (crop, int(height * crop / width))
        left, top = round((size[0] - crop) / 2), round((size[1] - crop) / 2)
        box = (left, top, left + crop, top + crop)
        pixels = Image.fromarray(image.transpose(1, 2, 0)).resize(size, Image.Resampling.BILINEAR).crop(box)
        labels = Image.fromarray(mask).resize(size, Image.Resampling.NEAREST).crop(box)
        images, masks = cut_centre(torch.from_numpy(image)[None], torch.from_numpy(mask)[None], crop)
        np.testing.assert_array_equal(masks[0], np.asarray(labels))
        assert np.abs(images[0].permute(1, 2, 0).numpy() - np.asarray(pixels)).max() < 1.01  # Pillow rounds twice


def test_only_the_centre_counts():
    scenes = draw_scenes()
    protocol = RegionProtocol("centre", crop=24)
    regions = measure(protocol, scenes)
    pairs = []
    for image, mask in scenes:
        images, masks = cut_centre(torch.from_numpy(image)[None], torch.from_numpy(mask)[None], 24)
        pairs.append((masks[0].numpy(), predict(images[0].numpy(), WHOLE)))
    assert regions.matrix.tolist() == count_naively(pairs, NUM_CLASSES)[0]
    assert 0 < regions.labelled.max() <= 24**2


def resize_naively(values, height, width):
    """Resize (C, H, W) bilinearly: the first and the last pixel of a side stay where they are (align_corners)."""
    for axis, length in ((1, height), (2, width)):
        last = values.shape[axis] - 1
        places = np.arange(length) * last / (length - 1) if length > 1 else np.zeros(1)
        below = np.floor(places).astype(int)
        share = (places - below).reshape(-1, 1) if axis == 1 else places - below
        first, second = values.take(below, axis), values.take(np.minimum(below + 1, last), axis)
        values = first * (1 - share) + second * share
    return values


def score_naively(network, image, protocol):
    """Transcribe MultiEvalModule of PyTorch-Encoding: one window at a time, in float64."""
    network = copy.deepcopy(network).double().eval()
    mean, std = np.array([0.485, 0.456, 0.406])[:, None, None], np.array([0.229, 0.224, 0.225])[:, None, None]
    black = -mean / std
    is_published = protocol.name == "published"

    def run(pixels):
        with torch.inference_mode():
            return network(torch.from_numpy(pixels.copy())[None])[0].numpy()

    def infer(pixels):
        logits = run(pixels)
        if protocol.flip:
            logits = logits + run(pixels[..., ::-1])[..., ::-1]
        return np.exp(logits) if is_published else logits

    def pad(pixels, size):
        padded = np.broadcast_to(black, (3, max(size, pixels.shape[1]), max(size, pixels.shape[2]))).copy()
        padded[:, : pixels.shape[1], : pixels.shape[2]] = pixels
        return padded

    _, h, w = image.shape
    normalised = (image / 255 - mean) / std
    total = 0
    for scale in protocol.scales:
        long_size = math.ceil((protocol.base or max(h, w)) * scale)
        if h > w:
            height, width = long_size, int(1.0 * w * long_size / h + 0.5)
        else:
            height, width = int(1.0 * h * long_size / w + 0.5), long_size
        current = resize_naively(normalised, height, width)
        if protocol.name == "whole":
            outputs = infer(current)
        elif long_size <= protocol.crop:
            outputs = infer(pad(current, protocol.crop))[:, :height, :width]
        else:
            crop, stride = protocol.crop, int(protocol.crop * (2.0 / 3.0))
            current = pad(current, crop)
            _, padded_height, padded_width = current.shape
            sums, counts = np.zeros((NUM_CLASSES, padded_height, padded_width)), np.zeros((padded_height, padded_width))
            for row in range(math.ceil((padded_height - crop) / stride) + 1):
                for column in range(math.ceil((padded_width - crop) / stride) + 1):
                    top, left = row * stride, column * stride
                    bottom, right = min(top + crop, padded_height), min(left + crop, padded_width)
                    scores = infer(pad(current[:, top:bottom, left:right], crop))
                    sums[:, top:bottom, left:right] += scores[:, : bottom - top, : right - left]
                    counts[top:bottom, left:right] += 1
            outputs = (sums / counts)[:, :height, :width]
        total = total + resize_naively(outputs, h, w)
    return total


@pytest.mark.parametrize("protocol", PROTOCOLS.values(), ids=PROTOCOLS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_scores_equal_a_naive_transcription(protocol, size):
    ((image, _),) = draw_scenes([size])
    network = TinySegmenter().eval()
    expected = score_naively(network, image, protocol)
    scores = score_pixels(network, torch.from_numpy(image)[None], protocol)[0]
    assert scores.dtype == torch.float32
    np.testing.assert_allclose(scores, expected, rtol=2e-5, atol=2e-5)


def test_half_precision_is_summed_in_float32():
    ((image, _),) = draw_scenes([(61, 40)])
    network = TinySegmenter().eval()
    half = score_pixels(network, torch.from_numpy(image)[None], PUBLISHED, "bf16")[0]
    assert half.dtype == torch.float32
    np.testing.assert_allclose(half, score_naively(network, image, PUBLISHED), rtol=0.1)
    assert len(half.unique()) > half.numel() / 2  # bfloat16 has 256 values between two powers of 2


def test_windows_are_as_far_apart_as_the_references():
    for crop in range(2, 2000):
        assert place_windows(crop + 1, crop) == [0, int(crop * (2.0 / 3.0))], crop
    assert place_windows(480, 480) == place_windows(100, 480) == [0]
    assert place_windows(800, 480) == [0, 320] and place_windows(801, 480) == [0, 320, 640]


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"name": "slid"}, "unknown protocol=slid; did you mean 'slide'? (whole, slide, centre, published)"),
        ({"name": "slide"}, "protocol=slide needs a crop of at least 2 pixels, not crop=None"),
        ({"name": "centre", "crop": 1}, "protocol=centre needs a crop of at least 2 pixels, not crop=1"),
        ({"name": "centre", "crop": 9, "base": 10}, "protocol=centre resizes to the crop: unset base and scales"),
        ({"name": "whole", "scales": (1, 0)}, "protocol=whole: scales=[1, 0] must be above 0"),
        ({"name": "whole", "scales": ()}, "protocol=whole: scales=[] must be above 0"),
    ],
)
def test_wrong_protocols(options, line):
    with pytest.raises(ConfigError) as error:
        RegionProtocol(**options)
    assert str(error.value) == line


def test_the_rule_in_words():
    assert WHOLE.text == "whole, own size"
    assert RegionProtocol("centre", crop=480).text == "short side 480 bilinear, centre crop 480"
    assert RegionProtocol("slide", crop=480, base=520).text == "slide, long side 520, windows of 480"
    assert PUBLISHED.text == "published, long side 30 times 0.5 0.75 1 1.75, windows of 24, flipped too, exp() summed"
