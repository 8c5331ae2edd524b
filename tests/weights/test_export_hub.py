"""Folders for the Hugging Face hub, read by timm itself."""

import json

import pytest
import torch
from huggingface_hub import constants

from conftest import compose_config, evaluate_checkpoint
from resnest_imagenet import build_model, list_models
from resnest_imagenet.checkpoint import load_checkpoint, save_checkpoint
from resnest_imagenet.commands.export import run
from resnest_imagenet.config_reading import ExportConfig
from resnest_imagenet.errors import ConfigError
from resnest_imagenet.inference.describe import describe_input
from resnest_imagenet.weights import hub
from resnest_imagenet.weights.card import Card
from resnest_imagenet.weights.hub import describe_for_timm
from resnest_imagenet.weights.load import Weights

NAME = "resnest14_half"
CLASSES = ["checker", "cross", "disk", "dots", "ring", "spokes", "square", "stripes", "target", "triangle"]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return build_model(NAME, len(CLASSES), zero_gamma=False).eval()


def save_run(model, path, **more):
    """Write what this project's checkpoints hold."""
    config = {"model": {"name": NAME}, "train": {}}
    save_checkpoint({"model": model.state_dict(), "config": config, "classes": CLASSES, "epoch": 1, **more}, path)
    return path


def export(checkpoint, *overrides):
    config = compose_config("export", ExportConfig, f"ckpt={checkpoint}", "format=hub", *overrides)
    run(config)
    return config


def assert_same_logits(one, other, side=64):
    images = torch.randn(2, 3, side, side)
    with torch.no_grad():
        torch.testing.assert_close(one.eval()(images), other.eval()(images), rtol=1e-4, atol=1e-4)


def describe_default(name):
    """Return the input of bare weights."""
    return describe_input(Weights("x", {}), name)


def describe(name, num_classes, device):
    """Return our network and what is said of it to timm."""
    with torch.device(device):
        model = build_model(name, num_classes, zero_gamma=False)
    return model, describe_for_timm(Card(name, describe_default(name), None), model.state_dict())


@pytest.mark.parametrize("name", [name for name in list_models() if not name.endswith("_msra")])
@pytest.mark.slow
def test_timm_builds_every_network(name, tmp_path):
    import timm

    model, described = describe(name, 7, "meta")
    (tmp_path / "config.json").write_text(json.dumps(described))
    with torch.device("meta"):
        theirs = timm.create_model(f"local-dir:{tmp_path}")
    assert {k: v.shape for k, v in theirs.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}
    assert theirs.num_features == described["num_features"]
    assert theirs.pretrained_cfg["num_classes"] == 7
    conv, fc = (theirs.get_submodule(theirs.pretrained_cfg[key]) for key in ("first_conv", "classifier"))
    assert conv.in_channels == 3 and fc.out_features == 7


def test_timm_has_no_msra_networks():
    with pytest.raises(ConfigError, match="its resnet50 has other strides than resnet50_msra"):
        describe("resnet50_msra", 7, "meta")


# The place of the pool and the sigmoid of radix 1 are in no shape.
@pytest.mark.parametrize("name", ["resnest50_fast_2s1x64d", "resnest50_fast_1s2x40d", "skresnext101_32x4d"])
@pytest.mark.slow
def test_what_timm_has_no_name_for_computes_the_same(name, tmp_path):
    import timm

    torch.manual_seed(0)
    model, described = describe(name, 7, "cpu")
    (tmp_path / "config.json").write_text(json.dumps(described))
    theirs = timm.create_model(f"local-dir:{tmp_path}")
    theirs.load_state_dict(model.state_dict())
    for part in (model, theirs):  # logits that do not explode
        torch.nn.init.normal_(part.fc.weight, std=1e-4, generator=torch.Generator().manual_seed(0))
    assert_same_logits(model, theirs, 32)


@pytest.mark.slow
def test_timm_and_this_project_load_the_folder(model, tmp_path, evaluation_of, capsys):
    import timm

    out = tmp_path / "new/net"
    export(save_run(model, tmp_path / "step-1.pt"), f"out={out}", "crop=64", "protocol=full")
    line = capsys.readouterr().out
    assert line.startswith(f"wrote {out}: {NAME} as timm's resnest50d with model_args; model.safetensors has ")
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    theirs = timm.create_model(f"local-dir:{out}", pretrained=True)
    assert_same_logits(model, theirs)
    assert theirs.pretrained_cfg["label_names"] == CLASSES
    data = timm.data.resolve_model_data_config(theirs)
    assert (tuple(data["input_size"]), data["crop_pct"], data["interpolation"]) == ((3, 64, 64), 1.0, "bilinear")
    assert (tuple(data["mean"]), tuple(data["std"])) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    # As timm's users do: another head.
    assert timm.create_model(f"local-dir:{out}", pretrained=True, num_classes=3).fc.out_features == 3
    results, again = [
        evaluate_checkpoint(evaluation_of(path, *more))
        for path, more in ((tmp_path / "step-1.pt", ()), (out / "model.safetensors", (f"model={NAME}",)))
    ]
    assert results == again


