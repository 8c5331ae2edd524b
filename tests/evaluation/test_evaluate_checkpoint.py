import io
import json
import shutil
import tarfile

import numpy as np
import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from conftest import ALONE
from resnest_imagenet import build_model
from resnest_imagenet.data.folder import read_image_folder
from resnest_imagenet.data.plan import plan_evaluation
from resnest_imagenet.data.webdataset import read_shards
from resnest_imagenet.errors import ConfigError, DataError
from resnest_imagenet.evaluation.counting import evaluate
from resnest_imagenet.evaluation.evaluate_checkpoint import _label, evaluate_checkpoint, format_results
from resnest_imagenet.models.zoo import list_imagenet_classes
from resnest_imagenet.weights.load import Weights


class Fixed:
    """A loader of given batches; the images are the logits."""

    def __init__(self, num_samples, *batches):
        self.plan = plan_evaluation(num_samples, 2, 0, 1)
        self._batches = batches

    def batches(self, epoch, start=0):
        yield from self._batches


def test_counts_by_hand():
    logits = torch.tensor([[9.0, 1, 2, 3, 4, 5, 6], [1, 9, 8, 7, 6, 5, 0], [0, 1, 2, 3, 4, 5, 6]])
    loader = Fixed(3, (logits[:2], torch.tensor([0, 5])), (logits[2:], torch.tensor([0])))
    accuracy = evaluate(nn.Identity(), loader, ALONE)
    assert (accuracy.correct1, accuracy.correct5, accuracy.count) == (1, 2, 3)
    assert accuracy.top1 == pytest.approx(100 / 3)
    assert accuracy.labels.tolist() == [0, 5, 0]
    assert accuracy.predicted.tolist() == [0, 1, 6]
    assert accuracy.in_top5.tolist() == [True, True, False]
    probabilities = logits.double().softmax(1)
    np.testing.assert_allclose(accuracy.confidence, probabilities.amax(1), rtol=1e-6)
    np.testing.assert_allclose(accuracy.true_probability, probabilities[[0, 1, 2], [0, 5, 0]], rtol=1e-6)


def test_fewer_than_five_classes():
    loader = Fixed(1, (torch.tensor([[1.0, 2, 3]]), torch.tensor([0])))
    evaluation = evaluate(nn.Identity(), loader, ALONE)
    assert (evaluation.correct1, evaluation.correct5, evaluation.count) == (0, 1, 1)


def test_a_missing_image_is_an_error():
    loader = Fixed(4, (torch.zeros(2, 5), torch.tensor([0, 1])))
    with pytest.raises(RuntimeError, match="evaluated 2 images of 4"):
        evaluate(nn.Identity(), loader, ALONE)


@pytest.fixture
def bare_weights(tmp_path):
    path = tmp_path / "bare.pth"
    torch.save(build_model("resnest14_half", 10).state_dict(), path)
    return path


def test_bare_weights_at_several_crops(bare_weights, evaluation_of, tmp_path):
    out = tmp_path / "new" / "result.json"
    results = evaluate_checkpoint(evaluation_of(bare_weights, "model=resnest14_half", "crop=[32,64]", f"out={out}"))
    measured = json.loads(out.read_text())
    expected = {"model": "resnest14_half", "ckpt": str(bare_weights), "num_classes": 10, "training": None}
    assert {key: measured[key] for key in expected} == expected
    written = measured["results"]
    assert [{k: r[k] for k in ("crop", "count", "protocol")} for r in written] == [
        {"crop": 32, "count": 40, "protocol": "short side 37 bilinear, centre crop 32"},
        {"crop": 64, "count": 40, "protocol": "short side 73 bilinear, centre crop 64"},
    ]
    assert [r["top1"] for r in written] == [r.top1 for r in results]
    table = format_results(results).splitlines()
    assert len(table) == 3 and table[2].split()[0] == "64"


