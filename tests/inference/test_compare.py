import csv
import html.parser
import os
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from browser import look_in_windows, needs_browser
from conftest import compose_config, evaluate_checkpoint
from resnest_imagenet import build_model
from resnest_imagenet.commands.compare import _list_classified_images, compare_networks
from resnest_imagenet.config_reading import CompareConfig
from resnest_imagenet.data.demo import FIGURES
from resnest_imagenet.data.folder import read_image_folder
from resnest_imagenet.data.transforms import EvalTransform
from resnest_imagenet.errors import ConfigError
from resnest_imagenet.inference.classifier import Classifier
from resnest_imagenet.inference.compare import (
    Comparison,
    _title,
    describe_verdict,
    distinguish,
    format_comparison,
    mcnemar_p,
)
from resnest_imagenet.weights.load import Weights

OPTIONS = ("device=cpu", "crop=32", "loader.workers=1", "batch_size=16")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Two networks for the demo's classes, the second with its outputs in another order."""
    paths = []
    for seed, classes in enumerate((sorted(FIGURES), sorted(FIGURES, reverse=True))):
        torch.manual_seed(seed)
        path = tmp_path_factory.mktemp("weights") / "best.pt"
        config = {"model": {"name": "resnest14_half"}, "train": {}}
        torch.save(
            {"model": build_model("resnest14_half", 10).state_dict(), "config": config}
            | {"classes": classes, "epoch": 1},
            path,
        )
        paths.append(path)
    return paths


def compare(*options):
    return compare_networks(compose_config("compare", CompareConfig, *OPTIONS, *options))


@pytest.mark.process
def test_images_that_cannot_be_used_are_skipped(checkpoints, demo_images, tmp_path, capfd):
    for label, name, content in (("ring", "b.jpg", b"<html>"), ("disk", "a.jpg", b""), ("disk", ".hidden.jpg", b"")):
        (tmp_path / label).mkdir(exist_ok=True)
        (tmp_path / label / name).write_bytes(content)
    os.mkfifo(tmp_path / "ring/a.jpg")
    for path in (demo_images / "val/ring").iterdir():
        os.link(path, tmp_path / "ring" / path.name)
    comparison = compare(f"ckpt=[{checkpoints[0]},{checkpoints[1]}]", f"images={tmp_path}", f"page={tmp_path}/p.html")
    assert comparison.probabilities.shape == (2, 4)
    assert [line.removeprefix(f"{tmp_path}/") for line in comparison.skipped] == [
        "disk/a.jpg: not a readable image (it is empty)",
        "ring/a.jpg: not a file but a named pipe",
        "ring/b.jpg: not a readable image (of no known format)",
    ]
    table = format_comparison(comparison).splitlines()
    assert [table[2].split(), table[3].split()[:2]] == [["disk", "0", "-", "-"], ["ring", "4"]]
    captured = capfd.readouterr()
    assert captured.err == f"{tmp_path}: 1 hidden files or folders are skipped (the first: disk/.hidden.jpg)\n"


@pytest.mark.process
@pytest.mark.parametrize("place", ["data.root={}", "images={}/val"])
def test_counts_as_an_evaluation_does(checkpoints, demo_images, evaluation_of, tmp_path, place):
    outputs = (f"csv={tmp_path}/out.csv", f"page={tmp_path}/out.html")
    found = compare(f"ckpt=[{checkpoints[0]},{checkpoints[1]}]", place.format(demo_images), *outputs)
    for row, checkpoint in enumerate(checkpoints):
        (expected,) = evaluate_checkpoint(evaluation_of(checkpoint))
        assert (found.is_right[row].sum(), found.in_top5[row].sum()) == (expected.correct1, expected.correct5)
    assert found.probabilities.shape == (2, 40)
    rows = list(csv.DictReader((tmp_path / "out.csv").open()))
    for row, name in enumerate(found.names):
        assert [float(line[f"{name} p"]) for line in rows] == pytest.approx(found.probabilities[row].tolist(), abs=1e-6)
        right = [line[f"{name} predicted"] == line["class"] for line in rows]
        assert right == found.is_right[row].tolist()
    page = (tmp_path / "out.html").read_text()
    assert page.count("<figure>") == len(found.disagreements) > 0
    assert "http" not in page and "<script" not in page
    html.parser.HTMLParser().feed(page)


def make_comparison(folder):
    """Two networks, two classes, four images."""
    for name in ("a/1.png", "a/2.png", "b/1.png", "b/2.png"):
        (folder / "val" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "val" / name).touch()
    probabilities = np.array([[0.9, 0.4, 0.8, 0.7], [0.6, 0.8, 0.3, 0.9]])
    predicted = np.array([["a", "b", "b", "b"], ["a", "a", "a", "b"]], dtype=object)
    images = read_image_folder(str(folder), "val", "data.val_dir")
    return Comparison(
        ("one", "two"),
        images,
        images.classes,
        probabilities,
        predicted,
        probabilities > 0,
        probabilities > 0.5,
        ("centre crop 32", "centre crop 64"),
    )


def test_the_table(tmp_path):
    comparison = make_comparison(tmp_path)
    lines = [line.split() for line in format_comparison(comparison).splitlines()]
    assert lines[2] == ["a", "2", "0.6500", "0.3500", "0.7000", "0.3000"]
    assert lines[4] == ["total", "4", "2.80", "1.20", "2.60", "1.40"]
    assert lines[5] == ["average", "0.7000", "0.3000", "0.6500", "0.3500"]
    assert lines[6] == ["top-1", "%", "75.00", "75.00"]
    assert [" ".join(line) for line in lines[8:10]] == ["one: centre crop 32", "two: centre crop 64"]
    assert " ".join(lines[10]) == "only one right: 1, only two right: 1; McNemar's exact p = 1"
    assert " ".join(lines[11]).startswith("one 75.00 % against two 75.00 % of 4 images, p = 1: no difference")
    assert comparison.disagreements.tolist() == [2, 1]


