"""Networks of segmentation for other programs, and the commands that do not take them."""

import importlib.util
import json
import re
import shutil

import pytest
import torch

import resnest_imagenet
from conftest import SCENE_COLOURS, compose_config
from graph_files import make_graphs_once, open_openvino
from resnest_imagenet.checkpoint import load_checkpoint, save_checkpoint
from resnest_imagenet.commands import explain
from resnest_imagenet.commands.export import run
from resnest_imagenet.commands.launch import find_conf
from resnest_imagenet.config_reading import ExplainConfig, ExportConfig
from resnest_imagenet.errors import CheckpointError, ConfigError, DamagedCheckpointError
from resnest_imagenet.models.deeplab import build_deeplab
from resnest_imagenet.weights import graphs
from resnest_imagenet.weights.graphs import draw_images
from resnest_imagenet.weights.load import read_weights
from resnest_imagenet.weights.segmentation import SEGMENTATION, start_deeplab

pytestmark = [pytest.mark.slow, pytest.mark.process]

CLASSES = ["background", "cross", "disk", "stripes", "target", "triangle"]


@pytest.fixture(scope="module")
def checkpoint(segmentation_run):
    return segmentation_run / "checkpoints/best.pt"


@pytest.fixture(scope="module")
def network(checkpoint):
    """The run's network, loaded by torch alone."""
    model = build_deeplab("resnest14_half", 6, channels=64, rates=(2, 4, 6))
    model.load_state_dict(load_checkpoint(checkpoint)["model"])
    return model.eval()


def import_hubconf():
    spec = importlib.util.spec_from_file_location("hubconf", find_conf().parent / "hubconf.py")
    hubconf = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hubconf)
    return hubconf


def export(checkpoint, *overrides):
    run(compose_config("export", ExportConfig, f"ckpt={checkpoint}", *overrides))


def open_onnx(path, sides=("height", "width")):
    import onnx
    import onnxruntime

    graph = onnx.load(path)
    onnx.checker.check_model(graph, full_check=True)
    dims = {port.name: port.type.tensor_type.shape.dim for port in (*graph.graph.input, *graph.graph.output)}
    shapes = {name: [dim.dim_param or dim.dim_value for dim in dims[name]] for name in dims}
    assert shapes["images"] == ["batch", 3, *sides] and shapes["logits"][:2] == ["batch", 6]
    assert not any("auxiliary" in tensor.name for tensor in graph.graph.initializer)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def compute(images):
        return torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])

    return compute, {entry.key: entry.value for entry in graph.metadata_props}


def open_xml(path):
    graph, metadata = open_openvino(path)
    return lambda images: graph(images=images)["logits"], metadata


def open_fixed_onnx(path):
    compute, metadata = open_onnx(path, (64, 64))
    with pytest.raises(Exception, match="Got: 65 Expected: 64"):
        compute(torch.zeros(1, 3, 64, 65))
    return compute, metadata


@pytest.fixture(scope="module")
def made():
    return {}


