"""Detection as a task: what it trains, measures and resumes, on drawn objects."""

import csv
import json
import signal

import pytest
import torch

from conftest import compose_config, newest_checkpoint
from faulty_task import Fault, FaultyTask
from resnest_imagenet.checkpoint import load_checkpoint
from resnest_imagenet.commands.evaluate import run as evaluate
from resnest_imagenet.config import EvalConfig
from resnest_imagenet.errors import Stopped
from resnest_imagenet.tasks.choice import open_task
from resnest_imagenet.training import train as train_module
from resnest_imagenet.training.train import train
from run_files import assert_equal, assert_same_run, read_events

LOSSES = {"objectness", "rpn_boxes", "classes", "boxes", "masks"}
# Where neither an average nor masks matter: a network of boxes, whose norms get the mean over more batches than an
# epoch has.
PRECISE = ("train.masks=false", "train.precise_batches=4", "checkpoint.every_steps=4", "checkpoint.keep=9")


@pytest.mark.slow
def test_a_run_leaves_what_it_promises_and_evaluates_to_the_same_number(detection_run, demo_objects, tmp_path):
    events = read_events(detection_run)
    for event in events:
        if event["event"] == "train":
            assert event.keys() >= LOSSES
            assert event["loss"] == pytest.approx(sum(event[name] for name in LOSSES), rel=1e-6)
    evaluations = [event for event in events if event["event"] == "eval"]
    assert [event["step"] for event in evaluations] == [3, 6]
    last = evaluations[-1]
    assert last["count"] == 3 and last["protocol"].startswith("short side 64, long side at most 96, ")
    best = load_checkpoint(detection_run / "checkpoints/best.pt")
    assert (best["task"], best["metric"]) == ("detection", "mask_ap")
    assert best["best"] == max(event["mask_ap"] for event in evaluations)
    with (detection_run / "ap.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {(row["kind"], row["class"]) for row in rows} >= {
        (kind, name) for kind in ("box", "mask") for name in best["classes"]
    }
    found = json.loads((detection_run / "detections.json").read_text())
    assert found and found[0].keys() >= {"image_id", "category_id", "bbox", "score"}
    for name in ("precision_recall.csv", "errors.csv", "images.csv"):
        assert (detection_run / name).stat().st_size
    out = tmp_path / "eval.json"
    arguments = (f"ckpt={newest_checkpoint(detection_run)}", f"data.root={demo_objects}", "device=cpu")
    evaluate(compose_config("eval", EvalConfig, *arguments, "loader.workers=0", f"out={out}"))
    (result,) = json.loads(out.read_text())["results"]
    names = [name for name in last if name.startswith(("box_", "mask_"))]
    assert len(names) == 2 * 12
    for name in names:
        # A run has 0 in place of what no object of the set could give.
        assert (result[name] or 0) == pytest.approx(last[name], abs=1e-9), name


def interrupt() -> None:
    raise KeyboardInterrupt


@pytest.mark.slow
def test_two_runs_are_equal_and_one_resumes_in_the_middle_of_an_epoch(detection_run, object_run, inject, tmp_path):
    config = object_run()
    inject(Fault(1, 2, interrupt))
    with pytest.raises(KeyboardInterrupt):
        train(config)
    assert load_checkpoint(newest_checkpoint(tmp_path / "run"))["step"] == 5
    inject()
    train(config)
    assert_same_run(detection_run, tmp_path / "run")
    for name in ("ap.csv", "precision_recall.csv", "errors.csv", "images.csv", "detections.json"):
        assert (detection_run / name).read_bytes() == (tmp_path / "run" / name).read_bytes()


class StoppingTask(FaultyTask):
    """Its process gets the signal of a scheduler in the middle of an evaluation."""

    def __init__(self, task, at_batch: int) -> None:
        super().__init__(task, ())
        self._at_batch = at_batch

    def build_evaluation(self, ranks):
        evaluate = self._task.build_evaluation(ranks)

        def evaluate_and_stop(model, pause):
            def pause_and_stop(batch, is_everywhere):
                if batch == self._at_batch:
                    signal.raise_signal(signal.SIGTERM)
                pause(10 * batch, is_everywhere)  # the ranks ask each other at every tenth only

            return evaluate(model, pause_and_stop)

        return evaluate_and_stop


@pytest.mark.slow
@pytest.mark.usefixtures("signals")
@pytest.mark.parametrize("average", [(), ("train.ema_decay=0.9",)])
def test_precise_norms_leave_a_run_that_resumes_bit_for_bit(object_run, inject, monkeypatch, average, tmp_path):
    """Stopped while their batches are read, and after them: the evaluation is made again.

    And where the first step after an evaluation is skipped, it restores the statistics that this has left.
    """
    options = (*PRECISE, *average, "train.max_skipped_steps=1")
    skipped = Fault(1, 0, loss_factor=torch.nan)
    inject(skipped)
    train(object_run(*options, run="whole"))
    config = object_run(*options)
    for at_batch in (2, 5):
        monkeypatch.setattr(train_module, "open_task", lambda config, at=at_batch: StoppingTask(open_task(config), at))
        with pytest.raises(Stopped):
            train(config)
    checkpoints = tmp_path / "run/checkpoints"
    assert load_checkpoint(newest_checkpoint(tmp_path / "run"))["epoch"] == 0
    inject(skipped, Fault(1, 1, interrupt))
    with pytest.raises(KeyboardInterrupt):
        train(config)
    (checkpoints / "step-000000004.pt").unlink()  # from the end of the first epoch
    inject(skipped)
    train(config)
    assert_same_run(tmp_path / "whole", tmp_path / "run")
    after_skip = [load_checkpoint(tmp_path / run / "checkpoints/step-000000004.pt") for run in ("whole", "run")]
    for name in ("model", "ema"):
        assert_equal(*(content[name] for content in after_skip))