@pytest.mark.slow
def test_timm_loads_it_from_the_hub(model, tmp_path, monkeypatch):
    """The hub's cache, filled by hand, without a network."""
    import timm

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "models--me--net"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text("c" * 40)
    export(save_run(model, tmp_path / "step-1.pt"), f"out={repository}/snapshots/{'c' * 40}")
    assert_same_logits(model, timm.create_model("hf-hub:me/net", pretrained=True, cache_dir=tmp_path))


@pytest.mark.slow
def test_imagenet_classes_are_timms_own_and_a_part_of_them_is_named(tmp_path):
    import timm

    images = describe_default(NAME)
    tensors = build_model(NAME, 1000).state_dict()
    synsets = tuple(timm.data.ImageNetInfo("imagenet-1k").label_names())
    assert "label_names" not in describe_for_timm(Card(NAME, images, synsets), tensors)
    described = describe_for_timm(Card(NAME, images, synsets[1:3]), build_model(NAME, 2).state_dict())
    assert described["label_names"] == synsets[1:3]
    assert described["label_descriptions"]["n01443537"].startswith("goldfish")


@pytest.mark.slow
def test_the_card_has_the_accuracy_where_the_checkpoint_knows_it(model, tmp_path):

    known = {"best_top1": 81.129, "identity": {"evaluation": "short side 256 bilinear, centre crop 224"}}
    average = {"ema": model.state_dict(), **known}
    named = {"best": 81.129, "metric": "top1", "identity": known["identity"]}
    sentence = "- Top-1: 81.13 % of the run's evaluation images (short side 256 bilinear, centre crop 224).\n"
    for name, content, more, is_known in (
        ("best.pt", known, (), True),  # of before checkpoints named their metric
        ("best.pt", named, (), True),
        ("best.pt", {**named, "metric": "calibration"}, (), False),
        ("best.pt", average, (), True),
        ("best.pt", average, ("weights=model",), False),  # the average was evaluated
        ("step-1.pt", known, (), False),  # another one's
        ("best.pt", {}, (), False),
    ):
        export(save_run(model, tmp_path / name, **content), f"out={tmp_path}/net", *more)
        text = (tmp_path / "net/README.md").read_text()
        assert (sentence in text) == is_known and ("Top-1" in text) == is_known
        assert text.startswith("---\nlicense: apache-2.0\n")
        assert f'timm.create_model("hf-hub:OWNER/{NAME}", pretrained=True)' in text


def test_the_licence_of_timms_weights_is_not_known():
    card = Card("resnet50", describe_default("resnet50"), None)
    for source, licence in (("timm:resnet50.tv_in1k", ""), ("official:resnest50", "license: apache-2.0\n")):
        assert hub._write_readme(card, source, None, False).startswith(f"---\n{licence}library_name: timm\n")


def test_what_it_refuses(model, tmp_path):
    save_checkpoint(model.state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=f"out={tmp_path} is the checkpoint itself: set another name"):
        export(tmp_path / "model.safetensors", f"model={NAME}", f"out={tmp_path}")
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ConfigError, match="file/config.json: cannot be written"):
        export(tmp_path / "model.safetensors", f"model={NAME}", f"out={tmp_path}/file")


@pytest.mark.slow
def test_a_second_export_replaces_the_first(model, tmp_path):
    checkpoint = save_run(model, tmp_path / "step-1.pt")
    (tmp_path / "net").mkdir()
    (tmp_path / "net/.gitattributes").write_text("of a clone of the hub's repository\n")
    for crop in (64, 96):
        export(checkpoint, f"out={tmp_path}/net", f"crop={crop}")
    assert json.loads((tmp_path / "net/config.json").read_text())["pretrained_cfg"]["input_size"] == [3, 96, 96]
    assert (tmp_path / "net/.gitattributes").exists()
    original = model.state_dict()
    assert all(torch.equal(v, original[k]) for k, v in load_checkpoint(tmp_path / "net/model.safetensors").items())
