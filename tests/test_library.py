"""The package as a library: functions with plain arguments, without Hydra and without the commands."""

import subprocess
import sys
from dataclasses import replace
from inspect import signature
from pathlib import Path

import numpy as np
import pytest
import torch

import resnest_imagenet
from conftest import LAUNCHED
from resnest_imagenet.checkpoint import save_checkpoint
from resnest_imagenet.data.demo import FIGURES
from resnest_imagenet.errors import ConfigError, DataError
from resnest_imagenet.inference.compare import format_comparison
from resnest_imagenet.inference.describe import describe_input
from resnest_imagenet.inference.images import list_classified_images
from resnest_imagenet.reports.info import describe_networks
from resnest_imagenet.weights.export import export_weights
from resnest_imagenet.weights.graphs import export_graph
from resnest_imagenet.weights.hub import export_folder
from resnest_imagenet.weights.load import read_weights

pytestmark = pytest.mark.process  # images are examined in processes

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


@pytest.mark.parametrize("name", ["detect", "open_detector", "compare_objects", "open_segmenter"])
def test_a_torchvision_of_another_torch_is_one_line(name, monkeypatch):
    def fail(module):
        raise RuntimeError("operator torchvision::nms does not exist")  # what importing torchvision raises then

    monkeypatch.setattr(resnest_imagenet, "import_module", fail)
    with pytest.raises(ConfigError, match=r"^torchvision \S+ was not built for torch \S+; install both "):
        getattr(resnest_imagenet, name)


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


ASKING = (resnest_imagenet.predict, resnest_imagenet.evaluate, resnest_imagenet.compare, resnest_imagenet.explain)
ASKING += (resnest_imagenet.extract_features,)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"precision": "float16"}, "precision='float16': input should be 'fp32', 'bf16' or 'fp16'"),
        ({"loader": "pil"}, "loader='pil': input should be 'auto', 'dali' or 'torchvision'"),
        ({"batch_size": 0}, "batch_size=0: input should be greater than or equal to 1"),
        ({"batch_size": True}, "batch_size=True: input should be a valid integer"),
        ({"workers": -1}, "workers=-1: input should be greater than or equal to 0"),
        ({"top": 0}, "top=0: input should be greater than or equal to 1"),
        ({"tta": "mirror"}, "tta='mirror': input should be 'flip'"),
    ],
)
def test_an_argument_that_is_not_valid_is_refused_before_anything_is_read(argument, message):
    functions = [function for function in ASKING if argument.keys() <= signature(function).parameters.keys()]
    assert len(functions) == (2 if argument.keys() & {"top", "tta"} else 5)
    for function in functions:
        with pytest.raises(ConfigError, match=f"^{message}$"):
            function("no/such.pt", "nowhere", **argument)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"crop": 0}, "crop=0: input should be greater than or equal to 32"),
        ({"crop": [64, 31]}, "crop=31: input should be greater than or equal to 32"),
        ({"crop": 64.0}, "crop=64.0: input should be a valid integer"),
        ({"crop": ()}, r"crop=\[\]: list should have at least 1 item after validation, not 0"),
        ({"weights": "emma"}, "weights='emma': auto, model and ema are valid"),
        ({"protocol": {"order": "xx"}}, "protocol.order='xx': input should be 'own', 'resize_crop' or 'crop_resize'"),
        ({"protocol": {"ratio": 2}}, "protocol.ratio=2: input should be less than or equal to 1"),
        (
            {"protocol": {"rato": 1}},
            r"unknown protocol.rato; did you mean 'ratio'\? \(order, ratio, interpolation, antialias\)",
        ),
        ({"protocol": "paper"}, "protocol='paper': input should be a valid dictionary or instance of .*"),
        ({"device": "gpu"}, r"device='gpu': auto, cpu, cuda, cuda:1 \(any number\) and mps are valid"),
        ({"device": "cuda:99"}, "device=cuda:99: torch sees (no CUDA device|cuda:0.*)"),
        ({"device": torch.device("cuda:99")}, "device=cuda:99: torch sees (no CUDA device|cuda:0.*)"),
        ({"device": torch.device("meta")}, "device=meta: only a CPU, a CUDA device or mps is valid"),
    ],
)
def test_how_a_network_is_opened_is_checked_before_it_is_read(argument, message):
    with pytest.raises(ConfigError, match=f"^{message}$"):
        resnest_imagenet.open_classifier("no/such.pt", **argument)


def test_describe_input_refuses_what_open_classifier_does(checkpoint):
    with pytest.raises(ConfigError, match="^crop=16: input should be greater than or equal to 32$"):
        describe_input(read_weights(checkpoint), NAME, 16)


