"""Graphs in ONNX and torch.export's format: they compute what the network does, or are not written."""

import io
import json
import re
import sys
from hashlib import sha256

import numpy as np
import pytest
import torch

from conftest import compose_config
from graph_files import make_graphs_once, open_openvino
from resnest_imagenet import build_model
from resnest_imagenet.checkpoint import save_checkpoint
from resnest_imagenet.commands.early import refuse_early
from resnest_imagenet.commands.export import run
from resnest_imagenet.config_reading import ExportConfig
from resnest_imagenet.errors import CheckpointError, ConfigError, DataError, UserError
from resnest_imagenet.inference import quantise
from resnest_imagenet.inference.classifier import open_classifier
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
        images = graphs.draw_images(32, 64, 64, torch.Generator().manual_seed(1))
        model(images)
        model.fc.bias.sub_(model.eval()(images).mean(0))  # each class is the likeliest of some images
    return model


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


def open_xml(path):
    graph, metadata = open_openvino(path)
    return lambda images: graph(images=images)["logits"], metadata


def open_program(path):
    extra_files = {"metadata.json": ""}
    program = torch.export.load(path, extra_files=extra_files)
    return program.module(), json.loads(extra_files["metadata.json"])


@pytest.fixture(scope="module")
def made():
    return {}


@pytest.mark.parametrize(
    ("form", "file", "open_graph", "kind"),
    [
        ("onnx", "resnest14_half.onnx", open_onnx, "opset 18"),
        ("openvino", "resnest14_half.xml", open_xml, "OpenVINO IR"),
        ("torch_export", "resnest14_half.pt2", open_program, "crop 64"),
    ],
)
@pytest.mark.slow
def test_a_graph_computes_what_the_network_does(
    form, file, open_graph, kind, model, checkpoint, made, tmp_path, monkeypatch, capfd
):
    monkeypatch.chdir(tmp_path)
    make_graphs_once(monkeypatch, graphs, made)
    export(checkpoint, f"format={form}")
    out, err = capfd.readouterr()
    numbers = r"logits from (\S+) to (\S+) and within (\S+) of the network's"
    files = [file] + ["resnest14_half.bin"] * (form == "openvino")
    digests = " and ".join(sha256((tmp_path / name).read_bytes()).hexdigest() for name in files)
    line = re.fullmatch(rf"wrote {' and '.join(files)}: {NAME}, {kind}, \d\.\d MB, {numbers}, SHA-256 {digests}\n", out)
    assert line and err == ""
    lowest, highest, difference = map(float, line.groups())
    assert lowest < highest and difference < 1e-4
    assert {path.name for path in tmp_path.iterdir()} == set(files)  # without other data beside it
    content = (tmp_path / file).read_bytes()
    assert not any(part in content for part in (b"resnest.py", b"site-packages", bytes(tmp_path.parent)))
    graph, metadata = open_graph(tmp_path / file)
    other_sizes = ((1, 33, 47), (2, 96, 65), (1, 32, 32)) if form != "torch_export" else ()
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