# torch.export's own format has the same program and is written as a classifier's: test_export_graphs.
@pytest.mark.parametrize(
    ("options", "file", "open_graph", "kind"),
    [
        (["format=onnx"], "deeplabv3_resnest14_half.onnx", open_onnx, "opset 18"),
        (["format=openvino"], "deeplabv3_resnest14_half.xml", open_xml, "OpenVINO IR"),
        (["format=onnx", "sizes=crop"], "deeplabv3_resnest14_half.onnx", open_fixed_onnx, "opset 18, crop 64"),
    ],
)
def test_a_graph_computes_what_the_network_does(
    options, file, open_graph, kind, network, checkpoint, made, tmp_path, monkeypatch, capfd
):
    monkeypatch.chdir(tmp_path)
    make_graphs_once(monkeypatch, graphs, made)
    export(checkpoint, *options)
    out, err = capfd.readouterr()
    numbers = r"logits from (\S+) to (\S+) and within (\S+) of the network's"
    words = "DeepLabV3 on resnest14_half with 6 classes"
    files = [file] + ["deeplabv3_resnest14_half.bin"] * (open_graph is open_xml)
    digests = " and ".join(["[0-9a-f]{64}"] * len(files))
    written = rf"wrote {' and '.join(files)}: {words}, {kind}, \d+\.\d MB, {numbers}, SHA-256 {digests}\n"
    assert re.fullmatch(written, out) and err == ""
    assert {path.name for path in tmp_path.iterdir()} == set(files)
    graph, metadata = open_graph(tmp_path / file)
    # Sides that are and are not multiples of the output stride.
    other_sizes = ((1, 65, 47), (2, 96, 33)) if open_graph is not open_fixed_onnx else ()
    for shape in ((1, 64, 64), (5, 64, 64), *other_sizes):
        images = draw_images(*shape, torch.Generator().manual_seed(2))
        with torch.no_grad():
            expected = network(images)
        assert expected.shape == (shape[0], 6, *shape[1:]) and expected.std() > 0.01
        torch.testing.assert_close(graph(images), expected, rtol=1e-4, atol=1e-5)
    assert metadata["model"] == "DeepLabV3 on resnest14_half"
    assert json.loads(metadata["classes"]) == CLASSES
    assert json.loads(metadata["palette"]) == SCENE_COLOURS.tolist()
    assert (metadata["crop"], metadata["protocol"]) == ("64", "whole, own size")
    assert json.loads(metadata["mean"]) == [0.485, 0.456, 0.406]
    assert json.loads(metadata["std"]) == [0.229, 0.224, 0.225]


# Of PyTorch-Encoding, typed from encoding/models/sseg/deeplab.py and fcn.py.
OF_ENCODING = {
    "pretrained.conv1.0.weight": "backbone.conv1.0.weight",
    "pretrained.layer3.0.conv2.fc1.bias": "backbone.layer3.0.conv2.fc1.bias",
    "head.aspp.b0.0.weight": "head.branches.0.0.weight",
    "head.aspp.b3.1.running_var": "head.branches.3.1.running_var",
    "head.aspp.b4.gap.1.weight": "head.pooled.0.weight",
    "head.aspp.b4.gap.2.bias": "head.pooled.1.bias",
    "head.aspp.project.0.weight": "head.project.0.weight",
    "head.block.0.weight": "head.block.0.weight",
    "head.block.4.weight": "head.classify.weight",
    "auxlayer.conv5.0.weight": "auxiliary.block.0.weight",
    "auxlayer.conv5.4.bias": "auxiliary.classify.bias",
}


@pytest.mark.parametrize("form", ["pth", "safetensors"])
def test_a_state_dict_has_the_official_names_and_starts_a_network(form, network, checkpoint, tmp_path, capsys):
    out = tmp_path / f"out.{form}"
    export(checkpoint, f"format={form}", f"out={out}")
    line = rf"wrote {out}: DeepLabV3 on resnest14_half with 6 classes, \d+ tensors, SHA-256 [0-9a-f]{{64}}\n"
    assert re.fullmatch(line, capsys.readouterr().out)
    tensors, own = load_checkpoint(out), network.state_dict()
    assert len(tensors) == len(own)
    for name, own_name in OF_ENCODING.items():
        assert torch.equal(tensors[name], own[own_name]), name
    assert {name.partition(".")[0] for name in tensors} == {"pretrained", "head", "auxlayer"}
    model = build_deeplab("resnest14_half", 6, channels=64, rates=(2, 4, 6))
    assert start_deeplab(model, "resnest14_half", CLASSES, out) == "its backbone, heads and classes"
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, own[name]), name


# Of mmsegmentation, typed from mmseg/models/backbones/resnest.py and resnet.py.
OF_MMSEGMENTATION = {
    "backbone.stem.0.weight": "backbone.conv1.0.weight",
    "backbone.stem.7.running_mean": "backbone.bn1.running_mean",
    "backbone.layer3.0.conv2.fc1.bias": "backbone.layer3.0.conv2.fc1.bias",
    "backbone.layer4.0.downsample.1.weight": "backbone.layer4.0.downsample.1.weight",
}