def test_integers_and_floats_of_numpy_are_taken(checkpoint, demo_images):
    crops, protocol = np.array([32, 64]), {"ratio": np.float64(1.0), "order": "own"}
    classifier = resnest_imagenet.open_classifier(checkpoint, crop=crops, protocol=protocol, device="cpu")
    assert [transform.crop for transform in classifier.transforms] == [32, 64] and classifier.transform.ratio == 1.0
    assert resnest_imagenet.open_classifier(checkpoint, crop=np.int64(64)).transform.crop == 64
    fast = FAST | {"batch_size": np.int64(16)}
    predictions, _ = resnest_imagenet.predict(classifier, demo_images / "val/disk", np.int64(1), **fast)
    assert len(predictions) == 4


def test_a_precision_that_is_not_valid_is_computed_in_none():
    for latency in (False, True):
        with pytest.raises(ConfigError, match="^precision='float16': fp32, bf16, fp16 are valid$"):
            describe_networks([NAME], 32, 2, precision="float16", latency=latency, device="cpu", rounds=1)


def test_what_is_no_network_and_no_folder_is_refused_in_one_line(checkpoint, demo_images):
    module, val = resnest_imagenet.build_model(NAME, 10), demo_images / "val"
    for function in ASKING:
        with pytest.raises(
            ConfigError, match=r"^the network is a ResNeSt: give what open_classifier\(...\) returns, or"
        ):
            function(module, val)
    with pytest.raises(ConfigError, match="^the network is a ResNeSt: "):
        resnest_imagenet.compare([checkpoint, module], val)
    for function in (resnest_imagenet.evaluate, resnest_imagenet.compare):
        with pytest.raises(ConfigError, match="^images is a list: give the path of a folder that has one folder per"):
            function(checkpoint, [val / "disk", val / "ring"])


def test_one_network_is_compared_as_a_list_of_one(checkpoint, demo_images):
    classifier = resnest_imagenet.open_classifier(checkpoint)
    comparisons = [
        resnest_imagenet.compare(network, demo_images / "val", **FAST)
        for network in (classifier, checkpoint, str(checkpoint), (checkpoint,))
    ]
    assert [len(comparison.names) for comparison in comparisons] == [1] * 4
    assert all(comparison.is_right.tolist() == comparisons[0].is_right.tolist() for comparison in comparisons)
    assert len(comparisons[0].disagreements) == 0 and "average" in format_comparison(comparisons[0])
    with pytest.raises(ConfigError, match="^networks is empty: give one network or several$"):
        resnest_imagenet.compare([], "nowhere")


@pytest.mark.parametrize("rank", [0, 1])
def test_the_first_rank_alone_tells_what_is_skipped(rank, tmp_path, monkeypatch, capsys):
    (tmp_path / "val/disk").mkdir(parents=True)
    for name in ("disk/a.jpg", "beside.jpg"):
        (tmp_path / "val" / name).touch()
    for name, value in (LAUNCHED | {"RANK": str(rank)}).items():
        monkeypatch.setenv(name, value)
    assert len(list_classified_images(tmp_path / "val")) == 1
    with pytest.raises(DataError, match="^images=.*gone: no such file or folder$"):
        list_classified_images(tmp_path / "gone")
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="^images=.*file: not a folder: give one that has one folder per true class$"):
        list_classified_images(tmp_path / "file")
    assert ("images beside the class folders are skipped" in capsys.readouterr().err) == (rank == 0)


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


def test_explain_takes_a_layer_with_maps_and_changes_no_network(checkpoint, demo_images):
    classifier = resnest_imagenet.open_classifier(checkpoint)
    assert not any(parameter.requires_grad for parameter in classifier.module.parameters())
    for layer in ("", "fc"):
        with pytest.raises(
            ConfigError, match=f"^layer='{layer}' returns logits, not maps: choose a layer with maps, such as layer4$"
        ):
            resnest_imagenet.explain(classifier, demo_images / "val/ring", layer=layer)
    with pytest.raises(ConfigError, match=f"^layer=layer5: {NAME} has no layer of that name$"):
        resnest_imagenet.explain(classifier, demo_images / "val/ring", layer="layer5")
    own = replace(classifier, module=classifier.module.requires_grad_(True))
    next(iter(resnest_imagenet.explain(own, demo_images / "val/ring", **FAST)))
    assert all(parameter.requires_grad for parameter in own.module.parameters())


