"""train.deterministic: what it sets in a run and restores after it, what it refuses, and what a change of it means."""

import os

import pytest
import torch

from faulty_task import Fault
from forked import ask_to_stop
from resnest_imagenet.checkpoint import load_checkpoint
from resnest_imagenet.errors import ConfigError, Stopped
from resnest_imagenet.tasks.segmentation import masked_cross_entropy
from resnest_imagenet.training.determinism import WORKSPACE, fix_workspace, fixing_kernels
from resnest_imagenet.training.dry_run import describe_run
from resnest_imagenet.training.train import train
from run_files import assert_same_run, read_status

WANTED = ("train.deterministic=true", "train.epochs=1", "train.warmup_epochs=0", "log.trackers=[]")


def read_settings():
    from torch._inductor import config

    cudnn, filling = torch.backends.cudnn, torch.utils.deterministic.fill_uninitialized_memory
    is_strict = torch.are_deterministic_algorithms_enabled(), config.deterministic
    return *is_strict, cudnn.deterministic, cudnn.benchmark, filling


@pytest.fixture(autouse=True)
def workspace(monkeypatch):
    """An environment without the variable; what is set is gone after the test."""
    monkeypatch.setenv(WORKSPACE, "")
    monkeypatch.delenv(WORKSPACE)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)  # what a run must turn off, and on again


def test_a_run_sets_it_and_restores_what_was_set(tiny_run, inject):
    before, seen = read_settings(), []
    assert before == (False, False, False, True, True)
    inject(Fault(0, 1, lambda: seen.append((read_settings(), os.environ.get(WORKSPACE)))))
    train(tiny_run(*WANTED[1:], run="without"))
    train(tiny_run(*WANTED, run="with"))
    assert seen == [(before, None), ((True, True, True, False, False), ":4096:8")]
    assert read_settings() == before
    # After an error too; what the process had is restored, and not torch's defaults.
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with pytest.raises(KeyError), fixing_kernels(True):
            assert not torch.is_deterministic_algorithms_warn_only_enabled()
            raise KeyError
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def test_another_workspace_is_refused_in_a_line(tiny_run, monkeypatch):
    for value in (":16:8", ":4096:8"):
        monkeypatch.setenv(WORKSPACE, value)
        fix_workspace()
        assert os.environ[WORKSPACE] == value
    monkeypatch.setenv(WORKSPACE, ":1024:2")
    line = "^train.deterministic=true: CUBLAS_WORKSPACE_CONFIG=:1024:2 is set: unset it, or set it to :4096:8$"
    for start in (train, describe_run):
        with pytest.raises(ConfigError, match=line):
            start(tiny_run(*WANTED))
    train(tiny_run(*WANTED[1:]))  # nobody asks for it


def test_an_operator_without_a_deterministic_kernel_is_named_in_a_line(tiny_run, inject, tmp_path):
    inject(Fault(0, 1, lambda: torch.zeros(3).put_(torch.tensor([1]), torch.ones(1))))
    train(tiny_run(*WANTED[1:], run="without"))
    line = "^train.deterministic=true: torch has no such kernel of put_: set it to false$"
    with pytest.raises(ConfigError, match=line):
        train(tiny_run(*WANTED))
    assert read_status(tmp_path / "run")["exit_code"] == 2


def test_a_change_of_it_is_no_longer_bit_for_bit(tiny_run, inject, tmp_path, capsys, signals):
    train(tiny_run(*WANTED, run="whole"))
    inject(Fault(0, 3, ask_to_stop))
    for run in ("run", "other"):
        with pytest.raises(Stopped):
            train(tiny_run(*WANTED, run=run))
    inject()
    capsys.readouterr()
    train(tiny_run(*WANTED))
    assert "no longer" not in capsys.readouterr().out
    assert_same_run(tmp_path / "whole", tmp_path / "run")
    train(tiny_run(*WANTED[1:], run="other"))
    line = (
        "no longer bit for bit, but each remaining image of the epoch is still seen once: train.deterministic True -> "
    )
    assert line + "False\n" in capsys.readouterr().out


def test_a_checkpoint_of_an_earlier_version_has_other_circumstances(tiny_run, inject, tmp_path, capsys, signals):
    from conftest import newest_checkpoint
    from resnest_imagenet.checkpoint import save_checkpoint

    inject(Fault(0, 3, ask_to_stop))
    with pytest.raises(Stopped):
        train(tiny_run(*WANTED[1:]))
    inject()
    path = newest_checkpoint(tmp_path / "run")
    saved = load_checkpoint(path)
    del saved["circumstances"]["train.deterministic"]  # it was not
    saved["circumstances"]["loader"] = "dali"  # of every task, whether it had a choice or not
    save_checkpoint(saved, path)
    capsys.readouterr()
    train(tiny_run(*WANTED[1:]))
    assert "no longer" not in capsys.readouterr().out


def test_the_loss_of_scenes_is_the_same_where_pixels_are_added_apart():
    torch.manual_seed(0)
    logits, masks = torch.randn(2, 3, 5, 7), torch.randint(3, (2, 5, 7))
    masks[0, :2] = 255
    loss = masked_cross_entropy(logits, masks)
    with fixing_kernels(True):
        assert torch.allclose(masked_cross_entropy(logits, masks), loss, rtol=1e-6)
