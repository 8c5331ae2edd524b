"""What nobody sets is as the weights' own evaluation has it, in every command; what that was not is said."""

import json

import pytest
import torch

from conftest import compose_config, evaluate_checkpoint, predict_classes
from resnest_imagenet import build_model
from resnest_imagenet.commands.compare import compare_networks
from resnest_imagenet.commands.explain import explain_images
from resnest_imagenet.commands.export import run as export
from resnest_imagenet.config_reading import (
    CompareConfig,
    EvalConfig,
    ExplainConfig,
    ExportConfig,
    OwnProtocolOptions,
    PredictConfig,
)
from resnest_imagenet.data.transforms import EvalTransform
from resnest_imagenet.inference import classifier
from resnest_imagenet.inference.classifier import choose_transforms
from resnest_imagenet.inference.compare import format_comparison
from resnest_imagenet.inference.describe import describe_input
from resnest_imagenet.recipe import ProtocolOptions
from resnest_imagenet.training.train import train
from resnest_imagenet.weights.card import open_network
from resnest_imagenet.weights.load import Weights, _find_published_test

OWN = OwnProtocolOptions(order="own", ratio="own", interpolation="own", antialias="own")
FAST = ("device=cpu", "loader.workers=1")
WORDS = "centre square of 0.6 of the short side, resized to 48 bilinear"


@pytest.fixture
def run(small_run, tmp_path):
    """A run of one epoch at 32 pixels, evaluated at 48 by a protocol of its own: its best.pt and its accuracy."""
    options = ("train.epochs=1", "train.warmup_epochs=0", "eval.crop=48", "protocol=ecentercrop", "protocol.ratio=0.6")
    state = train(small_run(*options, "protocol.interpolation=bilinear", "log.trackers=[]"))
    return tmp_path / "run/checkpoints/best.pt", state.best


@pytest.mark.slow
def test_every_command_sees_images_as_the_run_did(run, demo_images, tmp_path, capsys, monkeypatch):
    import timm

    ckpt, top1 = run
    place = f"data.root={demo_images}"
    predictions = tmp_path / "predictions.csv"
    options = (f"ckpt={ckpt}", f"predictions={predictions}", "batch_size=16")
    (result,) = evaluate_checkpoint(compose_config("eval", EvalConfig, *FAST, place, *options))
    assert (result.top1, result.crop, result.protocol) == (top1, 48, WORDS)
    assert predictions.read_text() == (tmp_path / "run/predictions.csv").read_text()

    config = compose_config("compare", CompareConfig, *FAST, f"ckpt=[{ckpt},{ckpt}]", place)
    comparison = compare_networks(config)
    assert 100 * comparison.is_right.mean(1) == pytest.approx([top1, top1]) and comparison.protocols == (WORDS, WORDS)
    assert WORDS in format_comparison(comparison).splitlines()

    seen = []
    real = classifier.build_loader
    monkeypatch.setattr(classifier, "build_loader", lambda *args: seen.append(args[3]) or real(*args))
    single = (*FAST, f"ckpt={ckpt}", f"images={demo_images}/val/disk/disk_0_00000.JPEG")
    predict_classes(compose_config("predict", PredictConfig, *single))
    explain_images(compose_config("explain", ExplainConfig, *single, f"out={tmp_path}/explained"))
    assert [transform.protocol for transform in seen] == [WORDS, WORDS]

    config = compose_config("export", ExportConfig, f"ckpt={ckpt}", "format=hub", f"out={tmp_path}/hub")
    metadata = open_network(str(ckpt), describe_input)[2].to_metadata()  # of onnx and torch_export
    assert (metadata["crop"], metadata["ratio"], metadata["order"]) == ("48", "0.6", "crop_resize")
    export(config)
    data = timm.data.resolve_model_data_config(timm.create_model(f"local-dir:{tmp_path}/hub", pretrained=True))
    assert (data["input_size"], data["crop_pct"], data["interpolation"]) == ([3, 48, 48], 0.6, "bilinear")
    assert capsys.readouterr().err == ""  # nothing had to be assumed

    # What the card tells to evaluate the bare weights of the folder gives the same again.
    words = (tmp_path / "hub/README.md").read_text().partition("resnest-eval ckpt=FOLDER/")[2].partition("`")[0].split()
    options = [word for word in words[1:] if word != "data.root=..."]
    bare = compose_config("eval", EvalConfig, *FAST, f"ckpt={tmp_path}/hub/{words[0]}", place, *options)
    assert evaluate_checkpoint(bare) == [result]


