"""Operators that must prove themselves, in whole runs: what is refused is replaced, reported and kept."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from conftest import ALONE, newest_checkpoint
from faulty_task import Fault
from forked import ask_to_stop, compute_on_ranks
from resnest_imagenet import build_model
from resnest_imagenet.checkpoint import load_checkpoint
from resnest_imagenet.data import decoders
from resnest_imagenet.data.decoders import choose_decoder
from resnest_imagenet.distributed import Ranks
from resnest_imagenet.errors import Stopped
from resnest_imagenet.evaluation import operators
from resnest_imagenet.evaluation.operators import choose_attention, choose_gpu_decoder
from resnest_imagenet.models import fused_attention, proving
from resnest_imagenet.models.split_attention import SplitAttention
from resnest_imagenet.models.splits import Splits
from resnest_imagenet.tasks.choice import open_task
from resnest_imagenet.training import wrapping
from resnest_imagenet.training.train import train
from run_files import assert_same_run

SHORT = ("train.epochs=null", "train.steps=3", "train.warmup_epochs=0", "log.trackers=[]", "train.ema_decay=0.9")


class WrongSplits(Splits):
    """Splits whose gradient is wrong in one place."""

    def input_gradient(self, gradient, weights, pooled):
        of_y, *others = super().input_gradient(gradient, weights, pooled)
        of_y[-1, -1, -1, -1] += of_y.abs().max()
        return of_y, *others


class OtherSplits(Splits):
    """Splits that are right, and not torch's."""


@pytest.fixture(autouse=True)
def no_findings(monkeypatch):
    """Forget what other tests have found."""
    monkeypatch.setattr(operators, "_findings", {})
    monkeypatch.setattr(operators, "_decoders", {})
    monkeypatch.setattr(decoders, "_refused", set())


@pytest.fixture
def use_splits(monkeypatch):
    return lambda splits: monkeypatch.setattr(fused_attention, "choose_splits", lambda device, dtype: splits)


@pytest.fixture
def trials(monkeypatch):
    """Count the trials, and remember whether each was timed."""
    seen, real = [], proving.try_fused

    def counted(*arguments):
        seen.append(arguments[-1])
        return real(*arguments)

    monkeypatch.setattr(operators, "try_fused", counted)
    return seen


def read_environment(run):
    return json.loads((run / "environment.json").read_text())


def list_implementations(network):
    return {module.implementation for module in network.modules() if isinstance(module, SplitAttention)}


@pytest.mark.slow
def test_a_wrong_operator_is_refused_and_the_choice_kept(
    small_run, use_splits, trials, inject, tmp_path, capsys, signals
):
    """The run is then the formula's, bit for bit, also where it is resumed in a process whose operator is right."""
    formula = train(small_run(*SHORT, "model.split_attention=reference", run="formula"))
    assert not trials
    use_splits(WrongSplits)
    state = train(small_run(*SHORT, run="refused"))
    assert list_implementations(state.model) == list_implementations(state.ema.module) == {"reference"}
    printed = capsys.readouterr().err
    line = "split attention: the fused operator differs from the formula: the gradient of the input by "
    assert (
        printed.count(line) == 1
        and printed.count(": the formula is used; model.split_attention=fused overrides this\n") == 1
    )
    assert all(map(torch.equal, state.model.state_dict().values(), formula.model.state_dict().values()))
    tried = read_environment(tmp_path / "refused")["split_attention"]
    assert tried["used"] == "reference" and tried["reason"] in printed and tried["seconds"] > 0
    assert "split_attention" not in read_environment(tmp_path / "formula")
    saved = load_checkpoint(newest_checkpoint(tmp_path / "refused"))
    assert saved["circumstances"]["model.split_attention"] == "reference"
    assert saved["config"]["model"]["split_attention"] == "auto"

    inject(Fault(0, 1, ask_to_stop))
    with pytest.raises(Stopped):
        train(small_run(*SHORT, run="stopped"))
    inject()
    use_splits(OtherSplits)
    trials.clear()
    train(small_run(*SHORT, run="stopped"))
    printed = capsys.readouterr().out
    assert not trials and "resuming after step" in printed and "no longer bit for bit" not in printed
    assert_same_run(tmp_path / "refused", tmp_path / "stopped")
    reason = "the run has used the formula so far"
    assert read_environment(tmp_path / "stopped")["split_attention"] == {"used": "reference", "reason": reason}


