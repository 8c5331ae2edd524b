"""Parameters and multiply-adds of every row, and the names in conf/."""

import json
from pathlib import Path

import pytest

from resnest_imagenet import build_model, list_models
from resnest_imagenet.commands.launch import find_conf
from resnest_imagenet.models import imagenet_classes
from resnest_imagenet.models.cost import count_cost
from resnest_imagenet.models.imagenet_classes import imagenet_synsets, short_class_names
from resnest_imagenet.models.zoo import find_pixels

# Parameters, and multiply-adds at 224 and 320 pixels, as counted once.
GOLDEN = json.loads(Path(__file__).with_name("golden.json").read_text())

# One of each kind of block and shortcut; pools behind and before the attention.
KINDS = ["resnest14", "resnest50_fast_4s2x40d", "resnet50d", "seresnext50_32x4d", "skresnext50_32x4d"]

# Parameters in millions and multiply-adds at 224 in billions, as published or counted by others: an independent check
# of the golden figures.
PUBLISHED = {
    "resnest14": (10.612, 2.77),
    "resnest26": (17.069, 3.64),
    "resnest50": (27.483, 5.40),
    "resnest101": (48.275, 10.25),
    "resnest200": (70.202, 17.50),
    "resnest269": (110.929, 22.54),
    "resnest50_fast_1s1x64d": (26.218, 4.35),
    "resnest50_fast_2s1x64d": (27.483, 4.36),
    "resnest50_fast_4s1x64d": (31.913, 4.37),
    "resnest50_fast_1s2x40d": (25.947, 4.39),
    "resnest50_fast_2s2x40d": (26.944, 4.40),
    "resnest50_fast_4s2x40d": (30.418, 4.41),
    "resnest50_fast_1s4x24d": (25.677, 4.43),
    "resnest101_fast": (48.170, 8.09),
    "resnet50": (25.557, 4.11),
    "resnet101": (44.55, 7.83),
    "resnext50_32x4d": (25.03, 4.26),
    "resnext101_32x4d": (44.18, 8.01),
    "seresnext50_32x4d": (27.56, 4.26),
    "seresnext101_32x4d": (48.96, 8.02),
    "resnet50d": (25.58, 4.35),
    "resnet101d": (44.57, 8.08),
    "skresnext50_32x4d": (27.48, 4.50),
    "skresnext101_32x4d": (48.74, 8.50),
    "resnet50s": (25.68, 5.47),
    "resnet101s": (44.67, 9.19),
    "resnet50_msra": (25.557, 3.88),
    "resnet101_msra": (44.55, 7.6),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", list_models())
def test_parameters_and_multiply_adds(name):
    parameters, at_224 = count_cost(name, 224)
    assert [parameters, at_224] == GOLDEN[name][:2]
    if name in PUBLISHED:
        millions, billions = PUBLISHED[name]
        assert parameters / 1e6 == pytest.approx(millions, abs=0.006)
        assert at_224 / 1e9 == pytest.approx(billions, rel=0.006)


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_multiply_adds_of_larger_images(name):
    """The others repeat these blocks, more often or of another width, at the same strides."""
    assert count_cost(name, 320) == (GOLDEN[name][0], GOLDEN[name][2])


def test_every_architecture_has_a_name_in_conf_and_the_reverse():
    files = {path.stem: path.read_text() for path in (find_conf() / "model").glob("*.yaml")}
    assert sorted(files) == list_models()
    assert all(text == f"name: {name}\n" for name, text in files.items())


def test_unknown_name_gets_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'resnest50'"):
        build_model("resnest_50")


@pytest.mark.slow
def test_msra_networks_have_their_strides_in_the_first_convolution():
    """As torchvision's ResNet would be, with the strides of three blocks moved by hand; pixels as Caffe had them."""
    import torch
    from torchvision.models import resnet50

    torch.manual_seed(0)
    model, theirs = build_model("resnet50_msra", 5, zero_gamma=False).eval(), resnet50(num_classes=5).eval()
    theirs.load_state_dict(model.state_dict())
    images = torch.randn(2, 3, 65, 97)
    with torch.no_grad():
        assert not torch.allclose(model(images), theirs(images))
        for block in (theirs.layer2[0], theirs.layer3[0], theirs.layer4[0]):
            block.conv1.stride, block.conv2.stride = (2, 2), (1, 1)
        torch.testing.assert_close(model(images), theirs(images), rtol=1e-5, atol=1e-5)
    bgr, rgb = find_pixels("resnet101_msra"), find_pixels("resnest101")
    assert bgr.is_bgr and not rgb.is_bgr and bgr.std == (1, 1, 1)
    assert [round(value, 2) for value in bgr.mean] == [103.53, 116.28, 123.67]
    assert (rgb.mean, rgb.std) == ((123.68, 116.779, 103.939), (58.393, 57.12, 57.375))
    # Others as torchvision and timm trained them: not the mean and deviation of ResNeSt's detectors.
    imagenet = find_pixels("resnet50")
    assert not imagenet.is_bgr and imagenet.mean == bgr.mean[::-1]
    assert [round(value / 255, 4) for value in (*imagenet.mean, *imagenet.std)] == [
        0.485,
        0.456,
        0.406,
        0.229,
        0.224,
        0.225,
    ]


@pytest.mark.slow
def test_peers_take_the_same_arguments():
    model = build_model("skresnext50_32x4d", num_classes=7, dropout=0.3)
    assert model.fc.out_features == 7
    assert model.drop_rate == 0.3
    assert model.layer1[0].conv3.bn.weight.count_nonzero() == 0


def test_short_names_cut_words_and_no_names():
    assert short_class_names(["n01443537", "cat, black", "cat, white"]) == ["goldfish", "cat, black", "cat, white"]
    # A bird and a machine: equal names would count one as the other.
    assert short_class_names(["n02012849", "n03126707"]) == ["crane (n02012849)", "crane (n03126707)"]
    assert short_class_names(["goldfish", "n01443537"]) == ["goldfish", "goldfish (n01443537)"]
    assert len(set(short_class_names(imagenet_synsets()))) == 1000


@pytest.mark.slow
def test_imagenet_classes():
    classes = imagenet_synsets()
    assert len(classes) == 1000
    assert classes == sorted(classes)
    assert classes[207] == "n02099601"  # golden retriever


@pytest.mark.slow
def test_the_words_of_classes_are_those_of_timm(monkeypatch):
    """Whether its files are read or timm is imported."""
    from timm.data import ImageNetInfo

    table = ImageNetInfo("imagenet-1k")
    for folder in ("data/_info", "elsewhere"):
        monkeypatch.setattr(imagenet_classes, "_FOLDER", folder)
        imagenet_classes._read_words.cache_clear()
        words = imagenet_classes._read_words()
        assert list(words) == table.label_names() and list(words.values()) == table.label_descriptions()
    imagenet_classes._read_words.cache_clear()
