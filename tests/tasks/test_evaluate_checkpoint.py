import csv
import json
import re
import shutil

import numpy as np
import pytest
import torch
from torch import nn

from conftest import ALONE, compose_config, evaluate_checkpoint, predict_classes
from resnest_imagenet import build_model
from resnest_imagenet.commands.compare import compare_networks
from resnest_imagenet.commands.explain import explain_images
from resnest_imagenet.config_reading import CompareConfig, ExplainConfig, PredictConfig
from resnest_imagenet.data.demo import FIGURES
from resnest_imagenet.data.plan import plan_evaluation
from resnest_imagenet.data.transforms import EvalTransform
from resnest_imagenet.errors import ConfigError, DataError, NonFiniteError
from resnest_imagenet.evaluation.accuracy import measure_accuracy
from resnest_imagenet.evaluation.results import ClassResult, CropResult
from resnest_imagenet.inference.classifier import Classifier
from resnest_imagenet.models.split_attention import SplitAttention
from resnest_imagenet.tasks.evaluate_checkpoint import evaluate, format_class_results, format_results
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
    accuracy = measure_accuracy(nn.Identity(), loader, ALONE)
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
    evaluation = measure_accuracy(nn.Identity(), loader, ALONE)
    assert (evaluation.correct1, evaluation.correct5, evaluation.count) == (0, 1, 1)


def test_a_missing_image_is_an_error():
    loader = Fixed(4, (torch.zeros(2, 5), torch.tensor([0, 1])))
    with pytest.raises(RuntimeError, match="evaluated 2 images of 4"):
        measure_accuracy(nn.Identity(), loader, ALONE)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_logits_that_are_not_finite_end_an_evaluation(value):
    logits = torch.arange(21.0).view(3, 7)
    logits[2, 4] = value
    loader = Fixed(3, (logits[:2], torch.tensor([0, 5])), (logits[2:], torch.tensor([0])))
    line = r"^c\.jpg: its logits are not finite in fp16, like those of 1 of 3 images; bf16 and fp32 hold larger values$"
    with pytest.raises(NonFiniteError, match=line) as error:
        measure_accuracy(nn.Identity(), loader, ALONE, "fp16", name=lambda index: "abc"[index] + ".jpg")
    assert error.value.exit_code == 5


@pytest.fixture
def overflowing_weights(tmp_path):
    """Finite weights whose logits are not."""
    model = build_model("resnest14_half", 10)
    nn.init.constant_(model.fc.weight, 3e38)
    torch.save(model.state_dict(), tmp_path / "overflow.pth")
    return tmp_path / "overflow.pth"


@pytest.mark.process
def test_every_command_names_the_first_image(overflowing_weights, evaluation_of, demo_images, tmp_path):
    first = re.escape(str(next((demo_images / "val").rglob("checker_0_00000.JPEG"))))
    line = f"^{first}: its logits are not finite in fp32, like those of "
    network, fast = ("model=resnest14_half",), ("device=cpu", "loader.workers=1", "crop=32", "batch_size=8")
    ckpt, images = f"ckpt={overflowing_weights}", f"images={demo_images}/val"
    with pytest.raises(NonFiniteError, match=f"{line}40 of 40 images$"):
        evaluate_checkpoint(evaluation_of(overflowing_weights, *network))
    with pytest.raises(NonFiniteError, match=f"{line}8 of 8 images$"):
        predict_classes(compose_config("predict", PredictConfig, *fast, *network, ckpt, images))
    with pytest.raises(NonFiniteError, match=line):
        explain_images(compose_config("explain", ExplainConfig, *fast, *network, ckpt, images, f"out={tmp_path}/out"))
    both = (f"ckpt=[{overflowing_weights},{overflowing_weights}]", "models=[resnest14_half,resnest14_half]")
    with pytest.raises(NonFiniteError, match=line):
        compare_networks(compose_config("compare", CompareConfig, *fast, *both, images))


@pytest.fixture
def bare_weights(tmp_path):
    path = tmp_path / "bare.pth"
    torch.save(build_model("resnest14_half", 10).state_dict(), path)
    return path


