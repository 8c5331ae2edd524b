"""Losses and gradients that are not finite: which steps are skipped, when the host reads it, and what ends the run."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import tiny_task
from conftest import ALONE, newest_checkpoint
from faulty_task import Fault
from resnest_imagenet.checkpoint import load_checkpoint
from resnest_imagenet.errors import NonFiniteError
from resnest_imagenet.evaluation.accuracy import Evaluation
from resnest_imagenet.supervision import AGREEING, BACKWARD, FORWARD, Watch
from resnest_imagenet.tasks import classification
from resnest_imagenet.training import health as health_module
from resnest_imagenet.training import train as train_module
from resnest_imagenet.training.health import Health
from resnest_imagenet.training.schedule import plan_steps
from resnest_imagenet.training.state import TrainingState
from resnest_imagenet.training.train import train
from run_files import assert_equal, assert_same_run, list_places, read_events, read_status, without_clock


def bad(epoch, number):
    return Fault(epoch, number, loss_factor=torch.nan)


def bad_gradient(epoch, number):
    return Fault(epoch, number, gradient_factor=torch.inf)


def test_a_loss_that_is_not_finite_stops_the_run(tiny_run, tmp_path):
    with pytest.raises(NonFiniteError, match=r"rank 0: loss or gradient not finite at step \d, learning rate 6\..*e.2"):
        train(tiny_run("train.lr=1e30", "train.warmup_epochs=0"))
    status = read_status(tmp_path / "run")
    assert status["state"] == "failed" and "not finite at step" in status["error"]
    assert status["exit_code"] == 5


@pytest.mark.parametrize("make_fault", [bad, bad_gradient])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "lamb"])
def test_what_is_skipped_does_not_depend_on_when_it_is_read(make_fault, optimizer, tiny_run, inject, tmp_path):
    """At the end of the next step, before a report, or at once; the first step of the run among them."""
    inject(make_fault(0, 0), make_fault(0, 3), make_fault(1, 1))
    options = ("train.max_skipped_steps=3", "train.ema_decay=0.9", "log.every_steps=4", "checkpoint.keep=20")
    options += ("train.dropout=0.2", "train.lr=0.8", f"train.optimizer={optimizer}")
    for name, steps in (("late", 1000), ("at_once", 1)):
        train(tiny_run(*options, f"checkpoint.every_steps={steps}", run=name))
    late, at_once = (load_checkpoint(newest_checkpoint(tmp_path / run)) for run in ("late", "at_once"))
    assert late.pop("config")["run_dir"] != at_once.pop("config")["run_dir"]
    assert (late["skipped"], late["ema_updates"]) == (3, 9)
    assert_equal(late, at_once)
    events = read_events(tmp_path / "late")
    assert without_clock(events) == without_clock(read_events(tmp_path / "at_once"))
    assert list_places(events) == [
        ("skipped", 1, 1), ("skipped", 1, 4), ("train", 1, 4), ("train", 1, 6), ("eval", 1, 6),
        ("skipped", 2, 8), ("train", 2, 8), ("train", 2, 12), ("eval", 2, 12),
    ]  # fmt: skip
    assert [event["ranks"] for event in events if event["event"] == "skipped"] == [[0]] * 3
    first = load_checkpoint(tmp_path / "at_once/checkpoints/step-000000001.pt")
    assert (first["ema_updates"], first["steps_summed"], first["loss_sums"]) == (0, 0, [{"loss": 0.0}])
    entries = [entry for state in first["optimizer"]["state"].values() for entry in state.values()]
    assert not any(torch.as_tensor(entry).any() for entry in entries)
    torch.manual_seed(0)
    begun = tiny_task.TinyNetwork(0.2).state_dict()
    begun["norm.num_batches_tracked"] = first["model"]["norm.num_batches_tracked"]
    assert_equal(dict(first["model"]), dict(begun))
    assert not torch.equal(first["model"]["head.weight"], late["model"]["head.weight"])


def test_a_run_that_skips_a_step_resumes_bit_for_bit(tiny_run, inject, tmp_path):
    options = ("train.max_skipped_steps=9", "train.ema_decay=0.9", "log.every_steps=5", "checkpoint.every_steps=4")
    options += ("train.batch_size=8", "train.global_batch=16", "checkpoint.keep=9")
    inject(bad(0, 3), bad(0, 7), bad_gradient(0, 8), bad(1, 1))  # step 4 is the last before a checkpoint
    for run in ("whole", "run"):
        train(tiny_run(*options, run=run))
    assert load_checkpoint(newest_checkpoint(tmp_path / "run"))["skipped"] == 4
    for path in (tmp_path / "run/checkpoints").glob("step-*.pt"):
        if path.stem != "step-000000004":
            path.unlink()
    train(tiny_run(*options))
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_a_run_that_ends_with_a_step_names_it_and_saves_nothing_after_it(tiny_run, inject, tmp_path):
    inject(bad(0, 1), bad(0, 3))
    options = ("train.max_skipped_steps=1", "train.warmup_epochs=0", "checkpoint.every_steps=5", "log.every_steps=100")
    with pytest.raises(NonFiniteError, match=r"rank 0: .* at step 4, learning rate 0.02134;.*\(number 2, .*steps=1\)"):
        train(tiny_run(*options))
    assert list_places(read_events(tmp_path / "run")) == [("skipped", 1, 2)]
    assert not list((tmp_path / "run/checkpoints").glob("*.pt"))


class FrozenStem(tiny_task.TinyTask):
    """Its first layers are not trained."""

    def build_model(self, is_new, device):
        model = super().build_model(is_new, device)
        model.stem.requires_grad_(False)
        model.norm.requires_grad_(False)
        return model


def test_with_a_frozen_stem_a_bad_gradient_is_found(tiny_run, inject, tmp_path):
    """The gradient of the first layer that is trained is looked at."""
    tiny_task.register(FrozenStem)
    start = FrozenStem(tiny_run()).build_model(True, torch.device("cpu")).state_dict()
    inject(bad_gradient(0, 2), bad(1, 0))
    state = train(tiny_run("train.max_skipped_steps=2"))
    assert [event["step"] for event in read_events(tmp_path / "run") if event["event"] == "skipped"] == [3, 7]
    assert state.skipped == 2
    end = state.model.state_dict()
    assert torch.equal(end["stem.weight"], start["stem.weight"])
    assert not torch.equal(end["head.weight"], start["head.weight"]) and end["head.weight"].isfinite().all()


def test_the_hook_is_on_the_first_parameter_that_is_trained(tiny_run):
    """A bad gradient that clipping, or a later layer's zero, would hide from the sum."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    config = tiny_run("train.max_skipped_steps=1")
    state = TrainingState(model, config.train)
    with Health(state, config.train) as health:
        health.start_step()
        loss = model(torch.ones(1, 2)).sum()
        state.losses.add({"loss": loss})
        (loss * torch.nan).backward()
        for parameter in model.parameters():
            parameter.grad = None if parameter.grad is None else torch.zeros_like(parameter)
        assert health.judge(0.1, False, ALONE) == 1
        (verdict,) = health.read_verdicts()
    assert (verdict.is_skipped, verdict.unsound) == (True, [0])
    assert not model[1].weight._backward_hooks


