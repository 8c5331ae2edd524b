"""What a source of weights stands for, before anything is read."""

import os

import pytest
import torch

from resnest_imagenet.checkpoint import save_checkpoint
from resnest_imagenet.errors import CheckpointError
from resnest_imagenet.weights.load import read_weights
from resnest_imagenet.weights.sources import find_weights, is_published


def test_a_run_folder_stands_for_its_best_checkpoint(tmp_path):
    checkpoints = tmp_path / "run/checkpoints"
    checkpoints.mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"/run: no checkpoint in it: give a file of weights, or a run folder"):
        find_weights(tmp_path / "run")
    (checkpoints / "step-00000009.pt").touch()
    (checkpoints / "step-00000012.pt").touch()
    with pytest.raises(
        CheckpointError, match=r"/run: a run without checkpoints/best\.pt, .*: give .*/step-00000012\.pt$"
    ):
        find_weights(tmp_path / "run")
    (checkpoints / "best.pt").touch()
    for source in (tmp_path / "run", f"{tmp_path}/run/", checkpoints, checkpoints / "best.pt"):
        assert find_weights(source) == checkpoints / "best.pt"
    assert find_weights(checkpoints / "step-00000009.pt") == checkpoints / "step-00000009.pt"


def test_the_weights_of_a_run_folder_are_those_of_its_best_checkpoint(tmp_path):
    best = tmp_path / "run/checkpoints/best.pt"
    best.parent.mkdir(parents=True)
    save_checkpoint({"fc.weight": torch.ones(2, 3)}, best)
    weights = read_weights(tmp_path / "run")
    assert weights.source == str(best) and weights.tensors["fc.weight"].equal(torch.ones(2, 3))


def test_a_folder_that_describes_its_weights_is_one(tmp_path):
    (tmp_path / "config.json").touch()
    assert find_weights(tmp_path) == tmp_path


def test_what_is_not_there_is_named_with_what_may_be_meant(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "best.pt").touch()
    (tmp_path / "bets.txt").touch()
    for source, line in (
        ("resnest50", "resnest50: no such checkpoint; did you mean official:resnest50?"),
        ("bset.pt", "bset.pt: no such checkpoint; did you mean 'best.pt'?"),
        ("other.pt", "other.pt: no such checkpoint"),
        ("gone/best.pt", "gone/best.pt: no such checkpoint"),
        ("best.pt/best.pt", "best.pt/best.pt: no such checkpoint"),
    ):
        with pytest.raises(CheckpointError) as error:
            find_weights(source)
        assert str(error.value) == line


def test_what_cannot_be_told_is_left_to_its_reader(tmp_path):
    os.mkfifo(tmp_path / "pipe.pt")
    assert find_weights(tmp_path / "pipe.pt") == tmp_path / "pipe.pt"


def test_a_name_is_published_where_no_file_has_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_published("official:resnest50") and is_published("tim:resnet50") and not is_published("c:/best.pt")
    (tmp_path / "official:resnest50").touch()
    assert not is_published("official:resnest50")
