"""Detectors for other programs, and the commands that do not take them."""

import json
import re

import pytest
import torch

import resnest_imagenet
from conftest import compose_config
from graph_files import open_openvino
from resnest_imagenet.checkpoint import load_checkpoint, save_checkpoint
from resnest_imagenet.commands import explain
from resnest_imagenet.commands.export import run
from resnest_imagenet.commands.launch import find_conf
from resnest_imagenet.config_reading import ExplainConfig, ExportConfig
from resnest_imagenet.errors import CheckpointError, ConfigError

pytestmark = [pytest.mark.slow, pytest.mark.process]

CLASSES = ["disk", "square", "triangle", "star", "cross"]
WORDS = "Mask R-CNN on resnest14_half with 5 classes"


@pytest.fixture(scope="module")
def checkpoint(detection_run, tmp_path_factory):
    """The run's best network with a classifier that finds something in any picture."""
    content = load_checkpoint(detection_run / "checkpoints/best.pt")
    generator = torch.Generator().manual_seed(0)
    for key, value in content["model"].items():
        if key.endswith("classify.weight"):
            content["model"][key] = value + 2 * torch.randn(value.shape, generator=generator)
    path = tmp_path_factory.mktemp("detector") / "best.pt"
    save_checkpoint(content, path)
    return path


@pytest.fixture(scope="module")
def network(checkpoint):
    """The same, loaded by torch alone."""
    return build_as_trained(load_checkpoint(checkpoint)["model"])


def build_as_trained(tensors=None):
    from resnest_imagenet.models.rcnn import build_rcnn

    sizes = {"channels": 16, "box_width": 16, "box_convs": 1, "mask_convs": 1, "detections": 20}
    anchors = {"anchor_sizes": (16, 32, 64, 96, 128), "canonical_size": 56}
    counts = {"candidates": (300, 300), "proposals": (200, 200)}
    model = build_rcnn("resnest14_half", 5, masks=True, norm="bn", **sizes, **anchors, **counts)
    if tensors is not None:
        model.load_state_dict(tensors)
    return model.eval().requires_grad_(False)


def export(checkpoint, *overrides):
    run(compose_config("export", ExportConfig, f"ckpt={checkpoint}", *overrides))


def find(model, height=96, width=128, size=(90, 121), seed=3):
    """Return a padded image, its size, and what a network finds in it."""
    from resnest_imagenet.weights.graphs import draw_images

    images = draw_images(1, height, width, torch.Generator().manual_seed(seed))
    images[:, :, size[0] :], images[..., size[1] :] = 0, 0
    (found,) = model(images, [size])
    return images, torch.tensor(size), found


