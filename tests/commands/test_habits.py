"""What people expect of a Hydra command: completion, printing, sweeps."""

import re
import sys

import pytest
import yaml

from conftest import LAUNCHED, SMALL, run_module
from resnest_imagenet.commands import train


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
        "resnest-train: --multirun runs its jobs one after another in one process: start it without torchrun\n"
    )


def test_a_sweep_into_one_folder_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["resnest-train", "-m", "seed=0,1", "data.root=x", "run_dir=runs/a"])
    with pytest.raises(SystemExit, match="2"):
        train.main()
    assert "--multirun needs a folder for each job" in capsys.readouterr().err


SWEEP = ("--multirun", *SMALL, "train.epochs=1", "train.warmup_epochs=0", "loader=torchvision", "data.root={}")


def test_a_sweep(demo_images, tmp_path):
    words = [word.format(demo_images) for word in SWEEP]
    done = run_module("resnest_imagenet.commands.train", *words, "seed=0,1", "run_dir=run-${seed}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [yaml.safe_load((tmp_path / f"run-{seed}/config.yaml").read_text())["seed"] for seed in (0, 1)] == [0, 1]


def test_a_search(demo_images, tmp_path):
    """Optuna gets each run's best accuracy."""
    words = [word.format(demo_images) for word in SWEEP]
    words += ["hydra/sweeper=optuna", "hydra.sweeper.direction=maximize", "hydra.sweeper.n_trials=2"]
    words += ["hydra.sweeper.n_jobs=1", "train.lr=interval(0.02,0.2)", "run_dir=run-${hydra:job.num}"]
    done = run_module("resnest_imagenet.commands.train", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("multirun/**/optimization_results.yaml")
    found = yaml.safe_load(path.read_text())
    best = [float(re.search(r"top-1 (\S+) %", line)[1]) for line in done.stdout.splitlines() if "top-1" in line]
    assert len(best) == 2 and found["best_value"] == pytest.approx(max(best), abs=0.005)
    rates = [yaml.safe_load((tmp_path / f"run-{n}/config.yaml").read_text())["train"]["lr"] for n in (0, 1)]
    assert found["best_params"] == {"train.lr": rates[best.index(max(best))]}


def test_completion_can_be_installed(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["resnest-train", "-sc", "install=bash"])
    train.main()
    assert "complete -o nospace -o default -F hydra_bash_completion resnest-train" in capsys.readouterr().out
