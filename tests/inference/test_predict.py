import csv
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import compose_config, predict_classes
from resnest_imagenet import build_model
from resnest_imagenet.commands import predict as command
from resnest_imagenet.config_reading import PredictConfig
from resnest_imagenet.data.demo import FIGURES
from resnest_imagenet.data.folder import ImageFolder, find_images
from resnest_imagenet.errors import ConfigError, DataError
from resnest_imagenet.inference.predict import (
    Prediction,
    encode_predictions,
    find_true_labels,
    format_judgement,
    format_predictions,
)
from resnest_imagenet.weights.load import list_classes

OPTIONS = ("device=cpu", "crop=32", "loader.workers=1", "batch_size=3")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A network for the demo's classes, with all that a checkpoint of ours tells."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "best.pt"
    config = {"model": {"name": "resnest14_half"}, "train": {}}
    model = build_model("resnest14_half", 10).state_dict()
    torch.save({"model": model, "config": config, "classes": sorted(FIGURES), "epoch": 1}, path)
    return path


def predict(*options):
    config = compose_config("predict", PredictConfig, *OPTIONS, *options)
    return predict_classes(config)


@pytest.mark.process
@pytest.mark.parametrize("loader", ["dali", "torchvision"])
def test_predicts_what_the_network_says(checkpoint, demo_images, tmp_path, loader):
    for suffix in ("json", "csv"):
        options = (f"ckpt={checkpoint}", f"images={demo_images}/val/disk", f"loader={loader}", "top=3")
        predictions, faults = predict(*options, f"out={tmp_path}/out.{suffix}")
    assert not faults and len(predictions) == 12
    written = json.loads((tmp_path / "out.json").read_text())
    rows = list(csv.DictReader((tmp_path / "out.csv").open()))
    assert [row["label"] for row in rows] == [each["label"] for each in written] == [p.label for p in predictions]
    files = sorted(str(path) for path in (demo_images / "val/disk").iterdir())
    assert [p.file for p in predictions[::3]] == files
    # The same image by hand: 32 / 0.875 pixels, the middle of them.
    from torchvision.transforms import v2

    transform = v2.Compose([v2.Resize(37), v2.CenterCrop(32), v2.PILToTensor(), v2.ToDtype(torch.float, scale=True)])
    image = v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))(transform(Image.open(files[0])))
    model = build_model("resnest14_half", 10)
    model.load_state_dict(torch.load(checkpoint, weights_only=True)["model"])
    with torch.no_grad():
        probabilities = model.eval()(image[None])[0].softmax(0)
    for prediction in predictions[:3]:
        expected = probabilities[sorted(FIGURES).index(prediction.label)]
        assert prediction.probability == pytest.approx(expected.item(), abs=0.01)
    assert [p.rank for p in predictions[:3]] == [1, 2, 3]
    assert {row["true_label"] for row in rows} == {each["true_label"] for each in written} == {"disk"}
    with torch.no_grad():
        mirrored = model(image.flip(2)[None])[0].softmax(0)
    averaged, _ = predict(f"ckpt={checkpoint}", f"images={files[0]}", f"loader={loader}", "tta=flip", "top=10")
    expected = [(probabilities + mirrored)[sorted(FIGURES).index(p.label)].item() / 2 for p in averaged]
    assert [p.probability for p in averaged] == pytest.approx(expected, abs=0.01)
    assert expected != pytest.approx([probabilities[sorted(FIGURES).index(p.label)].item() for p in averaged], abs=0.01)


@pytest.mark.process
def test_imagenets_classes_have_names(demo_images, tmp_path):
    path = tmp_path / "bare.pth"
    torch.save(build_model("resnest14_half").state_dict(), path)
    predictions, _ = predict(f"ckpt={path}", "model=resnest14_half", f"images={demo_images}/val/disk", "top=1000")
    words = {p.label: p.description for p in predictions}
    assert len(words) == 1000 and words["n01443537"] == "goldfish, Carassius auratus"
    assert "goldfish, Carassius auratus (n01443537)" in format_predictions(predictions)