def test_mmsegmentation_gets_the_backbone_alone_and_the_line_tells(network, checkpoint, tmp_path, capsys):
    out = tmp_path / "out.pth"
    export(checkpoint, "format=pth", "layout=mmsegmentation", f"out={out}")
    words = re.escape("the backbone alone of DeepLabV3 on resnest14_half with 6 classes (the heads of mmsegmentation ")
    assert re.match(rf"wrote {out}: {words}have other layers\), \d+ tensors, SHA-256 ", capsys.readouterr().out)
    tensors, own = load_checkpoint(out), network.state_dict()
    assert len(tensors) == len(network.backbone.state_dict())
    assert all(name.startswith("backbone.") for name in tensors)
    for name, own_name in OF_MMSEGMENTATION.items():
        assert torch.equal(tensors[name], own[own_name]), name
    model = build_deeplab("resnest14_half", 6, channels=64, rates=(2, 4, 6))
    assert start_deeplab(model, "resnest14_half", CLASSES, out) == "its backbone"
    for name, tensor in model.backbone.state_dict().items():
        assert torch.equal(tensor, own[f"backbone.{name}"]), name


def compute_logits(model, seed=3):
    """Return the logits of a network for the same images, of a size that is no multiple of the stride."""
    with torch.no_grad():
        return model.eval()(draw_images(2, 65, 80, torch.Generator().manual_seed(seed)))


@pytest.fixture(scope="module")
def folder(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub") / "shapes"
    export(checkpoint, "format=hub", f"out={folder}")
    return folder


def test_a_folder_segments_as_the_checkpoint_does(network, checkpoint, folder, segmentation_run):
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors", "README.md"}
    expected = compute_logits(network)
    assert expected.shape == (2, 6, 65, 80) and expected.std() > 0.01
    # Without this project's reader: the tensors have the network's own names.
    from safetensors.torch import load_file

    network.load_state_dict(load_file(folder / "model.safetensors"))
    assert torch.equal(compute_logits(network), expected)
    clone = str(find_conf().parent)
    from_hub = torch.hub.load(clone, "deeplabv3", source="local", pretrained=folder)
    assert from_hub.training and torch.equal(compute_logits(from_hub), expected)
    assert (from_hub.classes, from_hub.palette, from_hub.crop) == (CLASSES, SCENE_COLOURS.tolist(), 64)
    own, opened = (resnest_imagenet.open_segmenter(source, device="cpu") for source in (checkpoint, folder))
    assert torch.equal(compute_logits(opened.module), compute_logits(own.module))
    for name in ("name", "classes", "data_kind", "protocol"):
        assert getattr(opened, name) == getattr(own, name)
    photos = segmentation_run.parent / "scenes/images/val"
    pairs = list(zip(resnest_imagenet.segment(own, photos), resnest_imagenet.segment(folder, photos), strict=True))
    assert len(pairs) == 3 and all((one.mask == other.mask).all() for one, other in pairs)
    model = build_deeplab("resnest14_half", 6, channels=64, rates=(2, 4, 6))
    assert start_deeplab(model, "resnest14_half", CLASSES[::-1], folder) == "its backbone, heads and classes"
    assert torch.equal(compute_logits(model), expected.flip(1))


def test_a_folder_describes_its_network_without_places_of_the_machine(checkpoint, folder, tmp_path, capsys):
    content = load_checkpoint(checkpoint)
    described = json.loads((folder / "config.json").read_text())
    assert (described["classes"], described["palette"]) == (CLASSES, SCENE_COLOURS.tolist())
    assert described["card"]["mean"] == "[0.485, 0.456, 0.406]" and described["epoch"] == content["epoch"]
    assert described["config"]["data"] == {"kind": "masks"} and "init_from" not in described["config"]["train"]
    readme = (folder / "README.md").read_text()
    assert f"\n- mIoU: {content['best']:.2f} % of the run's evaluation scenes (whole, own size).\n" in readme
    assert "DeepLabV3 on resnest14_half with 6 classes, output stride" in readme
    # A folder can be exported in turn; out=null is a name of its own.
    export(folder, "format=hub", f"out={tmp_path}/again")
    line = (
        rf"wrote {tmp_path}/again: DeepLabV3 on resnest14_half with 6 classes; model.safetensors has \d+ tensors, SHA"
    )
    assert re.match(line, capsys.readouterr().out)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()


def test_the_moving_average_is_exported_where_there_is_one(network, checkpoint, tmp_path):
    content = load_checkpoint(checkpoint)
    average = {name: value * 0.5 if value.is_floating_point() else value for name, value in content["model"].items()}
    save_checkpoint({**content, "ema": average}, tmp_path / "best.pt")
    for choice, expected in (("auto", average), ("model", content["model"])):
        export(tmp_path / "best.pt", "format=hub", f"weights={choice}", f"out={tmp_path}/{choice}")
        tensors = load_checkpoint(tmp_path / choice / "model.safetensors")
        assert tensors.keys() == expected.keys()
        assert all(torch.equal(tensors[name], expected[name]) for name in expected)


def test_folders_that_cannot_be_read_are_a_line(folder, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    settings, weights = broken / "config.json", broken / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(DamagedCheckpointError, match="model.safetensors"):
        read_weights(broken, tasks=(SEGMENTATION,))
    weights.unlink()
    with pytest.raises(CheckpointError, match="model.safetensors"):
        read_weights(broken, tasks=(SEGMENTATION,))
    for text, message in (
        ("{", "config.json: cannot be read .*: export the network again$"),
        (
            '{"architecture": "resnest50d"}',
            "not a folder with a network of segmentation or detection: give its file of weights, ",
        ),
        ("[]", "not a folder with a network of segmentation"),
    ):
        settings.write_text(text)
        with pytest.raises(CheckpointError, match=message) as error:
            read_weights(broken, tasks=(SEGMENTATION,))
        assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match="is the checkpoint itself: set another name$"):
        export(folder, "format=hub", f"out={folder}")
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]


