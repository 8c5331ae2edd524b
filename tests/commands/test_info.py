"""resnest-info: what it prints, and how it measures."""

import json
import sys
import time

import pytest
import torch
from torch import nn

from conftest import CPU
from resnest_imagenet import build_model
from resnest_imagenet.commands import info
from resnest_imagenet.evaluation.latency import WARM_UP, measure_latency
from resnest_imagenet.models.cost import count_cost

SMALL = ("crop=32", "batch_size=2", "rounds=1", "device=cpu")


def call(monkeypatch, capsys, *arguments):
    """Run the command in this process; return its exit code and what it printed."""
    monkeypatch.setattr(sys, "argv", ["/bin/resnest-info", *arguments])
    try:
        info.main()
        code = 0
    except SystemExit as error:
        code = error.code
    printed = capsys.readouterr()
    return code, printed.out, printed.err.strip().splitlines()


@pytest.mark.slow
def test_json(monkeypatch, capsys):
    code, out, _ = call(monkeypatch, capsys, "models=[resnest14_half,resnet50]", "format=json", *SMALL)
    assert code == 0
    report = json.loads(out)
    assert (report["crop"], report["batch_size"], report["precision"]) == (32, 2, "fp32")
    assert report["device"].endswith("threads")
    assert [each["model"] for each in report["networks"]] == ["resnest14_half", "resnet50"]
    for each in report["networks"]:
        parameters, multiply_adds = count_cost(each["model"], 32)
        assert sum(stage["parameters"] for stage in each["stages"]) == parameters
        assert sum(stage["multiply_adds"] for stage in each["stages"]) == multiply_adds
        uses = each["training_bytes"]
        assert uses["parameters"] == uses["gradients"] == uses["momentum"] == 4 * parameters
        assert uses["kept"] > 2 * 4 * 3 * 32 * 32  # the images are but a part
        assert each["seconds"].keys() == {"1", "2"} and min(each["seconds"].values()) > 0


@pytest.mark.slow
def test_text(monkeypatch, capsys):
    code, out, _ = call(monkeypatch, capsys, "model=resnest50", "latency=false", "batch_size=2")
    lines = out.splitlines()
    assert code == 0 and lines[0] == "resnest50 at 224 pixels, 1000 classes"
    assert lines[2].split() == ["stem", "64x112x112", "28,768", "359,260,160", "1,605,632"]
    assert lines[8].split() == ["total", "27,483,240", "5,385,512,800", "14,359,776"]
    assert lines[9].startswith("training, batch 2, fp32: ") and " MiB = parameters 105 + gradients 105 " in lines[9]
    assert "latency" not in out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give either model=NAME or models=[A,B]"),
        (("model=resnest50", "models=[resnet50]"), "give either model=NAME or models=[A,B]"),
        (("models=[resnet50,resnest_50]",), "unknown model 'resnest_50'; did you mean 'resnest50'?"),
        (("model=resnest_50",), "unknown model 'resnest_50'; did you mean 'resnest50'? "),
        (
            ("model=resnest50", "batch_size=1"),
            "batch_size=1: resnest50 has batch norms of one value per image and channel at 224 pixels: set ",
        ),
    ],
)
def test_refusals(arguments, message, monkeypatch, capsys):
    code, _, lines = call(monkeypatch, capsys, *arguments)
    assert code == 2 and len(lines) == 1 and lines[0].startswith(f"resnest-info: {message}")


class Slow(nn.Module):
    """Takes a while, and more in some calls; tells when it is called."""

    calls: list = []  # noqa: RUF012 - shared by the copies

    def __init__(self, name, seconds):
        super().__init__()
        self.name, self.seconds, self.count = name, seconds, 0

    def forward(self, images):
        self.calls.append((self.name, tuple(images.shape), self.training, torch.is_inference_mode_enabled()))
        time.sleep(0.3 if self.count in (0, WARM_UP) else self.seconds)
        self.count += 1


@pytest.mark.slow
def test_latency_is_the_median_of_interleaved_rounds():
    networks = {"a": Slow("a", 0.01), "b": Slow("b", 0.03)}
    seconds = measure_latency(networks, 32, 4, CPU, rounds=3)
    assert Slow.calls == [(name, (4, 3, 32, 32), False, True) for name in "ab"] * (WARM_UP + 3)
    # Neither the first call nor an outlier counts.
    assert 0.01 <= seconds["a"] < 0.2 and 0.03 <= seconds["b"] < 0.2


def test_measured_networks_stay_as_they_are():
    model = build_model("resnest14_half", 10)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert measure_latency({"it": model}, 32, 1, CPU, 1)["it"] > 0
    assert model.training and all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