@pytest.mark.process
def test_bad_images_are_named_and_skipped(checkpoint, demo_images, tmp_path, monkeypatch, capsys):
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    os.mkfifo(tmp_path / "pipe\x1b[31m.jpg")
    images = f"images=[{tmp_path},{demo_images}/val/ring]"
    monkeypatch.setattr(sys, "argv", ["resnest-predict", *OPTIONS, f"ckpt={checkpoint}", images])
    with pytest.raises(SystemExit, match="^3$"):
        command.main()
    printed = capsys.readouterr()
    assert printed.err.splitlines() == [
        f"{tmp_path}/bad.jpg: not a readable image (of no known format); skipped",
        f"{tmp_path}/pipe\\x1b[31m.jpg: not a file but a named pipe; skipped",
        "resnest-predict: images skipped: 2",
    ]
    assert printed.out.count(".JPEG") == 4
    predictions, faults = predict(f"ckpt={checkpoint}", f"images={tmp_path}/bad.jpg")
    assert not predictions and len(faults) == 1


def test_images_are_files_folders_and_patterns(demo_images, tmp_path, monkeypatch):
    monkeypatch.chdir(demo_images / "val")
    (one,) = find_images(["disk/disk_0_00000.JPEG"]).files
    assert one == str(demo_images / "val/disk/disk_0_00000.JPEG").encode()
    assert len(find_images(["."])) == 40
    assert len(find_images(["*/*_00001.JPEG"])) == 10
    assert len(find_images(["disk", "disk/*0.JPEG", str(demo_images / "val" / "ring")])) == 8  # each once
    with pytest.raises(DataError, match=r"images=nowhere\*: no such file or folder"):
        find_images(["nowhere*"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no images in it"):
        find_images([str(tmp_path / "empty")])


def test_images_in_folders_of_classes_are_judged():
    names = ["x/goldfish/1.jpg", "x/goldfish/2.jpg", "x/n01440764/1.jpg", "x/crane/1.jpg", "x/other/1.jpg", "x/1.jpg"]
    images = ImageFolder(Path("/"), ("",), np.array([name.encode() for name in names]), np.zeros(6, dtype=np.int64))
    goldfish, tench = "n01443537", "n01440764"
    truth = find_true_labels(images, list_classes(None, 1000))
    assert truth == [goldfish, goldfish, tench, None, None, None]  # crane: a bird or a machine
    answers = [goldfish, tench, tench, goldfish, goldfish, goldfish]
    predictions = [
        Prediction(name, rank, answer, answer, 0.5, label)
        for name, answer, label in zip(names, answers, truth, strict=True)
        for rank in (1, 2)
    ]
    assert format_judgement(predictions).splitlines() == [
        "right: 2 of 3 images in folders of their class, 66.67 %",
        "",
        "class      images precision % recall %   F1 %",
        "tench           1       50.00   100.00  66.67",
        "goldfish        2      100.00    50.00  66.67",
        "mean of 2       3       75.00    75.00  66.67",
    ]
    assert format_judgement(predictions[:4]) == "right: 1 of 2 images in folders of their class, 50.00 %"
    assert format_judgement(predictions[6:]) == format_judgement([]) == ""
    header = "file,rank,label,description,probability"
    for rows, columns in ((predictions, f"{header},true_label"), (predictions[6:], header)):
        assert encode_predictions(rows, ".csv").partition("\n")[0] == columns
        assert ",".join(json.loads(encode_predictions(rows, ".json"))[-1]) == columns


def test_refusals(checkpoint, demo_images):
    with pytest.raises(ConfigError, match=r"ends neither in \.csv nor in \.json"):
        predict(f"ckpt={checkpoint}", f"images={demo_images}", "out=out.txt")
    for options, message in {
        ("features=layer4",): "^features=layer4 writes a .npz file: give out=NAME.npz$",
        ("features=head", "out=a.csv"): "^features=head writes a .npz file: give out=NAME.npz, not out=a.csv$",
        ("out=a.npz",): "^out=a.npz is a file of features: give features=layer4$",
        ("features=layer4", "tta=flip", "out=a.npz"): "^give either features=layer4 or tta=flip$",
        ("features=layer5", "out=a.npz"): "^features=layer5: input should be 'layer1', 'layer2'",
        ("tta=mirror",): "^tta=mirror: input should be 'flip'$",
    }.items():
        with pytest.raises(ConfigError, match=message):
            compose_config("predict", PredictConfig, f"ckpt={checkpoint}", f"images={demo_images}", *options)