MEAN, STD = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """20 images of the network's size in folders of the three classes, and a file that is none."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("photos")
    images = graphs.draw_images(20, 64, 64, torch.Generator().manual_seed(3)).permute(0, 2, 3, 1).numpy()
    for number, pixels in enumerate(((images * STD + MEAN) * 255).clip(0, 255).round().astype(np.uint8)):
        path = folder / CLASSES[number % 3] / f"{number:02}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(path)
    (folder / "a/broken.jpg").write_text("no picture")
    return folder


def load_images(paths):
    """Return images as the network sees them; they need no resize."""
    from PIL import Image

    pixels = np.stack([np.asarray(Image.open(path)) for path in paths]) / np.float32(255)
    return torch.from_numpy((pixels - MEAN) / STD).permute(0, 3, 1, 2).contiguous()


@pytest.mark.slow
@pytest.mark.process
def test_the_table_of_8_bit_integers_has_what_both_graphs_do_with_the_images(
    model, checkpoint, made, photos, tmp_path, monkeypatch, capfd
):
    import onnx
    import onnxruntime

    monkeypatch.chdir(tmp_path)
    make_graphs_once(monkeypatch, graphs, made)
    with pytest.raises(DataError, match="^images skipped: 1$"):
        export(checkpoint, "format=onnx", "protocol=full", f"int8={photos}")
    out, err = capfd.readouterr()
    assert f"{photos}/a/broken.jpg" in err
    lines = out.splitlines()
    assert re.fullmatch(
        r"wrote resnest14_half-int8.onnx: resnest14_half, opset 18, \d\.\d MB, 8-bit integers, calibrated with 20 "
        rf"images of {photos}, SHA-256 [0-9a-f]{{64}}",
        lines[0],
    )
    exact, small = made[64, True], (tmp_path / "resnest14_half-int8.onnx").read_bytes()
    paths = sorted(photos.glob("*/[0-9]*"))
    images, labels = load_images(paths), [CLASSES.index(path.parent.name) for path in paths]
    predicted = []
    for content in (exact, small):
        session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
        predicted.append(session.run(["logits"], {"images": images.numpy()})[0].argmax(1))
    with torch.no_grad():
        assert (model(images).argmax(1).numpy() == predicted[0]).all()
    alike = (predicted[0] == predicted[1]).sum()
    assert len(set(predicted[0])) > 1 and alike > 15
    for line, name, content, classes in zip(lines[2:4], ("float32", "int8"), (exact, small), predicted, strict=True):
        size, top1 = f"{len(content) / 1e6:.1f} MB", f"{100 * (classes == labels).mean():.2f} %"
        assert re.fullmatch(rf"{name} +{size} +{top1} +\d+\.\d ms", line)
    assert lines[4] == f"images: 20, {alike} of them with the same likeliest class"
    assert len(small) < len(exact) / 3
    graph = onnx.load_from_string(small)
    metadata = {entry.key: entry.value for entry in graph.metadata_props}
    assert json.loads(metadata["classes"]) == CLASSES and metadata["crop"] == "64" and "onnx.infer" not in metadata
    weights = [tensor for tensor in graph.graph.initializer if tensor.name.endswith("weight_quantized")]
    assert len(weights) > 15 and all(tensor.data_type == onnx.TensorProto.INT8 for tensor in weights)
    # Of any size, as the exact graph.
    session = onnxruntime.InferenceSession(small, providers=["CPUExecutionProvider"])
    assert session.run(None, {"images": np.zeros((1, 3, 96, 65), np.float32)})[0].shape == (1, 3)
    # Without class folders there are no labels.
    export(checkpoint, "format=onnx", f"int8={photos}/b", "out=flat.onnx")
    lines = capfd.readouterr().out.splitlines()
    assert all(re.fullmatch(r"(float32|int8) +\d\.\d MB +- +\d+\.\d ms", line) for line in lines[2:4])
    assert re.fullmatch(
        r"images: 7, \d of them with the same likeliest class; without class folders there is no accuracy", lines[4]
    )
    # OpenVINO computes with the same integers.
    export(checkpoint, "format=openvino", f"int8={photos}/b")
    lines = capfd.readouterr().out.splitlines()
    weights = tmp_path / "resnest14_half-int8.bin"
    assert lines[0].startswith("wrote resnest14_half-int8.xml and resnest14_half-int8.bin: resnest14_half, OpenVINO IR")
    assert weights.stat().st_size < len(exact) / 3
    in_openvino, metadata = open_xml(weights.with_suffix(".xml"))
    assert metadata["model"] == NAME
    session = onnxruntime.InferenceSession(tmp_path / "flat.onnx", providers=["CPUExecutionProvider"])
    others = torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
    with torch.no_grad():
        errors = [(logits - model(images)).abs().mean() for logits in (in_openvino(images), others)]
    assert 0 < errors[0] < 1.5 * errors[1]  # the rounding of the integers, not more


@pytest.mark.slow
def test_folders_that_are_no_classes_are_refused_before_the_work(checkpoint, photos, tmp_path, monkeypatch):
    monkeypatch.setattr("resnest_imagenet.inference.quantise.make_graph", None)
    for folder in ("a", "2026-05"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "1.png").write_bytes(min(photos.glob("a/[0-9]*")).read_bytes())
    with pytest.raises(DataError, match=f"^{tmp_path}: 1 of its classes are not among the classes of .*: 2026-05$"):
        export(checkpoint, "format=onnx", f"int8={tmp_path}")


def test_folders_by_date_calibrate_without_accuracy(checkpoint, photos, tmp_path, capsys):
    """None of the folders is a class, so they only sort the images; one of them may be empty."""
    for folder in ("2026-05", "2026-06", "2026-07/late"):
        (tmp_path / folder).mkdir(parents=True)
    for folder in ("2026-05", "2026-07/late"):
        (tmp_path / folder / "1.png").write_bytes(min(photos.glob("a/[0-9]*")).read_bytes())
    listed, has_classes = quantise._list_folder(tmp_path, open_classifier(checkpoint, crop=64, device="cpu"))
    names = [listed.name(index) for index in range(len(listed))]
    assert names == [f"{tmp_path}/2026-05/1.png", f"{tmp_path}/2026-07/late/1.png"] and not has_classes
    assert f"{tmp_path}: no folder has the name of a class of {checkpoint}: no accuracy\n" in capsys.readouterr().err


def test_a_folder_that_is_not_there_is_refused_before_the_work():
    config = compose_config("export", ExportConfig, "ckpt=/nowhere.pt", "format=onnx", "int8=/nowhere")
    with pytest.raises(ConfigError, match="^int8=/nowhere: no such folder$"):
        refuse_early(config)


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


@pytest.mark.parametrize(
    ("form", "package"),
    [("onnx", "onnx"), ("onnx", "onnxscript"), ("onnx", "onnxruntime"), ("openvino", "onnx"), ("openvino", "openvino")],
)
def test_without_the_extra_it_is_one_line_before_any_work(form, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)  # importing it now fails
    with pytest.raises(
        ConfigError, match=rf"^format={form} needs the extra \[{form}\] of resnest-imagenet: pip install 'onnx>=1.18' "
    ):
        export("/nowhere.pt", f"format={form}")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["format=onnx", "layout=mmpretrain"], "layout=mmpretrain is for format=pth or safetensors, not onnx"),
        (["format=hub", "layout=detectron2"], "layout=detectron2 is for format=pth or safetensors, not hub"),
        (["format=torch_export", "sizes=any"], "sizes=any is for format=onnx or openvino, not torch_export"),
        (["format=pth", "sizes=crop"], "sizes=crop is for format=onnx, openvino or torch_export, not pth"),
        (["format=hub", "int8=photos"], "int8=photos is for format=onnx or openvino, not hub"),
        (["format=onnx", "crop=16"], "crop=16: input should be greater than or equal to 32"),
    ],
)
def test_options_that_make_no_sense_together(overrides, message):
    with pytest.raises(ConfigError, match=message):
        compose_config("export", ExportConfig, "ckpt=x", *overrides)


def test_a_state_dict_has_no_crop(checkpoint, tmp_path):
    for options in (["crop=64"], ["protocol=full"]):
        config = compose_config("export", ExportConfig, f"ckpt={checkpoint}", f"out={tmp_path}/x.safetensors", *options)
        with pytest.raises(ConfigError, match="^crop and protocol are of images: format=safetensors has weights"):
            run(config)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_suffix_is_the_formats(checkpoint, tmp_path):
    for form, suffix in (("onnx", ".onnx"), ("openvino", ".xml"), ("torch_export", ".pt2")):
        with pytest.raises(ConfigError, match=f"out.pth does not end in {suffix}: set format=... or another name"):
            export(checkpoint, f"format={form}", f"out={tmp_path}/out.pth")
    weights = tmp_path / "net.bin"
    weights.write_bytes(checkpoint.read_bytes())
    with pytest.raises(ConfigError, match=f"out={tmp_path}/net.xml is the checkpoint itself: set another name"):
        export(weights, "format=openvino", f"out={tmp_path}/net.xml")  # its weights would be in net.bin


def test_failures_of_the_exporter_are_not_kept_back():
    with pytest.raises(RuntimeError, match="told"), graphs.quiet():
        print("noise")
        raise RuntimeError("told")
    assert not isinstance(sys.stdout, io.StringIO)