@pytest.mark.slow
def test_a_resumed_run_whose_operator_fails_now_reports_the_change(
    small_run, use_splits, trials, inject, capsys, signals
):
    options = (*SHORT, "train.deterministic=true")
    use_splits(OtherSplits)
    inject(Fault(0, 1, ask_to_stop))
    with pytest.raises(Stopped):
        train(small_run(*options))
    inject()
    use_splits(WrongSplits)
    operators._findings.clear()  # as in another process
    train(small_run(*options))
    assert trials == [False, False]  # neither was timed: times differ between runs
    captured = capsys.readouterr()
    assert "no longer bit for bit" in captured.out and "model.split_attention auto -> reference" in captured.out
    assert "the fused operator differs from the formula" in captured.err


@pytest.mark.slow
def test_a_right_operator_is_used_and_timed(small_run, use_splits, trials, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(proving, "time_both", lambda *arguments: [1.5, 2.0, 2.5])
    use_splits(OtherSplits)
    state = train(small_run(*SHORT))
    assert list_implementations(state.model) == {"auto"} and trials == [True]
    tried = read_environment(tmp_path / "run")["split_attention"]
    assert (tried["used"], tried["ratio"]) == ("fused", 2.0)
    assert "split attention" not in capsys.readouterr().err


@pytest.mark.slow
def test_detection_chooses_too(object_run, use_splits, trials, tmp_path, monkeypatch):
    monkeypatch.setattr(proving, "time_both", lambda *arguments: [0.5, 0.6, 0.7])
    use_splits(OtherSplits)
    state = train(object_run("train.epochs=1"))
    assert trials == [True] and list_implementations(state.model) == {"reference"}
    tried = read_environment(tmp_path / "run")["split_attention"]
    assert tried["reason"].startswith("is slower than the formula in 3 rounds: 1.67 times its time")
    choose_attention(state.model, (2, 64, 64), "fp32", ALONE, option="fused")
    assert list_implementations(state.model) == {"fused"} and trials == [True]


def test_a_process_tries_a_case_once(use_splits, trials):
    use_splits(OtherSplits)
    network = build_model("resnest14_half", 10)
    for size in ((2, 16, 16), (2, 16, 16), (2, 16, 32)):
        choose_attention(network, size, "fp32", ALONE, is_timed=False)
    assert len(trials) == 2


def refuse_on_rank_1(ranks):
    """Choose with an operator that is wrong on rank 1."""
    wrong = WrongSplits if ranks.rank == 1 else OtherSplits
    fused_attention.choose_splits = lambda device, dtype: wrong
    network = build_model("resnest14_half", 10)
    choice = choose_attention(network, (2, 16, 16), "fp32", ranks, trains=True, is_timed=False)
    return choice.used, choice.details["reason"], list_implementations(network)


@pytest.mark.process
def test_all_ranks_choose_the_same():
    (used, reason, implementations), other = compute_on_ranks(refuse_on_rank_1, 2)
    assert (used, reason, implementations) == other
    assert used == "reference" and implementations == {"reference"} and reason.startswith("differs from the formula")


@pytest.mark.slow
def test_the_gpus_decoder_is_compared_with_the_cpus(demo_images, monkeypatch, capsys):
    """Its pixels are made by another function here; that the graph itself decodes on a GPU only a GPU can show."""
    dali = pytest.importorskip("resnest_imagenet.data.dali_decoding", reason="DALI is not installed")
    from resnest_imagenet.data.folder import read_image_folder

    images = read_image_folder(str(demo_images), "val", "x")
    jpegs = dali.find_jpegs(images)
    assert len(jpegs) == 4 and len(set(jpegs)) == 4
    gpu, real = torch.device("cuda", 0), dali.decode_by_dali
    ranks = Ranks(0, 1, 0, gpu)
    monkeypatch.setattr(operators, "name_device", lambda device: "a card")

    def fail(pixels):
        raise RuntimeError("nvJPEG error\nmore")

    def shift(pixels):
        return np.clip(pixels.astype(int) + 1, 0, 255).astype(np.uint8)

    def spoil(pixels):  # a corner: a mean of less than 1 of 255, but not one value in a hundred
        return np.where(np.arange(pixels.size).reshape(pixels.shape) < 0.02 * pixels.size, 9 + pixels // 2, pixels)

    cases = [(lambda pixels: pixels, None), (lambda pixels: pixels[1:], "returns images of other sizes on a card")]
    cases += [(fail, "fails: nvJPEG error on a card"), (shift, "differs from the CPU's: mean 1.00, 99th percentile 1 ")]
    cases += [(spoil, "differs from the CPU's: mean ")]
    for change, fault in cases:

        def decode(encoded, decoder, device, change=change):
            pixels = real(encoded, "cpu", torch.device("cpu"))
            return pixels if decoder == "cpu" else [change(image) for image in pixels]

        monkeypatch.setattr(dali, "decode_by_dali", decode)
        operators._decoders.clear()
        choice = choose_gpu_decoder(images, "dali", ranks)
        printed = capsys.readouterr().err
        if fault is None:
            assert (choice.describe(), choose_decoder(gpu), printed) == ({"used": "gpu"}, "mixed", "")
        else:
            assert (choice.used, choose_decoder(gpu)) == ("cpu", "copied")
            assert choice.details["reason"].startswith(fault)
            assert printed == f"DALI: the GPU's decoder {choice.details['reason']}: images are decoded on the CPU\n"
    # A resumed run decodes as before; a CPU and torchvision have nothing to choose.
    monkeypatch.setattr(decoders, "_refused", set())
    assert (
        choose_gpu_decoder(images, "dali", ranks, decoded_on_cpu=True).used == "cpu" and choose_decoder(gpu) == "copied"
    )
    assert choose_gpu_decoder(images, "dali", ALONE) is None and choose_decoder(ALONE.device) == "cpu"
    assert choose_gpu_decoder(images, "torchvision", ranks) is None


@pytest.mark.slow
def test_a_refused_decoder_is_a_circumstance_of_the_run(small_run, monkeypatch, capsys):
    """A GPU's name is made up here: nothing else of the choice needs one."""
    dali = pytest.importorskip("resnest_imagenet.data.dali_decoding", reason="DALI is not installed")
    for module in (operators, wrapping):
        monkeypatch.setattr(module, "name_device", lambda device: "a card")
    compared = []
    monkeypatch.setattr(dali, "compare_decoders", lambda *arguments: compared.append(1) or "differs")
    task, ranks = open_task(small_run()), Ranks(0, 1, 0, torch.device("cuda", 0))
    circumstances = {"device": "a card", "loader": "dali"}
    saver = SimpleNamespace(circumstances=circumstances)
    (choice,) = wrapping.choose_operators(torch.nn.Linear(2, 2), task, ranks, saver, None).values()
    assert choice.describe() == {"used": "cpu", "reason": "differs on a card"} and len(compared) == 1
    assert circumstances["loader"] == "dali, decoding on the CPU"
    # The resumed run keeps it on such a card, and tries again on another.
    operators._decoders.clear()
    saved = {"circumstances": dict(circumstances)}
    for device, count in (("a card", 1), ("another card", 2)):
        saved["circumstances"]["device"] = device
        wrapping.choose_operators(torch.nn.Linear(2, 2), task, ranks, saver, saved)
        assert len(compared) == count
    assert capsys.readouterr().err.count("images are decoded on the CPU") == 2