@pytest.mark.process
def test_networks_that_see_images_otherwise_are_compared_each_by_its_own(demo_images, tmp_path):
    torch.manual_seed(0)
    state = build_model("resnest14_half", 10).state_dict()
    protocol = {name: getattr(EvalTransform(32), name) for name in ProtocolOptions.model_fields}
    accuracies = []
    for crop in (32, 64):
        config = {"model": {"name": "resnest14_half"}, "train": {"crop": crop}, "eval": {"crop": crop}}
        config["protocol"] = protocol
        classes = sorted(path.name for path in (demo_images / "val").iterdir())
        torch.save({"model": state, "config": config, "classes": classes, "epoch": 1}, tmp_path / f"{crop}.pt")
        place = (f"ckpt={tmp_path}/{crop}.pt", f"data.root={demo_images}")
        accuracies += evaluate_checkpoint(compose_config("eval", EvalConfig, *FAST, *place))
    both = (f"ckpt=[{tmp_path}/32.pt,{tmp_path}/64.pt]", f"data.root={demo_images}", f"page={tmp_path}/page.html")
    comparison = compare_networks(compose_config("compare", CompareConfig, *FAST, *both))
    assert comparison.is_right.sum(1).tolist() == [each.correct1 for each in accuracies]
    lines = [f"resnest14_half ({each.crop}.pt): {each.protocol}" for each in accuracies]
    assert set(lines) <= set(format_comparison(comparison).splitlines())
    assert "; ".join(lines) in (tmp_path / "page.html").read_text()


PAPER = ProtocolOptions(order="resize_crop", ratio=0.875, interpolation="auto", antialias=True)
FULL = ProtocolOptions(order="resize_crop", ratio=1.0, interpolation="bicubic", antialias=True)


@pytest.mark.parametrize(
    ("weights", "crops", "options", "protocols", "line"),
    [
        ({"crop": 56, "protocol": FULL, "training": {"crop": 48}}, None, (), ["short side 56 bicubic"], None),
        (
            {"crop": 56, "protocol": FULL, "training": {"crop": 48}},
            [48, 56],
            (),
            ["short side 48", "short side 56"],
            None,
        ),
        (
            {"crop": 56, "protocol": FULL, "training": {"crop": 48}},
            [224],
            ("protocol.ratio=0.5",),  # this alone is changed
            ["short side 448 bicubic, centre crop 224"],
            "x.pt: crop=224 is not that of its run, which evaluated at 56 and trained at 48\n",
        ),
        ({"crop": 56, "protocol": FULL, "training": {}}, None, ("protocol=paper",), ["short side 64 bilinear"], None),
        ({}, [320], (), ["short side 366 bicubic, centre crop 320"], None),
        (
            {},
            None,
            (),
            ["short side 366 bicubic, centre crop 320"],
            "x.pt: taking the usual test crop of resnest200: short side 366 bicubic, centre crop 320; "
            "crop=... sets another\n",
        ),
        ({"training": {}}, None, ("protocol=full",), ["short side 320"], "x.pt: taking the usual test crop"),
    ],
)
def test_what_is_chosen_and_said(weights, crops, options, protocols, line, capsys):
    protocol = compose_config("eval", EvalConfig, "ckpt=x", "data.root=x", *options).protocol.list_changes()
    transforms = choose_transforms(Weights("x.pt", {}, **weights), "resnest200", crops, protocol)
    for transform, words in zip(transforms, protocols, strict=True):
        assert transform.protocol.startswith(words)
    printed = capsys.readouterr().err
    assert printed.startswith(line) if line else printed == ""


def test_published_weights_are_tested_as_published():
    import timm

    assert [_find_published_test(f"official:{name}", name) for name in ("resnest50", "resnest269")] == [
        (224, None),
        (416, None),
    ]
    crop, protocol = _find_published_test("timm:resnet50d.ra2_in1k", "resnet50d")
    config = timm.get_pretrained_cfg("resnet50d.ra2_in1k")
    assert (crop, protocol.ratio, protocol.interpolation) == (288, 0.95, "bicubic")
    assert (config.test_input_size[-1], config.test_crop_pct) == (288, 0.95)
    crop, protocol = _find_published_test("timm:resnest101e.in1k", "resnest101")
    assert EvalTransform.of(crop, protocol).protocol == "short side 293 bilinear, centre crop 256"


def test_own_is_the_default():
    for options in ((), ("protocol=own",), ("crop=null",)):
        config = compose_config("eval", EvalConfig, "ckpt=x", "data.root=x", *options)
        assert (config.crop, config.protocol) == (None, OWN)
    config = compose_config("eval", EvalConfig, "ckpt=x", "data.root=x", "crop=[224,320]", "protocol.antialias=false")
    assert (config.crop, config.protocol.list_changes()) == ([224, 320], {"antialias": False})


def test_a_checkpoint_that_lacks_its_evaluation_is_taken_as_bare(tmp_path, capsys):
    config = {"model": {"name": "resnest14_half"}, "train": {"crop": 32}, "eval": {"crop": "large"}}
    state = build_model("resnest14_half", 3).state_dict()
    torch.save({"model": state, "config": config, "classes": ["a", "b", "c"], "epoch": 1}, tmp_path / "old.pt")
    _, _, card = open_network(f"{tmp_path}/old.pt", describe_input)
    assert card.images.crop == 224 and json.loads(card.to_metadata()["antialias"]) is True
    assert "taking the usual test crop of resnest14_half" in capsys.readouterr().err
