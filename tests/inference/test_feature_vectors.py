"""Feature vectors by the command and by the library, against layers that are called one after another."""

import os
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from resnest_imagenet import build_model, extract_features, open_classifier, predict
from resnest_imagenet.commands import predict as command
from resnest_imagenet.data.demo import FIGURES
from resnest_imagenet.data.transforms import EvalTransform
from resnest_imagenet.errors import ConfigError, NonFiniteError
from resnest_imagenet.inference.classifier import Classifier
from resnest_imagenet.weights.load import Weights

OPTIONS = ("device=cpu", "loader=torchvision", "loader.workers=0", "batch_size=3")
FAST = {"loader": "torchvision", "workers": 0, "batch_size": 3}
MEAN, STD = [0.5, 0.4, 0.3], [0.3, 0.25, 0.2]
CHANNELS = {"layer1": 128, "layer2": 256, "layer3": 512, "layer4": 1024, "head": 1024}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A network for the demo's classes, with a crop, a mean and a deviation of its own."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "best.pt"
    protocol = {"order": "resize_crop", "ratio": 1.0, "interpolation": "bilinear", "antialias": True}
    recipe = {"crop": 32, "mean": MEAN, "std": STD}
    config = {"model": {"name": "resnest14_half"}, "train": recipe, "eval": {"crop": 40}, "protocol": protocol}
    model = build_model("resnest14_half", 10).state_dict()
    torch.save({"model": model, "config": config, "classes": sorted(FIGURES), "epoch": 1}, path)
    return path


def see(file):
    """Return an image as the checkpoint's run evaluated it, (1, 3, 40, 40)."""
    from torchvision.transforms import v2

    transform = v2.Compose([v2.Resize(40), v2.CenterCrop(40), v2.PILToTensor(), v2.ToDtype(torch.float, scale=True)])
    return v2.Normalize(MEAN, STD)(transform(Image.open(file)))[None]


@pytest.mark.process
def test_the_file_has_what_the_layers_compute(checkpoint, demo_images, tmp_path, monkeypatch, capsys):
    images = shutil.copytree(demo_images / "val/disk", tmp_path / os.fsdecode(b"photos \xff"))
    (images / "bad.jpg").write_bytes(b"no image")
    out = tmp_path / "x.npz"
    words = ["resnest-predict", *OPTIONS, f"ckpt={checkpoint}", f"images={tmp_path}/photos*", "features=layer2"]
    monkeypatch.setattr(sys, "argv", [*words, f"out={out}"])
    with pytest.raises(SystemExit, match="^3$"):  # for the image that was skipped
        command.main()
    assert capsys.readouterr().out == f"{out}: layer2 of 4 images, 256 channels\n"
    with np.load(out) as written:
        content = dict(written)
    files = sorted(str(path) for path in images.iterdir() if path.suffix == ".JPEG")
    assert content["files"].tolist() == files
    assert content["features"].dtype == np.float32 and content["features"].shape == (4, 256)
    texts = [str(content[name]) for name in ("layer", "model", "ckpt", "protocol")]
    assert texts == ["layer2", "resnest14_half", str(checkpoint), "short side 40 bilinear, centre crop 40"]

    model = build_model("resnest14_half", 10)
    model.load_state_dict(torch.load(checkpoint, weights_only=True)["model"])
    model.eval()
    with torch.no_grad():
        for file, vector in zip(files, content["features"], strict=True):
            x = model.layer1(model.maxpool(model.bn1(model.conv1(see(file))).relu()))
            expected = model.layer2(x)[0].mean((1, 2))
            # The loader's pixels differ from these by rounding.
            np.testing.assert_allclose(vector, expected, atol=0.01 * expected.abs().max().item())


@pytest.mark.process
def test_layers_of_the_library(checkpoint, demo_images):
    classifier = open_classifier(checkpoint, device="cpu")
    images = demo_images / "val/ring"
    vectors = {layer: extract_features(classifier, images, layer, **FAST).vectors for layer in CHANNELS}
    assert {layer: values.shape for layer, values in vectors.items()} == {k: (4, n) for k, n in CHANNELS.items()}
    np.testing.assert_array_equal(vectors["layer4"], vectors["head"])  # only the average is between them
    logits = classifier.module.fc(torch.from_numpy(vectors["head"]))
    probabilities = logits.softmax(1).detach().numpy()
    predictions, _ = predict(classifier, images, top=1, **FAST)
    assert [p.probability for p in predictions] == pytest.approx(probabilities.max(1).tolist(), abs=1e-6)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in classifier.module.modules())


class Tiny(nn.Module):
    """A network of one layer."""

    def __init__(self):
        super().__init__()
        self.layer1, self.fc = nn.Conv2d(3, 4, 8, 8), nn.Linear(4, 2)

    def forward(self, images):
        return self.fc(self.layer1(images).mean((2, 3)))


@pytest.mark.process
def test_layers_that_are_missing_and_values_that_are_not_finite(demo_images, tmp_path):
    network = Tiny().eval()
    tiny = Classifier(Weights("x.pt", {}), "tiny", ("a", "b"), (EvalTransform(32),), network)
    with pytest.raises(ConfigError, match="^layer3: tiny has no layer of that name; head is its classifier's input$"):
        extract_features(tiny, demo_images / "val/ring", "layer3", **FAST)
    with pytest.raises(ConfigError, match="^layer='fc': input should be 'layer1', 'layer2'"):
        extract_features(tiny, demo_images / "val/ring", "fc", **FAST)
    network.layer1.bias.data.fill_(torch.nan)
    with pytest.raises(NonFiniteError, match="its features or logits are not finite in fp32, like those of 3 of 3"):
        extract_features(tiny, demo_images / "val/ring", "head", **FAST)
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    features = extract_features(tiny, tmp_path, **FAST | {"layer": "layer1"})
    assert features.files == () and features.vectors.shape == (0, 0) and len(features.skipped) == 1