def assert_same(found, expected):
    assert len(expected) > 3
    for name in ("boxes", "scores", "labels", "masks"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name


def test_an_onnx_graph_of_any_size_finds_what_the_network_does(network, checkpoint, tmp_path, monkeypatch, capfd):
    import onnx
    import onnxruntime

    from resnest_imagenet.weights import graphs_rcnn

    monkeypatch.chdir(tmp_path)
    export(checkpoint, "format=onnx")
    out, err = capfd.readouterr()
    numbers = r"of (\d+) detections by it and by the network in drawn images (\d+) are of one alone"
    line = rf"wrote rcnn_resnest14_half.onnx: {WORDS}, opset 18, \d+\.\d MB, {numbers}, the others within .*, SHA-256 "
    match = re.match(line, out)
    assert match and err == "" and out.count("\n") == 1
    assert int(match[1]) > 10 and int(match[2]) == 0
    graph = onnx.load(tmp_path / "rcnn_resnest14_half.onnx")
    metadata = {entry.key: entry.value for entry in graph.metadata_props}
    assert json.loads(metadata["classes"]) == CLASSES and metadata["channels"] == "RGB"
    assert metadata["protocol"].startswith("short side 64, long side at most 96, scores above 0.05")
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [port.name for port in session.get_outputs()]
    assert names == ["boxes", "scores", "labels", "masks"]
    assert session.get_outputs()[0].shape == ["detections", 4]
    for arguments in ((96, 128, (90, 121)), (160, 96, (160, 96)), (128, 224, (97, 220))):
        images, size, expected = find(network, *arguments)
        outputs = session.run(names, {"images": images.numpy(), "size": size.numpy()})
        assert len(expected) > 3 and outputs[2].tolist() == expected.labels.tolist()
        for name, output in zip(names, outputs, strict=True):
            torch.testing.assert_close(torch.from_numpy(output), getattr(expected, name), rtol=1e-3, atol=1e-3)
    # OpenVINO's form is made from this graph.
    monkeypatch.setattr(graphs_rcnn, "_make_onnx", lambda *_: graph.SerializeToString())
    export(checkpoint, "format=openvino", "out=detector.xml")
    found = re.match(
        rf"wrote detector.xml and detector.bin: {WORDS}, OpenVINO IR, \d+\.\d MB, {numbers}", capfd.readouterr()[0]
    )
    assert found and (found[1], found[2]) == (match[1], "0")
    compute, described = open_openvino(tmp_path / "detector.xml")
    assert json.loads(described["classes"]) == CLASSES
    images, size, expected = find(network, 128, 224, (97, 220))
    outputs = compute(images=images, size=size)
    for name in names:
        torch.testing.assert_close(outputs[name], getattr(expected, name), rtol=1e-3, atol=1e-3)


def test_a_program_of_one_size_finds_what_the_network_does(network, checkpoint, tmp_path, capfd):
    out = tmp_path / "detector.pt2"
    export(checkpoint, "format=torch_export", "crop=96", "protocol=coco", "protocol.detections=7", f"out={out}")
    printed, err = capfd.readouterr()
    assert printed.startswith(f"wrote {out}: {WORDS}, crop 96, ") and err == ""
    extra_files = {"metadata.json": ""}
    program = torch.export.load(out, extra_files=extra_files).module()
    assert json.loads(extra_files["metadata.json"])["crop"] == "96"
    images, size, expected = find(network, 96, 96, (80, 96))
    outputs = program(images, size)
    for name, output in zip(("boxes", "scores", "labels", "masks"), outputs, strict=True):
        torch.testing.assert_close(output, getattr(expected, name)[:7], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("form", ["pth", "safetensors"])
def test_a_state_dict_has_the_networks_own_names(form, network, checkpoint, tmp_path, capsys):
    from resnest_imagenet.weights.detection import start_rcnn

    out = tmp_path / f"out.{form}"
    export(checkpoint, f"format={form}", f"out={out}")
    line = rf"wrote {out}: {WORDS}, \d+ tensors, SHA-256 [0-9a-f]{{64}}\n"
    assert re.fullmatch(line, capsys.readouterr().out)
    assert_same(find(build_as_trained(load_checkpoint(out)))[2], find(network)[2])
    model, own = build_as_trained(), network.state_dict()
    assert start_rcnn(model, "resnest14_half", CLASSES, out).startswith("all of it")
    for name, tensor in model.state_dict().items():
        of_classes = any(part in name for part in ("classify", "regress", "mask_fcn_logits"))
        assert of_classes or torch.equal(tensor, own[name]), name


@pytest.mark.parametrize(
    ("layout", "names"),
    [
        (
            "mmdetection",
            {"backbone.stem.0.weight": "conv1.0.weight", "backbone.stem.7.running_mean": "bn1.running_mean"},
        ),
        ("detectron2", {"stem.conv1_1.weight": "conv1.0.weight", "res2.0.conv1.norm.bias": "layer1.0.bn1.bias"}),
    ],
)
def test_other_frameworks_get_the_backbone_alone_with_a_line(layout, names, network, checkpoint, tmp_path, capsys):
    from resnest_imagenet.weights.detection import start_rcnn

    out = tmp_path / "out.pth"
    export(checkpoint, "format=pth", f"layout={layout}", f"out={out}")
    assert f"wrote {out}: the backbone alone of {WORDS}, " in capsys.readouterr().out
    tensors, own = load_checkpoint(out), network.backbone.state_dict()
    assert len(tensors) == len(own)
    for name, own_name in names.items():
        assert torch.equal(tensors[name], own[own_name]), name
    model = build_as_trained()
    assert start_rcnn(model, "resnest14_half", CLASSES, out) == "its backbone"
    for name, tensor in model.backbone.state_dict().items():
        assert torch.equal(tensor, own[name]), name


@pytest.fixture(scope="module")
def folder(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub") / "objects"
    export(checkpoint, "format=hub", f"out={folder}")
    return folder


def test_a_folder_detects_as_the_checkpoint_does(network, checkpoint, folder, demo_objects):
    from safetensors.torch import load_file

    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors", "README.md"}
    expected = find(network)[2]
    # Without this project's reader: the tensors have the network's own names.
    assert_same(find(build_as_trained(load_file(folder / "model.safetensors")))[2], expected)
    from_hub = torch.hub.load(str(find_conf().parent), "rcnn", source="local", pretrained=folder)
    assert from_hub.training and from_hub.classes == CLASSES and from_hub.pixels.mean[0] == 123.68
    assert_same(find(from_hub.eval())[2], expected)
    photos = demo_objects / "val2017"
    pairs = [resnest_imagenet.detect(source, photos, score=0.1) for source in (checkpoint, folder)]
    assert pairs[0].detector.category_ids == pairs[1].detector.category_ids
    counts = 0
    for first, second in zip(*pairs, strict=True):
        assert (first.boxes == second.boxes).all() and first.masks == second.masks
        counts += len(first)
    assert counts > 3
    described = json.loads((folder / "config.json").read_text())
    assert described["classes"] == CLASSES and described["config"]["data"] == {"kind": "coco"}
    assert "init_from" not in described["config"]["train"]
    assert WORDS in (folder / "README.md").read_text()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["layout=timm"], r"^layout=timm: a detector has official \(this project's\), mmdetection or detectron2$"),
        (["layout=mmsegmentation"], "^layout=mmsegmentation: a detector has official"),
        (["model=resnest14_half"], "^model is of classification: .*best.pt is of detection and has its run's$"),
        (["protocol=full"], "^protocol is of classification: choose own or coco$"),
        (["crop=96"], "^crop and protocol are of images: format=safetensors has weights alone$"),
        (["format=hub", "protocol=coco"], "^crop and protocol with format=hub are of classification"),
        (["format=onnx", "sizes=crop", "crop=100"], "^crop=100: the sides of a detector's images are multiples of 32$"),
        (["format=torch_export", "out=x.onnx"], "out=x.onnx does not end in .pt2: set format=... or another name"),
    ],
)
def test_what_is_not_of_detection_is_refused_in_a_line(overrides, message, checkpoint):
    with pytest.raises(ConfigError, match=message) as error:
        export(checkpoint, *overrides)
    assert "\n" not in str(error.value)


