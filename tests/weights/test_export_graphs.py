"""Graphs in ONNX and torch.export's format: they compute what the network does, or are not written."""

import io
import json
import re
import sys

import pytest
import torch

from conftest import compose_config
from resnest_imagenet import build_model
from resnest_imagenet.checkpoint import save_checkpoint
from resnest_imagenet.commands.export import run
from resnest_imagenet.config import ExportConfig
from resnest_imagenet.errors import CheckpointError, ConfigError, UserError
from resnest_imagenet.models.imagenet_classes import imagenet_synsets
from resnest_imagenet.weights import card, graphs

NAME = "resnest14_half"
CLASSES = ["a", "b", "n01443537"]


@pytest.fixture(scope="module")
def model():
    """With batch norms that normalise, as trained ones do."""
    torch.manual_seed(0)
    model = build_model(NAME, len(CLASSES), zero_gamma=False)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1
    with torch.no_grad():
        model(graphs.draw_images(32, 64, 64, torch.Generator().manual_seed(1)))
    return model.eval()


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory):
    """Write what this project's checkpoints hold of the network, and return the path."""
    path = tmp_path_factory.mktemp("run") / "step-1.pt"
    config = {"model": {"name": NAME}, "train": {}}
    save_checkpoint({"model": model.state_dict(), "config": config, "classes": CLASSES, "epoch": 1}, path)
    return path


def export(checkpoint, *overrides):
    run(compose_config("export", ExportConfig, f"ckpt={checkpoint}", "crop=64", *overrides))


def open_onnx(path):
    import onnx
    import onnxruntime

    graph = onnx.load(path)
    onnx.checker.check_model(graph, full_check=True)
    assert [(each.domain, each.version) for each in graph.opset_import] == [("", 18)]
    dims = {port.name: port.type.tensor_type.shape.dim for port in (*graph.graph.input, *graph.graph.output)}
    shapes = {name: [dim.dim_param or dim.dim_value for dim in dims[name]] for name in dims}
    assert shapes == {"images": ["batch", 3, "height", "width"], "logits": ["batch", 3]}
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def compute(images):
        return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])

    return compute, {each.key: each.value for each in graph.metadata_props}


def open_program(path):
    extra_files = {"metadata.json": ""}
    program = torch.export.load(path, extra_files=extra_files)
    return program.module(), json.loads(extra_files["metadata.json"])


@pytest.mark.parametrize(
    ("form", "file", "open_graph", "kind"),
    [
        ("onnx", "resnest14_half.onnx", open_onnx, "opset 18"),
        ("torch_export", "resnest14_half.pt2", open_program, "crop 64"),
    ],
)
@pytest.mark.slow
def test_a_graph_computes_what_the_network_does(
    form, file, open_graph, kind, model, checkpoint, tmp_path, monkeypatch, capfd
):
    monkeypatch.chdir(tmp_path)
    export(checkpoint, f"format={form}")
    out, err = capfd.readouterr()
    numbers = r"logits from (\S+) to (\S+) and within (\S+) of the network's"
    line = re.fullmatch(rf"wrote {file}: {NAME}, {kind}, \d\.\d MB, {numbers}, SHA-256 [0-9a-f]{{64}}\n", out)
    assert line and err == ""
    lowest, highest, difference = map(float, line.groups())
    assert lowest < highest and difference < 1e-4
    assert [path.name for path in tmp_path.iterdir()] == [file]  # without data beside it
    content = (tmp_path / file).read_bytes()
    assert b"resnest.py" not in content and b"site-packages" not in content
    graph, metadata = open_graph(tmp_path / file)
    other_sizes = ((1, 33, 47), (2, 96, 65), (1, 32, 32)) if form == "onnx" else ()
    for shape in ((1, 64, 64), (5, 64, 64), *other_sizes):
        images = graphs.draw_images(*shape, torch.Generator().manual_seed(2))
        with torch.no_grad():
            torch.testing.assert_close(graph(images), model(images), rtol=1e-4, atol=1e-4)
    assert metadata["model"] == NAME
    assert metadata["protocol"] == "short side 73 bilinear, centre crop 64"
    assert json.loads(metadata["mean"]) == [0.485, 0.456, 0.406]
    assert json.loads(metadata["std"]) == [0.229, 0.224, 0.225]
    assert (metadata["crop"], metadata["ratio"], metadata["interpolation"]) == ("64", "0.875", "bilinear")
    assert json.loads(metadata["classes"]) == CLASSES
    assert json.loads(metadata["class_names"])[2].startswith("goldfish")


