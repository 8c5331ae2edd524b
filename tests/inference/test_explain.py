import csv
import io
import os
import re
import sys
from urllib.parse import unquote_to_bytes

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from conftest import compose_config, predict_classes
from resnest_imagenet import build_model
from resnest_imagenet.commands import explain as command
from resnest_imagenet.commands.explain import explain_images
from resnest_imagenet.config_reading import ExplainConfig, PredictConfig
from resnest_imagenet.data.demo import FIGURES
from resnest_imagenet.errors import ConfigError
from resnest_imagenet.inference.explain import (
    ClassMap,
    Explanation,
    find_class,
    map_evidence,
    recording_attention,
)
from resnest_imagenet.models.folding import fold_batch_norms
from resnest_imagenet.models.resnest import ResNeSt, ResNeStSpec
from resnest_imagenet.models.split_attention import SplitAttention

OPTIONS = ("device=cpu", "crop=64", "loader.workers=1", "batch_size=3")


def explain(*options):
    return explain_images(compose_config("explain", ExplainConfig, *OPTIONS, *options))


def randomise(model):
    """Give the batch norms what training gives them: at first those of zero gamma hide their blocks."""
    torch.manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A network for the demo's classes, with all that a checkpoint of ours tells."""
    path = tmp_path_factory.mktemp("weights") / "best.pt"
    config = {"model": {"name": "resnest14_half"}, "train": {}}
    model = randomise(build_model("resnest14_half", 10)).state_dict()
    torch.save({"model": model, "config": config, "classes": sorted(FIGURES), "epoch": 1}, path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnest14_half", "resnet50", "skresnext50_32x4d"])
def test_at_layer4_the_map_is_that_of_the_classifiers_weights(name):
    """CAM (Zhou et al. 2016), which needs no gradient: fc's weights times the features, for global average pooling."""
    torch.manual_seed(0)
    model = fold_batch_norms(randomise(build_model(name, 10))).double().requires_grad_(False)
    images, classes = torch.randn(3, 3, 64, 96).double(), torch.tensor([7, 2, 7])
    features = []
    with model.get_submodule("layer4").register_forward_hook(lambda *call: features.append(call[2].clone())):
        logits = model(images)
    cam = torch.einsum("bchw,bc->bhw", features[0], model.fc.weight[classes]) / (2 * 3)
    of_class = logits.gather(1, classes[:, None])[:, 0] - model.fc.bias[classes]
    torch.testing.assert_close(cam.sum((1, 2)), of_class)
    assert (cam > 0).any() and (cam < 0).any()
    found = map_evidence(model, "layer4", images, classes)
    assert not found.requires_grad
    torch.testing.assert_close(found, cam.relu())


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["fused", "reference"])
@pytest.mark.parametrize("fold", [False, True])
def test_at_layer3_the_gradients_are_finite_differences(implementation, fold):
    torch.manual_seed(0)
    model = randomise(build_model("resnest14_half", 5, split_attention=implementation)).double().eval()
    model = (fold_batch_norms(model) if fold else model).requires_grad_(False)
    image, step = torch.randn(1, 3, 32, 32).double(), 1e-6
    features = []
    with model.layer3.register_forward_hook(lambda *call: features.append(call[2].clone())):
        logits = model(image)
    (activations,) = features[0]
    # Each channel raised everywhere: the logits then rise by the sum of their gradients over its places.
    raised = activations + step * torch.eye(len(activations)).double()[..., None, None]
    gradients = (model.fc(model.layer4(raised).mean((2, 3))) - logits) / step
    expected = torch.einsum("chw,ck->khw", activations, gradients / (2 * 2)).relu()
    assert (expected > 0.01).any()
    found = map_evidence(model, "layer3", image.expand(5, -1, -1, -1), torch.arange(5))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("implementation", ["fused", "reference"])