def test_torch_hubs_entry_names_what_is_missing_or_too_much(folder, checkpoint):
    hubconf = import_hubconf()
    model = hubconf.deeplabv3("resnest14_half", 3, channels=32, output_stride=16)
    assert [logits.shape for logits in model(torch.zeros(2, 3, 64, 64))] == [(2, 3, 64, 64)] * 2
    for options, message in (
        ({}, "deeplabv3 needs backbone and num_classes, or pretrained"),
        ({"pretrained": True}, "there are no published weights of deeplabv3: give pretrained=FOLDER or a checkpoint"),
        ({"pretrained": folder, "num_classes": 6}, f"{folder} has its backbone, classes and options: give pretrained"),
    ):
        with pytest.raises(ConfigError, match=f"^{re.escape(message)}"):
            hubconf.deeplabv3(**options)


OF_CLASSIFICATION = "^model and protocol are of classification: .*best.pt is of segmentation and has its run's$"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["format=hub", "crop=96"],
            "^crop with format=hub is of classification: a DeepLabV3 takes images of any size$",
        ),
        (
            ["layout=timm"],
            r"^layout=timm is of classification: a DeepLabV3 takes official \(PyTorch-Encoding's\) or mmsegmentation$",
        ),
        (["layout=detectron2"], "^layout=detectron2 is of classification: a DeepLabV3 takes official"),
        (["model=resnest14_half"], OF_CLASSIFICATION),
        (["protocol=full"], OF_CLASSIFICATION),
        (["protocol=slide"], OF_CLASSIFICATION),
        (["format=onnx", "int8=."], "^int8 is of classification: .*best.pt is of segmentation$"),
        (["format=torch_export", "out=x.onnx"], "out=x.onnx does not end in .pt2: set format=... or another name"),
    ],
)
def test_what_is_of_classification_is_refused_in_a_line(overrides, message, checkpoint):
    with pytest.raises(ConfigError, match=message) as error:
        export(checkpoint, *overrides)
    assert "\n" not in str(error.value)


def test_commands_that_do_not_take_it_name_what_does(checkpoint, demo_images, tmp_path):
    line = f"{checkpoint}: a checkpoint of task segmentation, not of classification: "
    line = f"^{re.escape(line)}resnest-eval, resnest-predict, resnest-compare and resnest-export take it$"
    val, fast = demo_images / "val", ("device=cpu", "loader.workers=0")
    with pytest.raises(CheckpointError, match=line):
        explain.run(
            compose_config("explain", ExplainConfig, f"ckpt={checkpoint}", f"images={val}", f"out={tmp_path}/x", *fast)
        )
    hubconf = import_hubconf()
    for options in ({}, {"features_only": True}):
        with pytest.raises(CheckpointError, match=line):
            hubconf.resnest14_half(pretrained=checkpoint, **options)
