"""What people expect of a Hydra command: completion, printing, sweeps."""

import sys

import pytest
import yaml

import tiny_task
from conftest import LAUNCHED, SMALL
from resnest_imagenet.commands import train
from run_files import read_status


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("resnest-train recipe=resnest_", ["recipe=resnest_torch"]),
        (
            "resnest-train +experiment=resnest50_fast_4",
            ["+experiment=resnest50_fast_4s1x64d", "+experiment=resnest50_fast_4s2x40d"],
        ),
        ("resnest-train train.lr", ["train.lr="]),
    ],
)
def test_bash_completes(typed, offered, monkeypatch, capsys):
    monkeypatch.setenv("COMP_LINE", typed)
    monkeypatch.setenv("COMP_POINT", str(len(typed)))
    monkeypatch.setattr(sys, "argv", ["/bin/resnest-train", "-sc", "query=bash"])
    train.main()
    assert capsys.readouterr().out.split() == offered


def test_the_composed_configuration_is_printed(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["resnest-train", "+experiment=demo", "data.root=x", "--cfg", "job", "--resolve"])
    train.main()
    printed = yaml.safe_load(capsys.readouterr().out)
    assert (printed["run_dir"], printed["eval"]["crop"], printed["data"]["root"]) == ("runs/demo", 56, "x")


def test_a_sweep_under_torchrun_is_refused(monkeypatch, capsys):
    for name, value in LAUNCHED.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["resnest-train", "-m", "seed=0,1", "data.root=x"])
    with pytest.raises(SystemExit, match="2"):
        train.main()
    assert capsys.readouterr().err == (
        "resnest-train: --multirun runs one job after another in a single process: start it without torchrun\n"
    )


def test_a_sweep_into_one_folder_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["resnest-train", "-m", "seed=0,1", "data.root=x", "run_dir=runs/a"])
    with pytest.raises(SystemExit, match="2"):
        train.main()
    assert "--multirun needs a folder for each job" in capsys.readouterr().err


def sweep(tmp_path, monkeypatch, *words):
    """Train TinyTask several times, in a folder of its own."""
    tiny_task.register()
    monkeypatch.chdir(tmp_path)
    options = ("train.task=tiny", "train.epochs=1", "train.warmup_epochs=0", "log.trackers=[]", "data.root=unused")
    monkeypatch.setattr(sys, "argv", ["resnest-train", "--multirun", *SMALL, *options, *words])
    train.main()


@pytest.mark.slow
def test_a_sweep(tmp_path, monkeypatch):
    sweep(tmp_path, monkeypatch, "seed=0,1", "run_dir=run-${seed}")
    assert [yaml.safe_load((tmp_path / f"run-{seed}/config.yaml").read_text())["seed"] for seed in (0, 1)] == [0, 1]
    assert [read_status(tmp_path / f"run-{seed}")["state"] for seed in (0, 1)] == ["finished", "finished"]


@pytest.mark.slow
def test_a_search(tmp_path, monkeypatch):
    """Optuna gets each run's best accuracy."""
    words = ["hydra/sweeper=optuna", "hydra.sweeper.direction=maximize", "hydra.sweeper.n_trials=2"]
    words += ["hydra.sweeper.n_jobs=1", "train.lr=interval(0.02,0.2)", "run_dir=run-${hydra:job.num}"]
    sweep(tmp_path, monkeypatch, *words)
    (path,) = tmp_path.glob("multirun/**/optimization_results.yaml")
    search = yaml.safe_load(path.read_text())
    best = [read_status(tmp_path / f"run-{n}")["best"] for n in (0, 1)]
    assert search["best_value"] == max(best) > 0
    rates = [yaml.safe_load((tmp_path / f"run-{n}/config.yaml").read_text())["train"]["lr"] for n in (0, 1)]
    assert search["best_params"]["train.lr"] in [
        rate for rate, value in zip(rates, best, strict=True) if value == max(best)
    ]


def test_completion_can_be_installed(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["resnest-train", "-sc", "install=bash"])
    train.main()
    assert "complete -o nospace -o default -F hydra_bash_completion resnest-train" in capsys.readouterr().out
