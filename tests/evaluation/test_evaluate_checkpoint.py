import json

import pytest
import torch
from torch import nn

from conftest import ALONE
from resnest_imagenet import build_model
from resnest_imagenet.data.plan import plan_evaluation
from resnest_imagenet.errors import CheckpointError, ConfigError, DataError
from resnest_imagenet.evaluation.counting import Accuracy, evaluate
from resnest_imagenet.evaluation.evaluate_checkpoint import evaluate_checkpoint, format_results, restore_model
from resnest_imagenet.models.zoo import list_imagenet_classes


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
    assert accuracy == Accuracy(correct1=1, correct5=2, count=3)
    assert accuracy.top1 == pytest.approx(100 / 3)


def test_fewer_than_five_classes():
    loader = Fixed(1, (torch.tensor([[1.0, 2, 3]]), torch.tensor([0])))
    assert evaluate(nn.Identity(), loader, ALONE) == Accuracy(0, 1, 1)


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
    written = json.loads(out.read_text())["results"]
    assert [{k: r[k] for k in ("crop", "count", "protocol")} for r in written] == [
        {"crop": 32, "count": 40, "protocol": "short side 37 bilinear, centre crop 32"},
        {"crop": 64, "count": 40, "protocol": "short side 73 bilinear, centre crop 64"},
    ]
    assert [r["top1"] for r in written] == [r.top1 for r in results]
    table = format_results(results).splitlines()
    assert len(table) == 3 and table[2].split()[0] == "64"


def test_bare_weights_need_the_networks_name(bare_weights, evaluation_of):
    with pytest.raises(ConfigError, match="holds bare weights: name their network with model=NAME"):
        evaluate_checkpoint(evaluation_of(bare_weights))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("resnest14", "conv1.0.weight has shape .* another model or class count"),
        ("resnet50", "lacks conv1.weight: not a checkpoint of this network"),
    ],
)
def test_weights_of_another_network(model, message, bare_weights, evaluation_of):
    with pytest.raises(CheckpointError, match=message):
        evaluate_checkpoint(evaluation_of(bare_weights, f"model={model}"))


def test_a_checkpoint_without_a_classifier(tmp_path, evaluation_of):
    torch.save({"conv1.0.weight": torch.zeros(1)}, tmp_path / "bare.pth")
    with pytest.raises(CheckpointError, match="lacks fc.weight: not a checkpoint of resnest14"):
        evaluate_checkpoint(evaluation_of(tmp_path / "bare.pth", "model=resnest14"))


def test_a_superfluous_key_is_named(tmp_path, evaluation_of):
    weights = build_model("resnest14_half", 10).state_dict()
    torch.save({**weights, "extra.bias": torch.zeros(1)}, tmp_path / "bare.pth")
    with pytest.raises(CheckpointError, match="extra.bias is not part of the network"):
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


def test_results_that_cannot_be_written_are_refused_first(bare_weights, evaluation_of, tmp_path):
    with pytest.raises(ConfigError, match="out=.*: cannot be written"):
        evaluate_checkpoint(evaluation_of(bare_weights, f"out={tmp_path}"))


def test_weights_options_that_the_file_cannot_meet(bare_weights, evaluation_of):
    with pytest.raises(ConfigError, match="weights=ema, but .* holds bare weights"):
        restore_model(evaluation_of(bare_weights, "model=resnest14_half", "weights=ema"))
