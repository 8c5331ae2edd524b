import hashlib

import numpy as np
import pytest
from PIL import Image

from resnest_imagenet.data.demo import FIGURES, write_demo_images
from resnest_imagenet.data.folder import read_image_folder
from resnest_imagenet.data.source import require_same_classes
from resnest_imagenet.errors import DataError


def digest(folder):
    files = sorted(path for path in folder.rglob("*.JPEG"))
    return hashlib.sha256(b"".join(str(f.relative_to(folder)).encode() + f.read_bytes() for f in files)).hexdigest()


def test_writes_a_sound_data_set_of_varied_sizes(tmp_path):
    assert write_demo_images(tmp_path / "demo", 0, train_per_class=5, val_per_class=2)
    train, val = (read_image_folder(str(tmp_path / "demo"), name, "x") for name in ("train", "val"))
    require_same_classes(train, val)
    assert (len(train), len(val), len(train.classes)) == (50, 20, 10)
    images = [Image.open(train.path(index).decode()) for index in range(50)]
    assert all(image.format == "JPEG" and image.mode == "RGB" for image in images)
    assert len({image.size for image in images}) > 25
    assert min(min(image.size) for image in images) >= 64


def test_is_deterministic_by_seed_and_differs_between_parts(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_demo_images(tmp_path / name, seed, train_per_class=1, val_per_class=1)
    assert digest(tmp_path / "a") == digest(tmp_path / "b") != digest(tmp_path / "c")
    first = {path.name: path.read_bytes() for path in (tmp_path / "a/train").rglob("*.JPEG")}
    assert all(path.read_bytes() != first[path.name] for path in (tmp_path / "a/val").rglob("*.JPEG"))


@pytest.mark.slow
def test_mean_colour_says_nothing_about_the_class(tmp_path):
    """A nearest-class-mean rule on the mean colour stays at chance, 10 %."""
    write_demo_images(tmp_path / "demo", 0, train_per_class=40, val_per_class=20)
    colours = {}
    for part in ("train", "val"):
        folder = read_image_folder(str(tmp_path / "demo"), part, "x")
        means = [np.array(Image.open(folder.path(i).decode())).mean((0, 1)) for i in range(len(folder))]
        colours[part] = np.array(means), folder.labels
    means, labels = colours["train"]
    centres = np.array([means[labels == label].mean(0) for label in range(len(FIGURES))])
    val_means, val_labels = colours["val"]
    nearest = ((val_means[:, None] - centres) ** 2).sum(-1).argmin(1)
    assert (nearest == val_labels).mean() < 0.2


def test_a_folder_of_another_name_stays(tmp_path):
    (tmp_path / "demo.tmp").mkdir()
    (tmp_path / "demo.tmp/mine").touch()
    write_demo_images(tmp_path / "demo", 0, train_per_class=1, val_per_class=1)
    assert {path.name for path in tmp_path.iterdir()} == {"demo", "demo.tmp"} and (tmp_path / "demo.tmp/mine").exists()


def test_does_not_write_into_a_folder_in_use(tmp_path):
    write_demo_images(tmp_path, 0, train_per_class=1, val_per_class=1)
    assert not write_demo_images(tmp_path, 0, train_per_class=1, val_per_class=1)
    with pytest.raises(DataError, match="not empty"):
        write_demo_images(tmp_path, 0, train_per_class=2, val_per_class=1)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match="cannot be written"):
        write_demo_images(tmp_path / "file" / "demo", 0, train_per_class=1, val_per_class=1)