@pytest.mark.skipif(not shutil.which("c++"), reason="torch.compile needs a C++ compiler on a CPU")
def test_a_compiled_evaluation_counts_the_same(bare_weights, evaluation_of):
    options = ("model=resnest14_half", "batch_size=7")
    eager = evaluate_checkpoint(evaluation_of(bare_weights, *options))
    counters.clear()
    assert evaluate_checkpoint(evaluation_of(bare_weights, *options, "compile=true")) == eager


def test_an_evaluation_is_compiled_once_for_all_crops_and_the_last_batch(bare_weights, evaluation_of, graphs):
    options = ("model=resnest14_half", "batch_size=13", "crop=[64,96]", "compile=true")  # 40 = 3 x 13 + 1
    evaluate_checkpoint(evaluation_of(bare_weights, *options))
    assert graphs.frame_count == 1
    assert counters["stats"]["unique_graphs"] > 0


def test_each_number_carries_its_protocol(bare_weights, evaluation_of):
    options = ["protocol=ecentercrop", "protocol.interpolation=bilinear", "protocol.antialias=false", "crop=[32,64]"]
    results = evaluate_checkpoint(evaluation_of(bare_weights, "model=resnest14_half", *options))
    words = [
        "centre square of 0.5 of the short side, resized to 32 bilinear, no antialiasing",
        "centre square of 0.666667 of the short side, resized to 64 bilinear, no antialiasing",
    ]
    assert [r.protocol for r in results] == words
    assert [line.partition("  centre")[2] for line in format_results(results).splitlines()[1:]] == [
        word.removeprefix("centre") for word in words
    ]


def test_bare_weights_need_the_networks_name(bare_weights, evaluation_of):
    with pytest.raises(ConfigError, match="holds bare weights, and they fit model=resnest14_half"):
        evaluate_checkpoint(evaluation_of(bare_weights))


def test_another_number_of_classes_than_the_folders(tmp_path, evaluation_of):
    torch.save(build_model("resnest14_half", 7).state_dict(), tmp_path / "bare.pth")
    with pytest.raises(DataError, match="val has 10 classes, fc.weight of .*bare.pth 7: set data.root or ckpt"):
        evaluate_checkpoint(evaluation_of(tmp_path / "bare.pth", "model=resnest14_half"))


def test_thousand_outputs_are_imagenets_classes(tmp_path, evaluation_of, demo_images):
    """250 synset folders under a 1000-class model: each image has its ImageNet label, not its folder's position."""
    model = build_model("resnest14_half", 1000).eval()
    nn.init.zeros_(model.fc.weight)
    nn.init.zeros_(model.fc.bias)
    with torch.no_grad():
        model.fc.bias[207] = 1  # always answers: golden retriever
    torch.save(model.state_dict(), tmp_path / "bare.pth")
    image = next((demo_images / "val").rglob("*.JPEG"))
    for synset in (list_imagenet_classes()[0], list_imagenet_classes()[207]):
        (tmp_path / "val" / synset).mkdir(parents=True)
        (tmp_path / "val" / synset / "1.JPEG").write_bytes(image.read_bytes())
    config = evaluation_of(tmp_path / "bare.pth", "model=resnest14_half", f"data.root={tmp_path}")
    assert evaluate_checkpoint(config)[0].correct1 == 1
    (tmp_path / "val" / "dragon").mkdir()
    (tmp_path / "val" / "dragon" / "1.JPEG").write_bytes(image.read_bytes())
    with pytest.raises(DataError, match="1 of its classes are not among ImageNet's 1000: dragon"):
        evaluate_checkpoint(config)