@pytest.mark.parametrize(("radix", "cardinality"), [(1, 1), (2, 1), (4, 2)])
def test_the_recorded_attention_is_that_of_the_formula(radix, cardinality, implementation):
    torch.manual_seed(0)
    spec = ResNeStSpec((1, 2, 1, 1), radix, cardinality, stem_width=8, planes=16)
    model = randomise(ResNeSt(spec, 5, split_attention=implementation)).eval()
    images = torch.randn(2, 3, 64, 64)
    outputs, folded = {}, fold_batch_norms(model)
    for name, module in model.named_modules():
        if name.endswith("conv2.conv"):
            module.register_forward_hook(lambda *call, name=name: outputs.update({name[:8]: call[2].clone()}))
    with torch.no_grad():
        expected_logits = model(images)
        with recording_attention(model) as attention:
            logits = model(images)
        with recording_attention(folded) as of_folded:
            folded(images)
    assert torch.equal(logits, expected_logits)
    assert [*attention] == ["layer1.0", "layer2.0", "layer2.1", "layer3.0", "layer4.0"]
    for block, weights in attention.items():
        split_attention = model.get_submodule(f"{block}.conv2")
        splits = F.relu(split_attention.bn0(outputs[block])).unflatten(1, (radix, -1))
        hidden = split_attention.fc1(splits.sum(1).mean((2, 3), keepdim=True))
        by_formula = split_attention.fc2(F.relu(split_attention.bn1(hidden)))[..., 0, 0]
        by_formula = by_formula.unflatten(1, (cardinality, radix, -1)).transpose(1, 2).flatten(2)
        by_formula = by_formula.softmax(1) if radix > 1 else by_formula.sigmoid()
        torch.testing.assert_close(weights, by_formula, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(of_folded[block], by_formula, rtol=1e-3, atol=1e-4)
    assert not any("_weigh" in vars(m) for m in model.modules() if isinstance(m, SplitAttention))


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.parametrize("loader", ["dali", "torchvision"])
def test_what_is_drawn_is_what_the_network_sees_and_says(checkpoint, demo_images, tmp_path, monkeypatch, loader):
    from resnest_imagenet.reports import explain_pictures

    drawn = []
    monkeypatch.setattr(explain_pictures, "draw_maps", lambda each, layer: drawn.append((each, layer)))
    monkeypatch.setattr(explain_pictures, "draw_attention", lambda each: None)
    monkeypatch.setattr(explain_pictures, "draw_summary", lambda model, attention: None)
    monkeypatch.setattr(explain_pictures, "encode_png", lambda figure: b"")
    options = (f"ckpt={checkpoint}", f"images={demo_images}/val/disk", f"loader={loader}")
    _, faults = explain(*options, f"out={tmp_path}/out", "top=3", "layer=layer2")
    assert not faults
    config = compose_config("predict", PredictConfig, *OPTIONS, *options, "top=3")
    predictions, _ = predict_classes(config)
    said = [(each.file, one.name, one.probability) for each, _ in drawn for one in each.maps]
    assert [row[:2] for row in said] == [(p.file, p.label) for p in predictions]
    assert [row[2] for row in said] == pytest.approx([p.probability for p in predictions], abs=1e-5)
    assert {layer for _, layer in drawn} == {"layer2"}
    assert {one.evidence.shape for each, _ in drawn for one in each.maps} == {(8, 8)}
    # The same crop by hand: 64 / 0.875 pixels, the middle of them.
    from torchvision.transforms import v2

    crop = v2.Compose([v2.PILToTensor(), v2.Resize(73), v2.CenterCrop(64)])
    model = build_model("resnest14_half", 10)
    model.load_state_dict(torch.load(checkpoint, weights_only=True)["model"])
    model.eval().requires_grad_(False)
    normalise = v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    for each, _ in drawn:
        expected = crop(Image.open(each.file)).permute(1, 2, 0).numpy()
        assert each.pixels.dtype == np.uint8 and np.abs(each.pixels - expected.astype(int)).mean() < 1
        image = normalise(torch.from_numpy(each.pixels).permute(2, 0, 1) / 255)
        labels = torch.tensor([sorted(FIGURES).index(one.name) for one in each.maps])
        by_hand = map_evidence(model, "layer2", image.expand(3, -1, -1, -1), labels).numpy()
        for one, evidence in zip(each.maps, by_hand, strict=True):
            assert np.abs(one.evidence - evidence).max() < 0.05 * max(0.1, evidence.max())
    rows = list(csv.DictReader((tmp_path / "out/attention.csv").open()))
    assert len(rows) == len(drawn) * 4 * 2  # blocks and splits
    for row in rows:
        (each,) = [each for each, _ in drawn if each.file == row["file"]]
        weights = each.attention[row["block"]][int(row["split"]) - 1]
        assert float(row["mean"]) == pytest.approx(weights.mean(), abs=1e-6)
        assert float(row["std"]) == pytest.approx(weights.std(), abs=1e-6)
    drawn.clear()
    explain(*options, f"out={tmp_path}/out", "target=ring")
    likely = {p.file: p.label for p in predictions if p.rank == 1}
    assert [each.maps[0].name for each, _ in drawn] == ["ring"] * len(likely)
    assert set(likely.values()) != {"ring"}


@pytest.mark.slow
def test_the_command_writes_pictures_and_names_bad_images(checkpoint, demo_images, tmp_path, monkeypatch, capsys):
    for folder, name in (("a", "x.jpg"), ("b", "x.jpg"), ("b", "$\\frac$\udce4 金.jpg")):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / name).write_bytes((demo_images / "val/disk/disk_0_00000.JPEG").read_bytes())
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    images = f"images=[{tmp_path}/a,{tmp_path}/b,{tmp_path}/bad.jpg]"
    out = tmp_path / "out"
    words = (*OPTIONS, f"ckpt={checkpoint}", images, f"out={out}", "top=2")
    monkeypatch.setattr(sys, "argv", ["resnest-explain", *words])
    with pytest.raises(SystemExit, match="^3$"):
        command.main()
    printed = capsys.readouterr()
    assert printed.err.splitlines() == [
        f"{tmp_path}/bad.jpg: not a readable image (of no known format); skipped",
        "resnest-explain: images skipped: 1",
    ]
    assert printed.out.splitlines()[:2] == [f"pictures in {out}/maps: 3", f"pictures in {out}/attention: 3"]
    for kind in ("maps", "attention"):
        pictures = sorted(path.relative_to(out / kind) for path in (out / kind).rglob("*.png"))
        assert [str(path) for path in pictures] == ["a/x.jpg.png", "b/$\\frac$\udce4 金.jpg.png", "b/x.jpg.png"]
        for path in pictures:
            Image.open(out / kind / path).verify()
    Image.open(out / "attention.png").verify()
    page = (out / "index.html").read_bytes().decode(errors="surrogateescape")
    links = [unquote_to_bytes(link) for link in re.findall(r'src="([^"]+)"', page)]
    assert len(links) == 4 and all((out / os.fsdecode(link)).is_file() for link in links)
    assert page.count("the weights of its splits") == 3 and "Grad-CAM of layer2" in page