@pytest.mark.slow
def test_bare_weights_at_several_crops(bare_weights, evaluation_of, tmp_path):
    out = tmp_path / "new" / "result.json"
    options = ("model=resnest14_half", "crop=[32,64]", f"out={out}", f"predictions={tmp_path}/predictions.csv")
    results = evaluate_checkpoint(evaluation_of(bare_weights, *options))
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
    rows = list(csv.DictReader((tmp_path / "predictions.csv").open()))
    for result in written:
        pairs = [(row["class"], row["predicted"]) for row in rows if row["protocol"] == result["protocol"]]
        assert len(pairs) == 40
        shares = []
        for name, figures in result["classes"].items():
            hits, images, predicted = pairs.count((name, name)), *(sum(p[k] == name for p in pairs) for k in (0, 1))
            assert (figures["images"], figures["predicted"]) == (images, predicted) and images == 4
            precision, recall = hits / max(predicted, 1), hits / images
            shares.append((precision, recall, 2 * precision * recall / (precision + recall) if hits else 0))
            measured_shares = [figures[key] / 100 for key in ("precision", "recall", "f1")]
            assert measured_shares == pytest.approx(shares[-1])
        means = [result[f"macro_{key}"] / 100 for key in ("precision", "recall", "f1")]
        assert means == pytest.approx(np.mean(shares, axis=0))
        assert result["macro_recall"] == pytest.approx(result["top1"])  # the classes have equally many images
    titles = [block.splitlines()[0] for block in format_class_results(results).split("\n\n")]
    assert titles == [result.protocol for result in results]


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.skipif(not shutil.which("c++"), reason="torch.compile needs a C++ compiler on a CPU")
def test_a_compiled_evaluation_counts_the_same(demo_images):
    """By the real compiler, of the smallest network with split attention: it takes a while."""
    from torch._dynamo.utils import counters

    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 7, 4), SplitAttention(8), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    network.append(nn.Linear(8, 10)).eval()
    classes = tuple(sorted(FIGURES))
    classifier = Classifier(Weights("x", {}), "tiny", classes, (EvalTransform(32),), network)
    options = {"batch_size": 7, "workers": 1}  # 40 = 5 x 7 + 5
    (eager,) = evaluate(classifier, demo_images / "val", **options)
    counters.clear()
    (compiled,) = evaluate(classifier, demo_images / "val", **options, compile_network=True)
    assert counters["stats"]["unique_graphs"] == 1
    assert compiled.result == eager.result
    np.testing.assert_allclose(compiled.evaluation.confidence, eager.evaluation.confidence, rtol=1e-4)


@pytest.mark.slow
def test_an_evaluation_is_compiled_once_for_all_crops_and_the_last_batch(
    bare_weights, evaluation_of, few_images, graphs
):
    from torch._dynamo.utils import counters

    options = ("model=resnest14_half", f"data.root={few_images}", "crop=[64,96]", "compile=true")
    options += ("batch_size=3",)  # 10 = 3 x 3 + 1
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


def test_top5_of_five_classes_is_not_shown():
    result = {"crop": 32, "top1": 50.0, "top5": 100.0, "correct1": 1, "correct5": 2, "count": 2, "protocol": "p"}
    figures = ClassResult(precision=50.0, recall=50.0, f1=50.0, images=2, predicted=2)
    five, six = (CropResult(**result, classes={str(k): figures for k in range(count)}) for count in (5, 6))
    assert format_results([five]).splitlines() == [" crop  top-1 %  images  protocol", "   32    50.00       2  p"]
    assert "top-5 %" in format_results([six]) and "top-5 %" in format_results([CropResult(**result)])


@pytest.mark.slow
def test_bare_weights_need_the_networks_name(bare_weights, evaluation_of):
    with pytest.raises(ConfigError, match="holds bare weights, and they fit model=resnest14_half"):
        evaluate_checkpoint(evaluation_of(bare_weights))


def test_another_number_of_classes_than_the_folders(tmp_path, evaluation_of):
    torch.save(build_model("resnest14_half", 7).state_dict(), tmp_path / "bare.pth")
    with pytest.raises(DataError, match="val has 10 classes, fc.weight of .*bare.pth 7: set data.root or ckpt"):
        evaluate_checkpoint(evaluation_of(tmp_path / "bare.pth", "model=resnest14_half"))


def test_results_that_cannot_be_written_are_refused_first(bare_weights, evaluation_of, tmp_path):
    with pytest.raises(ConfigError, match="out=.*: cannot be written"):
        evaluate_checkpoint(evaluation_of(bare_weights, f"out={tmp_path}"))
