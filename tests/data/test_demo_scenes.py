"""The demo scenes: sound, the same for a seed, and not to be told by colour."""

import hashlib

import numpy as np
import pytest

from resnest_imagenet.data.demo import FIGURES
from resnest_imagenet.data.demo_scenes import OVERSAMPLING, SHAPES, draw_scene, fill_outline, write_demo_scenes
from resnest_imagenet.data.scenes import open_scenes
from resnest_imagenet.errors import DataError


def test_writes_scenes_that_can_be_opened(tmp_path):
    assert write_demo_scenes(tmp_path / "demo", 0, train_scenes=20, val_scenes=8)
    for part, count in (("train", 20), ("val", 8)):
        scenes = open_scenes("masks", str(tmp_path / "demo"), part)
        assert (len(scenes), scenes.classes, scenes.images.notes) == (count, ("background", *SHAPES), ())
        sizes = set()
        for index in range(count):
            picture, mask = scenes.read(index)
            sizes.add(picture.size)
            assert min(picture.size) >= 104 and max(picture.size) <= 144
            assert mask.max() < 6 and 0.02 < (mask > 0).mean() < 0.8
        assert len(sizes) > count / 2
    assert scenes.palette[0].tolist() == [0, 0, 0]


def test_every_class_is_drawn_alike_often():
    counts = np.zeros(6)
    for number in range(150):
        _, mask = draw_scene(np.random.default_rng(number))
        counts += np.isin(np.arange(6), mask)
    assert counts[0] == 150 and counts[1:].min() > 25 and counts[1:].max() < 70


@pytest.mark.parametrize("name", SHAPES)
def test_a_figure_lies_within_its_outline(name):
    y, x = np.mgrid[-1.2 : 1.2 : 60j * OVERSAMPLING, -1.2 : 1.2 : 60j * OVERSAMPLING]
    outline, figure = fill_outline(name, x, y), FIGURES[name](x, y)
    assert not (figure & ~outline).any() and figure.sum() > 0.4 * outline.sum()


def test_is_deterministic_by_seed_and_differs_between_parts(tmp_path):
    def digest(name):
        files = sorted(path for path in (tmp_path / name).rglob("*") if path.suffix in (".JPEG", ".png"))
        assert len(files) == 6
        return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()

    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_demo_scenes(tmp_path / name, seed, train_scenes=2, val_scenes=1)
    assert digest("a") == digest("b") != digest("c")
    first = [(tmp_path / f"a/images/{part}/scene_1_00000.JPEG").read_bytes() for part in ("train", "val")]
    assert first[0] != first[1]
    assert not write_demo_scenes(tmp_path / "a", 1, train_scenes=2, val_scenes=1)
    with pytest.raises(DataError, match="not empty"):
        write_demo_scenes(tmp_path / "a", 1, train_scenes=3, val_scenes=1)


@pytest.mark.slow
def test_a_linear_classifier_of_pixels_stays_under_a_quarter(tmp_path):
    """Of a pixel's colour and place, by least squares on equally weighted classes: mIoU on held-out scenes."""

    def read(part):
        scenes = open_scenes("masks", str(tmp_path / "demo"), part)
        features, labels = [], []
        for index in range(len(scenes)):
            picture, mask = scenes.read(index)
            colours = np.array(picture)[::3, ::3].reshape(-1, 3) / 255
            rows, columns = (place[::3, ::3].reshape(-1, 1) / 144 for place in np.indices(mask.shape))
            features.append(np.hstack([colours, rows, columns, np.ones_like(rows)]))
            labels.append(mask[::3, ::3].ravel())
        return np.vstack(features), np.concatenate(labels)

    write_demo_scenes(tmp_path / "demo", 0, train_scenes=60, val_scenes=30)
    (pixels, labels), (val_pixels, val_labels) = read("train"), read("val")
    scores = []
    for balance in (0, 0.5, 1):  # of the weights of the classes
        weights = np.bincount(labels, minlength=6)[labels][:, None] ** (-balance / 2)
        solution = np.linalg.lstsq(pixels * weights, np.eye(6)[labels] * weights, rcond=None)[0]
        matrix = np.bincount(val_labels * 6 + (val_pixels @ solution).argmax(1), minlength=36).reshape(6, 6)
        scores.append((np.diag(matrix) / (matrix.sum(0) + matrix.sum(1) - np.diag(matrix))).mean())
    assert 0.05 < max(scores) < 0.25, scores