def test_export(checkpoint, tmp_path, monkeypatch):
    """Of a path, as `checkpoint` is, or of its name."""
    monkeypatch.chdir(tmp_path)
    assert isinstance(checkpoint, Path)
    lines = [export_weights(source, layout="mmpretrain", form="pth") for source in (checkpoint, str(checkpoint))]
    assert lines[0].startswith(f"wrote {NAME}-mmpretrain.pth: {NAME}, ") and lines[0] == lines[1]
    assert export_graph(checkpoint, describe_input, Path("a.pt2"), form="torch_export").startswith("wrote a.pt2: ")
    backbone = resnest_imagenet.build_model(NAME, features_only=True)
    resnest_imagenet.load_backbone(backbone, NAME, checkpoint)
    assert torch.equal(backbone.conv1[0].weight, read_weights(checkpoint).tensors["conv1.0.weight"])
    assert read_weights(checkpoint).source == str(checkpoint)
    export_folder(checkpoint, describe_input, Path("hub"))
    assert "resize" not in (tmp_path / "hub/config.json").read_text()
    assert '"input_size": [' in (tmp_path / "hub/config.json").read_text()


def test_describe_networks():
    report = describe_networks([NAME, NAME], 64, 2, latency=False)
    (cost,) = report.networks
    assert (cost.model, cost.seconds, report.batch_size) == (NAME, {}, 2)
    assert cost.training_bytes["parameters"] == 4 * sum(stage.parameters for stage in cost.stages)


@pytest.mark.slow
def test_open_detector_and_detect(detection_run, demo_objects):
    best, photos = detection_run / "checkpoints/best.pt", sorted((demo_objects / "val2017").iterdir())
    detector = resnest_imagenet.open_detector(best, protocol={"min_score": 0.0, "detections": 3}, device="cpu")
    assert not detector.module.training and not any(part.requires_grad for part in detector.module.parameters())
    assert (detector.protocol.detections, detector.protocol.short_side, detector.finds_masks) == (3, 64, True)
    (image,) = resnest_imagenet.detect(detector, photos[0], score=np.float64(0))
    assert image.boxes.shape == (3, 4) and image.scores.tolist() == sorted(image.scores, reverse=True)
    with pytest.raises(ConfigError, match="^protocol.min_score: input should be less than or equal to 1$"):
        resnest_imagenet.open_detector(best, protocol={"min_score": 2})
    with pytest.raises(DataError, match="images=.*nowhere: no such file or folder"):
        resnest_imagenet.detect(detector, "nowhere")


def test_every_name_of_the_package_is_there():
    assert set(resnest_imagenet.__all__) <= set(dir(resnest_imagenet))
    for name in resnest_imagenet.__all__:
        function = getattr(resnest_imagenet, name)
        assert function.__name__ == name and function.__doc__
    with pytest.raises(AttributeError, match="has no attribute 'trian'"):
        resnest_imagenet.trian  # noqa: B018 - the access raises


@pytest.mark.process
def test_nothing_of_it_needs_hydra_or_a_command_or_dali(checkpoint, demo_images):
    """Under an import system without them, as in a program that uses the package and not its commands.

    Nor does the run need Hydra, or a tracker that nobody asks for. torchvision does not bring torch's compiler,
    which takes longer to import than torch.
    """
    script = f"""
import sys

blocked = ["hydra", "omegaconf", "nvidia.dali", "resnest_imagenet.commands"]
sys.modules.update(dict.fromkeys(blocked))  # importing them now fails
import resnest_imagenet

assert "torch" not in sys.modules
network = resnest_imagenet.open_classifier({str(checkpoint)!r})
val, fast = {str(demo_images / "val")!r}, {FAST!r}
print(len(resnest_imagenet.predict(network, val + "/disk", **fast)[0]))
print(resnest_imagenet.evaluate(network, val, **fast)[0].result.count)
print(resnest_imagenet.compare([network, network], val, **fast).probabilities.shape)
import resnest_imagenet.models.rcnn
print("torch._dynamo" in sys.modules)
print(next(iter(resnest_imagenet.explain(network, val + "/disk", **fast))).pixels.shape)
print(resnest_imagenet.build_model("resnest14_half", 3, dropout=0.5).fc.out_features)
print("resnest50" in resnest_imagenet.list_models())
import resnest_imagenet.training.train
print({{"tensorboard", "wandb", "mlflow"}} & {{*sys.modules}})
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=300)
    printed = ["20", "40", "(2, 40)", "False", "(32, 32, 3)", "3", "True", "set()"]
    assert result.stdout.splitlines() == printed, result.stderr