def test_top5_of_networks_with_few_classes_is_not_shown(tmp_path):
    comparison = make_comparison(tmp_path)
    from resnest_imagenet.reports.compare_page import _render_totals  # late: it imports torchvision

    few = replace(comparison, has_top5=False)
    lines = format_comparison(comparison).splitlines()
    assert lines[7].startswith("top-5 %") and format_comparison(few).splitlines() == lines[:7] + lines[8:]
    assert "top-5 %" in _render_totals(comparison) and "top-5" not in _render_totals(few)


@pytest.mark.slow
def test_synsets_stand_in_words():
    assert _title(("n01443537", "own")) == ("goldfish (n01443537)", "own")


@pytest.mark.parametrize(
    ("sources", "names"),
    [
        (["runs/a/checkpoints/best.pt", "runs/b/checkpoints/best.pt"], ("net (a)", "net (b)")),
        (["a/best.pt", "a/best.pt"], ("net 1", "net 2")),
        (["best.pt", "runs/best.pt", "x.pth"], ("net (best.pt)", "net (runs/best.pt)", "net (x.pth)")),
    ],
)
def test_networks_of_the_same_name_are_told_apart(sources, names):
    see, module = (EvalTransform(32),), torch.nn.Identity()
    assert distinguish([Classifier(Weights(source, {}), "net", (), see, module) for source in sources]) == names


def test_mcnemar():
    assert mcnemar_p(0, 0) == 1
    assert mcnemar_p(3, 3) == 1
    # Two-sided binomial: 2 * (1 + 10) / 2**10.
    assert mcnemar_p(1, 9) == mcnemar_p(9, 1) == pytest.approx(22 / 1024)
    assert 0 < mcnemar_p(900, 1100) < 1e-4


def test_refusals(checkpoints, demo_images):
    both = f"ckpt=[{checkpoints[0]},{checkpoints[1]}]"
    with pytest.raises(ConfigError, match=r"give either data\.root=\.\.\. or images="):
        compare(both)
    with pytest.raises(ConfigError, match="models has 1 names, ckpt 2"):
        compare(both, f"data.root={demo_images}", "models=[resnest50]")
    with pytest.raises(ConfigError, match="ckpt"):
        compare(f"ckpt=[{checkpoints[0]}]", f"data.root={demo_images}")


@needs_browser
@pytest.mark.process
def test_the_page_in_a_browser(checkpoints, demo_images, tmp_path):
    page = tmp_path / "out.html"
    comparison = compare(f"ckpt=[{checkpoints[0]},{checkpoints[1]}]", f"data.root={demo_images}", f"page={page}")
    widths = (1280, 400)
    for width, seen in zip(widths, look_in_windows(page, widths), strict=True):
        assert (seen["pictures"], seen["loaded"]) == (len(comparison.disagreements), [])
        assert (seen["width"] <= width, seen["outside"]) == (True, [])


def test_the_page_begins_with_the_verdict_and_sorts_classes_by_difference(tmp_path, monkeypatch):
    """Of the comparison by hand: three of four images each; the first network is better at one class, worse at one."""
    from resnest_imagenet.reports import compare_page  # late: it imports torchvision

    comparison = make_comparison(tmp_path)
    assert describe_verdict(comparison) == (
        "one 75.00 % against two 75.00 % of 4 images, p = 1: no difference that these images show"
    )
    many = replace(comparison, is_right=np.array([[True] * 20 + [False], [False] * 20 + [True]]))
    assert describe_verdict(many) == "one 95.24 % against two 4.76 % of 21 images, p < 0.001"
    monkeypatch.setattr(compare_page, "render_picture", lambda encoded, truth, caption: "")  # the files are empty
    page = compare_page.render_comparison(comparison)
    assert page.index("class=verdict>one 75.00 % against two 75.00 %") < page.index("<table")
    assert "error" not in page and "total" not in page
    rows = [re.findall(r"<td>(.*?)</td>", row) for row in re.findall(r"<tr>(<td>.*?)</tr>", page)]
    classes = [[re.sub(r"<[^>]*>|[\s\u2007]", "", cell) for cell in row] for row in rows if len(row) == 7]
    assert classes == [
        ["b", "2", "+50.0", "100.0", "0.7500", "50.0", "0.6000"],
        ["a", "2", "-50.0", "50.0", "0.6500", "100.0", "0.7000"],
    ]


def test_networks_of_one_split_are_compared_on_it_and_those_of_two_on_neither(tmp_path):
    """Wherever the network with the split stands; one without a run, as published weights, has none."""
    for label in "ab":
        (tmp_path / label).mkdir()
        for number in range(10):
            (tmp_path / label / f"{number}.jpg").touch()
    config = SimpleNamespace(images=None, data=SimpleNamespace(root=str(tmp_path), val_dir="val"))
    split = {"kind": "folder", "root": "/elsewhere", "val_split": 0.2, "split_seed": 0, "train_dir": "train"}

    def list_images(*runs):
        weights = [SimpleNamespace(source=f"{name}.pt", run=run) for name, run in zip("xy", runs, strict=False)]
        return _list_classified_images(config, weights)

    first = list_images({"data": split})
    assert len(first) == 4
    for runs in ((None, {"data": split}), ({"data": split}, None), ({"data": split}, {"data": split})):
        assert list_images(*runs).files.tolist() == first.files.tolist()
    with pytest.raises(ConfigError, match="^y.pt has other validation images than x.pt .*split_seed=7.*: set images"):
        list_images({"data": split}, {"data": {**split, "split_seed": 7}})
