import os
import signal

import pytest
import torch

from resnest_imagenet.checkpoint import save_checkpoint
from resnest_imagenet.errors import Stopped
from resnest_imagenet.training.run_folder import RunFolder
from resnest_imagenet.training.stopping import StopRequest


def ask():
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture
def run(tmp_path):
    """A folder with two checkpoints."""
    run = RunFolder(str(tmp_path / "run"), keep=2, is_main=True)
    run.checkpoints.mkdir(parents=True)
    for step in (1, 2):
        save_checkpoint({"step": step}, run.checkpoints / f"step-{step}.pt")
    return run


def test_a_signal_within_the_reading_of_a_checkpoint_is_no_damage(run, monkeypatch):
    real = torch.load
    monkeypatch.setattr(torch, "load", lambda *args, **options: (ask(), real(*args, **options))[1])
    with (
        pytest.raises(Stopped, match="SIGTERM: stopped before the first step; the same command resumes"),
        StopRequest(),
    ):
        run.read_newest()
    assert sorted(path.name for path in run.checkpoints.iterdir()) == ["step-1.pt", "step-2.pt"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_what_swallows_a_request_does_not_lose_it():
    """Python prints what leaves a `__del__`, and continues."""

    class Asking:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGUSR1)

    with StopRequest() as request:
        Asking()
        assert request.name == "SIGUSR1"
        with pytest.raises(Stopped, match="SIGUSR1: stopped before the first step"):
            request.wait_for_step()