def test_explain_names_what_takes_a_detector(checkpoint, demo_objects, tmp_path):
    line = f"{checkpoint}: a checkpoint of task detection, not of classification: "
    line = f"^{re.escape(line)}resnest-eval, resnest-predict, resnest-compare and resnest-export take it$"
    images = f"images={demo_objects / 'val2017'}"
    with pytest.raises(CheckpointError, match=line):
        explain.run(compose_config("explain", ExplainConfig, f"ckpt={checkpoint}", images, f"out={tmp_path}/x"))


def test_a_graph_that_finds_something_else_is_not_written(network):
    from resnest_imagenet.instances import Detections
    from resnest_imagenet.weights.graphs_rcnn import compare_detections

    trials = [(96, 128, 90, 121)]

    def shift(images, size):
        (found,) = network(images, [tuple(size.tolist())])
        boxes = found.boxes.clone()
        boxes[0] += 1
        return Detections(boxes, found.scores, found.labels, found.masks)

    agreement = compare_detections(network, shift, trials)
    assert agreement.unmatched == 2 and agreement.total == 2 * len(find(network)[2])
    same = compare_detections(network, lambda images, size: network(images, [tuple(size.tolist())])[0], trials)
    assert (same.unmatched, same.box, same.score, same.mask) == (0, 0, 0, 0)