def test_the_deepest_layer_with_seven_places_is_drawn():
    from resnest_imagenet.data.transforms import EvalTransform
    from resnest_imagenet.inference.classifier import Classifier
    from resnest_imagenet.inference.explain import choose_layer
    from resnest_imagenet.weights.load import Weights

    model = build_model("resnest14_half", 10).eval()
    devices = set()  # on a GPU, operators are tried before they compute
    hook = model.register_forward_hook(lambda module, inputs, output: devices.add(output.device.type))
    expected = {16: "layer1", 48: "layer1", 56: "layer2", 96: "layer2", 112: "layer3", 223: "layer4"}
    for crop, layer in expected.items():
        classifier = Classifier(Weights("x", {}), "resnest14_half", (), (EvalTransform(crop),), model)
        assert choose_layer(classifier) == layer
    assert devices == {"meta"}
    hook.remove()
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.process
@pytest.mark.slow
def test_a_peer_has_maps_and_no_attention(demo_images, tmp_path):
    path = tmp_path / "bare.pth"
    torch.save(build_model("resnet50", 10).state_dict(), path)
    images = f"images={demo_images}/val/disk/disk_0_00000.JPEG"
    lines, _ = explain(f"ckpt={path}", "model=resnet50", images, f"out={tmp_path}/out")
    assert lines[:2] == [f"pictures in {tmp_path}/out/maps: 1", "resnet50 has no split attention to draw"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["index.html", "maps"]
    assert "attention" not in (tmp_path / "out/index.html").read_text()


def test_the_maps_lie_on_the_image_as_it_does():
    """Upper left of the map: upper left of the picture, which is lighter above, in the image too."""
    from resnest_imagenet.reports import explain_pictures

    evidence = np.zeros((2, 3), np.float32)
    evidence[0, 0] = 5
    grey = np.full((64, 64, 3), 50, np.uint8)
    grey[:32] = 150
    maps = (ClassMap("a", 0.9, evidence), ClassMap("b", 0.1, 0 * evidence))
    figure = explain_pictures.draw_maps(Explanation("/x/a.jpg", grey, maps, {}), "layer4")
    pixels = np.array(Image.open(io.BytesIO(explain_pictures.encode_png(figure))).convert("L")).astype(int)
    box = figure.axes[1].get_window_extent()
    left, right = int(box.x0) + 9, int(box.x1) - 9
    top, bottom = pixels.shape[0] - int(box.y1) + 9, pixels.shape[0] - int(box.y0) - 9
    assert pixels[top, left] > 100 + pixels[top, right]
    assert pixels[top, right] > 20 + max(pixels[bottom, left], pixels[bottom, right])
    titles = [panel.get_title() for panel in figure.axes[:3]]
    assert titles == ["what the network sees\n64 x 64 pixels", "a\n90.00 %", "b\n10.00 %, zero everywhere"]


def test_the_attention_is_drawn_by_layer_and_block():
    from resnest_imagenet.reports import explain_pictures

    first = np.array([[0.9, 0.2, 0.6]], np.float32)
    attention = {f"layer{layer}.{block}": np.concatenate([first, 1 - first]) for layer in (1, 2) for block in range(9)}
    image = Explanation("/x/a.jpg", np.zeros((2, 2, 3), np.uint8), (ClassMap("a", 0.9, np.ones((1, 1))),), attention)
    panels = explain_pictures.draw_attention(image).axes
    labels = [[tick.get_text() for tick in panel.get_xticklabels()] for panel in panels]
    assert [len(row) for row in labels] == [8, 1, 8, 1]
    assert labels[1] == ["layer1.8\n0.57 ± 0.29"]
    # The border between the splits falls from the channel that takes most of the first.
    edge = panels[1].collections[0].get_paths()[0].vertices
    assert {round(float(y), 1) for y in edge[:, 1]} == {0.9, 0.6, 0.2, 0.0}
    assert edge[edge[:, 0] == 0][:, 1].max() == pytest.approx(0.9)


def test_the_summary_tells_channels_from_images():
    from resnest_imagenet.reports import explain_pictures

    fixed = np.broadcast_to(np.array([0.2, 0.6], np.float32), (3, 2))  # by channel, in all images
    chosen = np.broadcast_to(np.array([[0.1], [0.5], [0.9]], np.float32), (3, 2))  # by image, in all channels
    attention = {name: np.stack([a, 1 - a], 1) for name, a in (("layer1.0", fixed), ("layer2.0", chosen))}
    upper, lower = explain_pictures.draw_summary("resnest50", attention).axes
    assert [bar.get_height() for bar in upper.patches] == pytest.approx([0.4, 0.5, 0.6, 0.5])
    of_images = np.std([0.1, 0.5, 0.9])
    assert [bar.get_height() for bar in lower.patches] == pytest.approx([0.2, 0, 0, of_images], abs=1e-6)
    _, lower = explain_pictures.draw_summary("resnest50", {"layer1.0": attention["layer1.0"][:1]}).axes
    assert len(lower.patches) == 1  # one image says nothing about images


def test_a_target_is_a_name_a_number_or_words():
    classes = ["n01443537", "n02012849", "n03126707", "7"]
    for target, expected in (("n03126707", 2), ("Goldfish", 0), ("carassius_auratus", 0), ("1", 1), ("7", 3)):
        assert find_class(target, classes) == expected
    with pytest.raises(ConfigError, match="target=crane may mean n02012849 or n03126707"):
        find_class("crane", classes)
    with pytest.raises(ConfigError, match="target=goldfsh: none of the network's 4 classes; did you mean 'goldfish'"):
        find_class("goldfsh", classes)
    with pytest.raises(ConfigError, match="target=4: none of"):
        find_class("4", classes)


def test_pictures_have_names_of_their_own():
    from resnest_imagenet.reports import explain_pictures

    assert explain_pictures.name_pictures(["/p/a/x.jpg", "/p/b/x.jpg", "/p/b/x.png"]) == [
        "a/x.jpg.png",
        "b/x.jpg.png",
        "b/x.png.png",
    ]
    assert explain_pictures.name_pictures(["/p/x.jpg"]) == ["x.jpg.png"]


def test_refusals(checkpoint, demo_images, tmp_path, monkeypatch):
    options = (f"ckpt={checkpoint}", f"images={demo_images}/val/disk")
    with pytest.raises(ConfigError, match="give either target=ring or top=2"):
        explain(*options, f"out={tmp_path}", "target=ring", "top=2")
    with pytest.raises(ConfigError, match="holds images to explain"):
        explain(*options, f"out={demo_images}/val")
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"out=.*/file/.*: cannot be written"):
        explain(*options, f"out={tmp_path}/file")
    with pytest.raises(ConfigError, match="target=rign: none of the network's 10 classes; did you mean 'ring'"):
        explain(*options, f"out={tmp_path}/out", "target=rign")
    monkeypatch.setitem(sys.modules, "captum", None)
    with pytest.raises(
        ConfigError,
        match=r"^resnest-explain needs the extra \[explain\] of resnest-imagenet: pip install 'captum>=0.9'$",
    ):
        explain(*options, f"out={tmp_path}/out")