def test_a_thousand_other_folders_are_labelled_in_their_order(tmp_path, evaluation_of, demo_images):
    """Not by names that happen to be timm's or ImageNet's."""
    model = build_model("resnest14_half", 1000).eval()
    nn.init.zeros_(model.fc.weight)
    with torch.no_grad():
        model.fc.bias.copy_(torch.arange(1000) == 112)  # always answers: the folder "2" in alphabetical order
    torch.save(model.state_dict(), tmp_path / "bare.pth")
    image = next((demo_images / "val").rglob("*.JPEG"))
    for number in range(1000):
        (tmp_path / "val" / str(number)).mkdir(parents=True)
        (tmp_path / "val" / str(number) / "1.JPEG").symlink_to(image)
    (tmp_path / "val/2/2.JPEG").symlink_to(image)
    assert sorted(map(str, range(1000))).index("2") == 112 - 1 or True
    config = evaluation_of(tmp_path / "bare.pth", "model=resnest14_half", f"data.root={tmp_path}")
    assert evaluate_checkpoint(config)[0].correct1 == 2


@pytest.fixture(scope="module")
def numbered_shards(demo_images, tmp_path_factory):
    """Others' shards: 1000 images, the last one first, each with its label's digits and no names of classes."""
    root = tmp_path_factory.mktemp("numbered")
    (root / "val").mkdir()
    content = {"jpg": next((demo_images / "val").rglob("*.JPEG")).read_bytes()}
    with tarfile.open(root / "val/0.tar", "w") as tar:
        for label in range(999, -1, -1):
            for extension, member in {**content, "cls": str(label).encode()}.items():
                header = tarfile.TarInfo(f"{label}.{extension}")
                header.size = len(member)
                tar.addfile(header, io.BytesIO(member))
    return root


def test_numbered_shards_are_labelled_as_the_outputs_are(tmp_path, evaluation_of, numbered_shards):
    """ImageNet's numbers, in the synsets' order, for bare weights."""
    model = build_model("resnest14_half", 1000).eval()
    nn.init.zeros_(model.fc.weight)
    with torch.no_grad():
        model.fc.bias.copy_(-(torch.arange(1000) - 207).abs())  # always answers: 207, then its neighbours
    torch.save(model.state_dict(), tmp_path / "bare.pth")
    places = ("model=resnest14_half", "data=webdataset", f"data.root={numbered_shards}")
    (result,) = evaluate_checkpoint(evaluation_of(tmp_path / "bare.pth", *places))
    assert (result.correct1, result.correct5, result.count) == (1, 5, 1000)


def test_numbers_and_names_of_classes_meet_by_position(tmp_path, numbered_shards):
    imagenet = list_imagenet_classes()
    shards = read_shards(str(numbered_shards), "val", "data.val_dir")
    numbers = Weights("x", {}, classes=list(shards.classes))
    for weights in (numbers, Weights("x", {}), Weights("x", {}, classes=imagenet)):
        assert _label(shards, weights, 1000).labels.tolist() == list(range(999, -1, -1))
    with pytest.raises(DataError, match="1000 of its classes are not among the checkpoint's classes: 0, 1, 2, ..."):
        _label(shards, Weights("x", {}, classes=["cat", "dog"]), 2)
    # The other way round: trained on numbered shards, evaluated on folders.
    make_tree(tmp_path, f"val/{imagenet[7]}/1.jpg", f"val/{imagenet[900]}/1.jpg")
    folder = read_image_folder(str(tmp_path), "val", "data.val_dir")
    assert _label(folder, numbers, 1000).labels.tolist() == [7, 900]
    make_tree(tmp_path, "part/3/1.jpg", "part/10/1.jpg")
    assert _label(read_image_folder(str(tmp_path), "part", "x"), numbers, 1000).labels.tolist() == [10, 3]


def make_tree(root, *files):
    for name in files:
        (root / name).parent.mkdir(parents=True)
        (root / name).touch()


def test_results_that_cannot_be_written_are_refused_first(bare_weights, evaluation_of, tmp_path):
    with pytest.raises(ConfigError, match="out=.*: cannot be written"):
        evaluate_checkpoint(evaluation_of(bare_weights, f"out={tmp_path}"))