def test_classes_are_imagenets_of_1000_outputs_and_else_unknown(tmp_path):
    for outputs, classes in ((1000, tuple(imagenet_synsets())), (7, None)):
        save_checkpoint(build_model(NAME, outputs).state_dict(), tmp_path / "bare.pth")
        images = card.ImageInput(224, 0.875, "bilinear", "resize_crop", True, "", (0.0,), (1.0,))
        _, _, found = card.open_network(f"{tmp_path}/bare.pth", lambda weights, name, images=images: images, NAME)
        assert found.classes == classes
        assert ("classes" in found.to_metadata()) == (classes is not None)


def substitute(monkeypatch, network):
    """Put another computation in the place of the graph: none is made."""
    monkeypatch.setattr(graphs, "_make_onnx", lambda *_: b"new")
    monkeypatch.setattr(graphs, "_load_onnx", lambda _: network)


@pytest.mark.slow
def test_a_graph_that_computes_something_else_is_not_written(model, checkpoint, tmp_path, monkeypatch):
    out = tmp_path / "out.onnx"
    out.write_text("old")
    for difference in (0.01, float("nan")):
        substitute(monkeypatch, lambda images, difference=difference: model(images) + difference)
        with pytest.raises(UserError, match="out.onnx is not written: its logits .*differ by .* from torch's") as error:
            export(checkpoint, "format=onnx", f"out={out}")
        assert "\n" not in str(error.value)
    assert out.read_text() == "old" and list(tmp_path.iterdir()) == [out]
    substitute(monkeypatch, model)
    export(checkpoint, "format=onnx", f"out={out}")
    assert out.read_text() == "new"


def test_a_network_without_finite_logits_is_refused(tmp_path, monkeypatch):
    broken = build_model(NAME, 3).eval()
    torch.nn.init.constant_(broken.bn1.running_var, -1)
    save_checkpoint(broken.state_dict(), tmp_path / "nan.pth")
    substitute(monkeypatch, broken)
    with pytest.raises(CheckpointError, match="nan.pth: the logits are not finite"):
        export(tmp_path / "nan.pth", f"model={NAME}", "format=onnx", f"out={tmp_path}/out.onnx")


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_without_the_extra_it_is_one_line_before_any_work(package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)  # importing it now fails
    with pytest.raises(
        ConfigError, match=r"^format=onnx needs the extra \[onnx\] of resnest-imagenet: pip install 'onnx>=1.18' "
    ):
        export("/nowhere.pt", "format=onnx")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["format=onnx", "layout=mmpretrain"], "layout=mmpretrain is for format=pth or safetensors, not onnx"),
        (["format=hub", "layout=detectron2"], "layout=detectron2 is for format=pth or safetensors, not hub"),
        (["format=torch_export", "sizes=any"], "sizes=any is for format=onnx, not torch_export"),
        (["format=pth", "sizes=crop"], "sizes=crop is for format=onnx or torch_export, not pth"),
        (["format=onnx", "crop=16"], "crop=16: input should be greater than or equal to 32"),
    ],
)
def test_options_that_make_no_sense_together(overrides, message):
    with pytest.raises(ConfigError, match=message):
        compose_config("export", ExportConfig, "ckpt=x", *overrides)


@pytest.mark.slow
def test_the_suffix_is_the_formats(checkpoint, tmp_path):
    for form, suffix in (("onnx", ".onnx"), ("torch_export", ".pt2")):
        with pytest.raises(ConfigError, match=f"out.pth does not end in {suffix}: set format=... or another name"):
            export(checkpoint, f"format={form}", f"out={tmp_path}/out.pth")


def test_failures_of_the_exporter_are_not_kept_back():
    with pytest.raises(RuntimeError, match="told"), graphs.quiet():
        print("noise")
        raise RuntimeError("told")
    assert not isinstance(sys.stdout, io.StringIO)
