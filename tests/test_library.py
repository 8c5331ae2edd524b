"""The package as a library: functions with plain arguments, without Hydra and without the commands."""

import subprocess
import sys

import pytest
import torch

import resnest_imagenet
from resnest_imagenet.checkpoint import save_checkpoint
from resnest_imagenet.data.demo import FIGURES
from resnest_imagenet.errors import ConfigError, DataError
from resnest_imagenet.inference.describe import describe_input
from resnest_imagenet.reports.info import describe_networks
from resnest_imagenet.weights.export import export_weights
from resnest_imagenet.weights.hub import export_folder

NAME = "resnest14_half"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A network for the demo's classes, with all that a checkpoint of ours tells."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "best.pt"
    protocol = {"order": "resize_crop", "ratio": 0.875, "interpolation": "auto", "antialias": True}
    config = {"model": {"name": NAME}, "train": {"crop": 32}, "eval": {"crop": 32}, "protocol": protocol}
    model = resnest_imagenet.build_model(NAME, 10).state_dict()
    save_checkpoint({"model": model, "config": config, "classes": sorted(FIGURES), "epoch": 1}, path)
    return path


def test_only_functions_and_submodules_are_listed():
    listed = set(dir(resnest_imagenet))
    assert set(resnest_imagenet.__all__) | {"errors", "weights"} <= listed
    assert not listed & {"Any", "TYPE_CHECKING", "import_module", "modules"}


FAST = {"loader": "torchvision", "workers": 0, "batch_size": 16}


def test_predict(checkpoint, demo_images):
    predictions, skipped = resnest_imagenet.predict(checkpoint, demo_images / "val/disk", top=2, **FAST)
    assert skipped == [] and [prediction.rank for prediction in predictions] == [1, 2] * 4
    opened = resnest_imagenet.open_classifier(checkpoint)
    files = sorted((demo_images / "val/disk").iterdir())
    assert resnest_imagenet.predict(opened, files, top=2, **FAST) == (predictions, [])
    with pytest.raises(DataError, match="images=.*nowhere: no such file or folder"):
        resnest_imagenet.predict(opened, "nowhere")


def test_evaluate_and_compare(checkpoint, demo_images):
    classifier = resnest_imagenet.open_classifier(checkpoint, crop=[32, 64], protocol={"ratio": 1.0}, device="cpu")
    evaluations = resnest_imagenet.evaluate(classifier, demo_images / "val", **FAST)
    assert [evaluation.protocol for evaluation in evaluations] == [
        "short side 32 bilinear, centre crop 32",
        "short side 64 bilinear, centre crop 64",
    ]
    assert evaluations[0].result.count == 40 and evaluations[0].images.classes == tuple(sorted(FIGURES))
    at_64 = resnest_imagenet.open_classifier(checkpoint, crop=64, protocol={"ratio": 1.0}, device=torch.device("cpu"))
    comparison = resnest_imagenet.compare([classifier, at_64], str(demo_images / "val"), **FAST)
    assert comparison.protocols == tuple(evaluation.protocol for evaluation in evaluations)
    right = [evaluation.result.correct1 for evaluation in evaluations]
    assert comparison.is_right.sum(1).tolist() == right and comparison.skipped == ()


def test_a_compiled_evaluation_leaves_the_callers_network_as_it_is(checkpoint, demo_images, graphs):
    classifier = resnest_imagenet.open_classifier(checkpoint, device="cpu")
    resnest_imagenet.evaluate(classifier, demo_images / "val", compile_network=True, **FAST)
    assert graphs.frame_count == 1 and classifier.module._compiled_call_impl is None


def test_explain(checkpoint, demo_images):
    explanations = resnest_imagenet.explain(checkpoint, demo_images / "val/ring", target="ring", layer="layer3", **FAST)
    assert len(explanations) == len(explanations.files) == 4
    for file, explanation in zip(explanations.files, explanations, strict=True):
        (class_map,) = explanation.maps
        assert (explanation.file, class_map.name, class_map.evidence.shape) == (file, "ring", (2, 2))
    with pytest.raises(ConfigError, match="target=rign: none of the network's 10 classes"):
        resnest_imagenet.explain(checkpoint, demo_images / "val/ring", target="rign")


def test_export(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = export_weights(str(checkpoint), layout="mmpretrain", form="pth")
    assert line.startswith(f"wrote {NAME}-mmpretrain.pth: {NAME}, ")
    export_folder(str(checkpoint), describe_input, "hub")
    assert "resize" not in (tmp_path / "hub/config.json").read_text()
    assert '"input_size": [' in (tmp_path / "hub/config.json").read_text()


def test_describe_networks():
    report = describe_networks([NAME, NAME], 64, 2, latency=False)
    (cost,) = report.networks
    assert (cost.model, cost.seconds, report.batch_size) == (NAME, {}, 2)
    assert cost.training_bytes["parameters"] == 4 * sum(stage.parameters for stage in cost.stages)


def test_every_name_of_the_package_is_there():
    assert set(resnest_imagenet.__all__) <= set(dir(resnest_imagenet))
    for name in resnest_imagenet.__all__:
        function = getattr(resnest_imagenet, name)
        assert function.__name__ == name and function.__doc__
    with pytest.raises(AttributeError, match="has no attribute 'trian'"):
        resnest_imagenet.trian  # noqa: B018 - the access raises


@pytest.mark.process
def test_nothing_of_it_needs_hydra_or_a_command(checkpoint, demo_images):
    """Under an import system that has neither, as in a program that uses the package and not its commands."""
    script = f"""
import sys

blocked = ["hydra", "omegaconf", "resnest_imagenet.commands"]
sys.modules.update(dict.fromkeys(blocked))  # importing them now fails
import resnest_imagenet

assert "torch" not in sys.modules
network = resnest_imagenet.open_classifier({str(checkpoint)!r})
val, fast = {str(demo_images / "val")!r}, {FAST!r}
print(len(resnest_imagenet.predict(network, val + "/disk", **fast)[0]))
print(resnest_imagenet.evaluate(network, val, **fast)[0].result.count)
print(resnest_imagenet.compare([network, network], val, **fast).probabilities.shape)
print(next(iter(resnest_imagenet.explain(network, val + "/disk", **fast))).pixels.shape)
print(resnest_imagenet.build_model(resnest_imagenet.list_models()[0], 3, dropout=0.5).fc.out_features)
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=300)
    assert result.stdout.splitlines() == ["20", "40", "(2, 40)", "(32, 32, 3)", "3"], result.stderr