def test_in_fp16_a_scale_below_1_is_no_excuse(tiny_run):
    config = tiny_run("train.precision=fp16")
    state = TrainingState(nn.Sequential(nn.Linear(2, 2)), config.train)
    for scale, is_sound in ((2.0, True), (0.5, False)):
        state.scaler.load_state_dict({**state.scaler.state_dict(), "scale": scale})
        with Health(state, config.train) as health:
            state.scaler.scale(state.model(torch.full((1, 2), torch.inf)).sum()).backward()
            assert health.judge(0.1, False, ALONE) == 1
            if is_sound:
                verdicts = [(verdict.is_skipped, verdict.unsound) for verdict in health.read_verdicts()]
                assert verdicts == [(False, [])]
            else:
                with pytest.raises(NonFiniteError, match="the sum over the ranks: .* at step 1, learning rate 0.1;"):
                    list(health.read_verdicts())
            state.scaler.update()
            state.optimizer.zero_grad()


HOST_READS = {"tolist", "numpy", "item", "cpu", "nonzero", "unique", "masked_select", "is_nonzero", "equal"}
HOST_READS |= {"__array__", "__bool__", "__contains__", "__float__", "__index__", "__int__", "__repr__"}


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("device", ["cpu", *["cuda"] * torch.cuda.is_available()])
def test_between_reports_the_host_reads_only_what_came_of_the_step_before(device, precision, small_run, monkeypatch):
    """Whatever it reads of this step it has to wait for. On a GPU torch itself refuses to, besides."""
    reads, verdicts, now = [], [], SimpleNamespace(step=0, counts=False)

    def note(name):
        if now.counts:
            reads.append((now.step, name))

    class Functions(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            name = getattr(function, "__name__", "")
            if name in HOST_READS:
                note(name)
            return function(*args, **(kwargs or {}))

    class Operators(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            name = operator.overloadpacket.__name__
            masks = name == "index" and any(index is not None and index.dtype == torch.bool for index in args[1])
            if masks or name in HOST_READS | {"_local_scalar_dense", "_unique2", "unique_dim"}:
                note(name)
            return operator(*args, **(kwargs or {}))

    def at(watch, epoch, batch, doing):
        real_at(watch, epoch, batch, doing)
        now.step = batch // 2 + 1
        now.counts = doing in (FORWARD, BACKWARD, AGREEING)
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("error" if now.counts and now.step not in (4, 6) else "default")

    def read(unread):
        counted, now.counts = now.counts, False
        verdicts.append((unread.step, now.step))
        verdict = real_read(unread)
        now.counts = counted
        return verdict

    def watched_epoch(*args):
        with Functions(), Operators():
            real_epoch(*args)

    real_at, real_read, real_epoch = Watch.at, health_module._Unread.read, train_module.train_epoch
    monkeypatch.setattr(Watch, "at", at)
    monkeypatch.setattr(health_module._Unread, "read", read)
    monkeypatch.setattr(train_module, "train_epoch", watched_epoch)
    # fp16 is slow on a CPU: six steps of four images, and no evaluation.

    def shorten(*args):
        return replace(plan_steps(*args), steps_per_epoch=6, total_steps=6)

    monkeypatch.setattr(train_module, "plan_steps", shorten)

    def judge_nothing(model, loader, *args):
        return Evaluation(*np.zeros((5, loader.plan.num_samples), dtype=int))

    monkeypatch.setattr(classification, "measure_accuracy", judge_nothing)
    options = ("train.epochs=1", "train.warmup_epochs=0", "train.batch_size=2", "train.global_batch=4")
    options += ("train.mixup_alpha=0.2", "train.mixup_per_sample=true", "train.mixup_partner=permuted")
    options += ("train.cutmix_alpha=1.0", "train.erasing=0.5", "train.dropout=0.2", "train.dropblock=0.2")
    options += ("train.crop=48", "train.ema_decay=0.9", "train.max_skipped_steps=2", "log.every_steps=4")
    options += ("train.clip_norm=1.0", "log.trackers=[]")
    state = train(small_run(*options, f"device={device}", f"train.precision={precision}"))
    assert {step for step, _ in reads} == {4, 6}, reads  # the reports
    assert verdicts == [(1, 2), (2, 3), (3, 4), (4, 4), (5, 6), (6, 6)]
    # In every precision the weights are float32, and the loss is that of ten classes.
    assert {parameter.dtype for parameter in state.model.parameters()} == {torch.float32}
    assert state.scaler.is_enabled() == (precision == "fp16")


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_reduced_precision_keeps_float32_weights(precision, tiny_run, tmp_path):
    state = train(tiny_run(f"train.precision={precision}", "train.epochs=1", "train.warmup_epochs=0"))
    assert {parameter.dtype for parameter in state.model.parameters()} == {torch.float32}
    assert state.scaler.is_enabled() == (precision == "fp16")
    assert 0.3 < read_events(tmp_path / "run")[0]["loss"] < 2
