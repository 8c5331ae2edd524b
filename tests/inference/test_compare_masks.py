"""Two networks of segmentation on the same images: what differs, counted a second time pixel by pixel."""

import csv
import itertools
import re
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import resnest_imagenet
from browser import look_in_windows, needs_browser
from conftest import SCENE_COLOURS, compose_config
from resnest_imagenet.checkpoint import load_checkpoint, save_checkpoint
from resnest_imagenet.commands import compare as command
from resnest_imagenet.config_reading import CompareConfig
from resnest_imagenet.errors import ConfigError

pytestmark = [pytest.mark.slow, pytest.mark.process]


@pytest.fixture(scope="module")
def checkpoints(segmentation_run, tmp_path_factory):
    """A run's best network, and one that finds class 2 more often."""
    folder = tmp_path_factory.mktemp("other")
    content = load_checkpoint(segmentation_run / "checkpoints/best.pt")
    (name,) = (key for key in content["model"] if key.startswith("head.") and key.endswith("classify.bias"))
    content["model"][name] = content["model"][name] + torch.tensor([0, 0, 0.7, 0, 0, 0])
    save_checkpoint(content, folder / "best.pt")
    return segmentation_run / "checkpoints/best.pt", folder / "best.pt"


@pytest.fixture(scope="module")
def photos(segmentation_run):
    return segmentation_run.parent / "scenes/images/val"


@pytest.fixture(scope="module")
def comparison(checkpoints, photos):
    return resnest_imagenet.compare_masks([str(path) for path in checkpoints], photos)


def compare(*options):
    return command.compare_networks(compose_config("compare", CompareConfig, "device=cpu", *options))


def test_counts_as_a_walk_over_the_pixels_does(comparison, checkpoints, photos):
    masks = [[image.mask for image in resnest_imagenet.segment(path, photos)] for path in checkpoints]
    shared, covered, pixels = [0] * 6, [0] * 6, [[0] * 6, [0] * 6]
    for index, (first, second) in enumerate(zip(*masks, strict=True)):
        assert np.array_equal(comparison.read_masks(index), [first, second])
        differing: dict[tuple[int, int], int] = {}
        for a, b in zip(first.ravel().tolist(), second.ravel().tolist(), strict=True):
            pixels[0][a] += 1
            pixels[1][b] += 1
            if a == b:
                shared[a] += 1
                covered[a] += 1
            else:
                differing[a, b] = differing.get((a, b), 0) + 1
                covered[a] += 1
                covered[b] += 1
        assert comparison.differing[index] == sum(differing.values()) / first.size
        names, share = comparison.disagreements[index]
        largest = max(differing.values())
        labels = tuple(comparison.classes.index(name) for name in names)
        assert share == largest / first.size and differing[labels] == largest
    assert comparison.shared.tolist() == shared and comparison.covered.tolist() == covered
    assert comparison.pixels.tolist() == pixels
    assert comparison.differing.max() > 0 and len(comparison.order) > 1
    assert all(comparison.differing[a] >= comparison.differing[b] for a, b in itertools.pairwise(comparison.order))
    assert np.array_equal(comparison.palette, SCENE_COLOURS)


def test_the_command_prints_and_writes_the_same(comparison, checkpoints, photos, tmp_path, monkeypatch, capsys):
    arguments = [f"ckpt=[{checkpoints[0]},{checkpoints[1]}]", f"images={photos}", "device=cpu"]
    outputs = [f"csv={tmp_path}/out.csv", f"page={tmp_path}/out.html"]
    monkeypatch.setattr(sys, "argv", ["resnest-compare", *arguments, *outputs])
    command.main()
    printed = capsys.readouterr().out
    num_differing = np.count_nonzero(comparison.differing)
    share = f"{100 * comparison.differing.mean():.2f} %"
    assert f"on average {share} of an image differs; {num_differing} of 3 images differ" in printed
    rows = list(csv.DictReader((tmp_path / "out.csv").open()))
    assert [float(row["differing"]) for row in rows] == pytest.approx(comparison.differing.tolist(), abs=1e-6)
    for row, disagreement in zip(rows, comparison.disagreements, strict=True):
        names, share = disagreement or (("", ""), 0)
        assert [row[name] for name in comparison.names] == list(names)
        assert float(row["largest"]) == pytest.approx(share, abs=1e-6)
    page = (tmp_path / "out.html").read_text()
    assert page.count("<img ") == 3 * len(comparison.order)
    assert not re.search(r"(src|href)=\"(?!data:|#)", page) and "<script" not in page


@needs_browser
def test_the_page_in_a_browser(checkpoints, segmentation_run, tmp_path):
    both = f"ckpt=[{checkpoints[0]},{checkpoints[1]}]"
    places = (f"data.root={segmentation_run.parent / 'scenes'}", f"page={tmp_path}/out.html")
    comparison = compare(both, *places)
    widths = (1280, 400)
    for width, seen in zip(widths, look_in_windows(tmp_path / "out.html", widths, dark=True), strict=True):
        assert (seen["pictures"], seen["loaded"]) == (3 * len(comparison.order), [])
        assert seen["width"] <= width


def test_equal_networks_differ_nowhere_and_bad_images_are_skipped(checkpoints, photos, tmp_path):
    from resnest_imagenet.reports.compare_masks_page import render_mask_comparison

    (tmp_path / "bad.jpg").write_bytes(b"no image")
    Image.open(min(photos.iterdir())).save(tmp_path / "a.png")
    comparison = resnest_imagenet.compare_masks([checkpoints[0]] * 2, tmp_path)
    assert comparison.names == ("resnest14_half 1", "resnest14_half 2")
    assert comparison.differing.tolist() == [0] and len(comparison.order) == 0
    assert comparison.disagreements == (None,) and comparison.overlap[comparison.covered > 0].tolist() == [100.0] * int(
        (comparison.covered > 0).sum()
    )
    assert [line.partition(": ")[0] for line in comparison.skipped] == [f"{tmp_path}/bad.jpg"]
    assert "Nowhere: all masks are equal." in render_mask_comparison(comparison)


def test_refusals(checkpoints, photos, tmp_path):
    model = resnest_imagenet.build_model("resnest14_half", 3).state_dict()
    config = {"model": {"name": "resnest14_half"}, "train": {}}
    save_checkpoint({"model": model, "config": config, "classes": ["a", "b", "c"], "epoch": 1}, tmp_path / "cls.pt")
    content = load_checkpoint(checkpoints[0])
    content["classes"] = [*content["classes"][:-1], "other"]
    save_checkpoint(content, tmp_path / "other.pt")
    first, both = checkpoints[0], f"ckpt=[{checkpoints[0]},{checkpoints[1]}]"
    for options, message in (
        ([f"ckpt=[{first},{tmp_path}/cls.pt]"], "best.pt is of segmentation, .*cls.pt of classification: compare netw"),
        (
            [f"ckpt=[{first},{tmp_path}/other.pt]"],
            "best.pt has triangle as class 5, .*other.pt other: compare networks",
        ),
        ([both, "crop=64"], "^crop is of classification: .*best.pt is of segmentation"),
        ([both, "loader.workers=1"], "^loader is of classification: "),
        ([both, "protocol=paper"], "^protocol is of classification: choose own, whole, slide, centre or published$"),
    ):
        with pytest.raises(ConfigError, match=message) as error:
            compare(f"images={photos}", *options)
        assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match="^networks: give two networks or more$"):
        resnest_imagenet.compare_masks([first], photos)
