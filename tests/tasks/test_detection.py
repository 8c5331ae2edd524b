"""Detection as a task: what it trains, measures and resumes, on drawn objects."""

import csv
import hashlib
import json
import re
import shutil
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from conftest import ALONE, CPU, compose_config, newest_checkpoint
from faulty_task import Fault, FaultyTask
from forked import compute_on_ranks, train_on_ranks
from resnest_imagenet.checkpoint import load_checkpoint
from resnest_imagenet.commands.evaluate import run as evaluate
from resnest_imagenet.config_reading import EvalConfig
from resnest_imagenet.errors import CheckpointError, ConfigError, DataError, Stopped
from resnest_imagenet.instances import Target
from resnest_imagenet.randomness import Draws
from resnest_imagenet.tasks.choice import open_task
from resnest_imagenet.training import train as train_module
from resnest_imagenet.training.train import train
from run_files import assert_equal, assert_same_run, read_events

LOSSES = {"objectness", "rpn_boxes", "classes", "boxes", "masks"}
# Norms get the mean over more batches than an epoch has, from a loader with a worker: it draws random numbers too.
PRECISE = ("train.masks=false", "train.precise_batches=4", "checkpoint.every_steps=4", "checkpoint.keep=9")
PRECISE += ("loader.workers=1",)


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
    # Neither is another layout read as COCO's.
    with pytest.raises(ConfigError, match=r"^data\.kind=imagenet: a detector is evaluated on data=coco$"):
        evaluate(compose_config("eval", EvalConfig, *arguments, "data.kind=imagenet"))
    (result,) = json.loads(out.read_text())["results"]
    names = [name for name in last if name.startswith(("box_", "mask_"))]
    assert len(names) == 2 * 12
    for name in names:
        # A run has 0 in place of what no object of the set could give.
        assert (result[name] or 0) == pytest.approx(last[name], abs=1e-9), name


@pytest.mark.slow
def test_an_evaluation_that_cannot_be_is_one_line(detection_run, demo_objects, tmp_path):
    config = compose_config(
        "eval", EvalConfig, f"ckpt={newest_checkpoint(detection_run)}", f"data.root={demo_objects}", "device=cpu"
    )
    line = "^predictions=x.csv: a detector's results are JSON: let it end in .json$"
    with pytest.raises(ConfigError, match=line):
        evaluate(config.model_copy(update={"predictions": "x.csv"}))
    file = tmp_path / "own.json"
    content = json.loads((demo_objects / "annotations/instances_val2017.json").read_text())
    content["categories"][0]["name"] = "plate"
    file.write_text(json.dumps(content))
    line = (
        "own.json: its 5 classes are not the 5 classes of .* in the same order: set data.val_json to a file that has "
    )
    with pytest.raises(DataError, match=line):
        evaluate(config.model_copy(update={"data": config.data.model_copy(update={"val_json": str(file)})}))


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


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.usefixtures("signals")
def test_precise_norms_leave_a_run_that_resumes_bit_for_bit(object_run, inject, monkeypatch, tmp_path):
    """Stopped while their batches are read, and after them: the evaluation is made again.

    And where the first step after an evaluation is skipped, it restores the statistics that this has left.
    """
    options = (*PRECISE, "train.max_skipped_steps=1")
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
    assert_equal(*(content["model"] for content in after_skip))


def make_target(has_boxes: bool) -> Target:
    """A disk of 24 pixels, or nothing, in an image of 64 x 64."""
    boxes = torch.tensor([[20.0, 20.0, 44.0, 44.0]])[:has_boxes]
    outline = 32 + 12 * np.stack([np.cos(angles := np.linspace(0, 6, 20)), np.sin(angles)], axis=1)
    masks = [[outline.ravel()]] if has_boxes else []
    return Target(0, (64, 64), (64, 64), boxes, torch.zeros(len(boxes), dtype=torch.int64), masks)


def step_without_boxes(ranks):
    """Return of each step its losses, whether all gradients are finite, and a digest of them.

    The first of two ranks has no boxes, then both have none, then each has a box in one of its images.
    """
    from resnest_imagenet.models.rcnn import build_rcnn

    results = []
    for cascade in (False, True):
        torch.manual_seed(0)
        options = {"channels": 8, "box_width": 8, "box_convs": 1, "mask_convs": 1, "samples": 8, "norm": "bn"}
        model = build_rcnn("resnest14_half", 5, cascade=cascade, masks=True, **options)
        network = DistributedDataParallel(model)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for with_boxes in ((False, ranks.rank > 0), (False, False), (True, False)):
            network.zero_grad()
            torch.manual_seed(ranks.rank)
            losses = network(torch.randn(2, 3, 64, 64), [make_target(has_boxes) for has_boxes in with_boxes])
            torch.stack(list(losses.values())).sum().backward()
            gradients = torch.cat([parameter.grad.flatten() for parameter in trained])  # all have one
            digest = hashlib.sha256(gradients.numpy().tobytes()).hexdigest()
            results.append((sorted(losses), bool(gradients.isfinite().all()), digest))
    return results


@pytest.mark.process
@pytest.mark.slow
def test_ranks_without_boxes_do_not_wait_for_each_other():
    first, second = compute_on_ranks(step_without_boxes, 2)
    assert first == second and len(first) == 6
    assert all(is_finite for _, is_finite, _ in first)
    for results in (first[:3], first[3:]):
        (names,) = {tuple(names) for names, _, _ in results}
        assert {"objectness", "rpn_boxes", "masks"} < set(names)
        assert len({digest for _, _, digest in results}) == 3


@pytest.fixture
def one_thread():
    """As the ranks have: the number of threads changes the order of sums."""
    number = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(number)


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_a_step_is_skipped_on_all_ranks_for_one_loss_of_one_rank(object_run, inject, tmp_path):
    """And the rest equals one process that accumulates: a rank that had applied it would spoil the next step."""
    options = ("train.global_batch=4", "train.epochs=3", "eval.every_epochs=9", "train.max_skipped_steps=1")
    fault = Fault(1, 1, loss_factor=torch.nan, part="rpn_boxes")
    ended = train_on_ranks(object_run(*options, run="two"), tmp_path, 2, [fault])
    assert [rank.code for rank in ended] == [0, 0], ended
    events = read_events(tmp_path / "two")
    assert [(event["step"], event["ranks"]) for event in events if event["event"] == "skipped"] == [(2, [1])]
    assert [event["count"] for event in events if event["event"] == "eval"] == [3]
    inject(fault)
    train(object_run(*options, run="one"))
    checkpoints = [tmp_path / run / "checkpoints/step-000000003.pt" for run in ("two", "one")]
    two, one = (load_checkpoint(path)["model"] for path in checkpoints)
    before, skipped = (load_checkpoint(checkpoints[0].with_stem(f"step-00000000{step}"))["model"] for step in (1, 2))
    assert_equal(dict(before), dict(skipped))
    of_own_batches = ("running_mean", "running_var", "num_batches_tracked")
    names = [name for name in one if not name.endswith(of_own_batches)]
    assert [name for name in names if not torch.equal(one[name], two[name])] == []
    assert not torch.equal(two["rpn.head.cls_logits.weight"], skipped["rpn.head.cls_logits.weight"])


@pytest.mark.slow
def test_a_changed_object_is_another_run(detection_run, demo_objects, object_run, tmp_path):
    shutil.copytree(demo_objects, tmp_path / "objects")
    shutil.copytree(detection_run, tmp_path / "run")
    for part, change in (("train", "training"), ("val", "val")):
        file = tmp_path / f"objects/annotations/instances_{part}2017.json"
        original = file.read_text()
        content = json.loads(original)
        content["annotations"][0]["bbox"][0] += 1
        file.write_text(json.dumps(content))
        with pytest.raises(CheckpointError, match=f"was trained with {change} images of other objects: "):
            train(object_run(f"data.root={tmp_path / 'objects'}"))
        file.write_text(original)
    removed = content["images"].pop()["id"]
    content["annotations"] = [value for value in content["annotations"] if value["image_id"] != removed]
    file.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="was trained with val images 3 -> 2: "):
        train(object_run(f"data.root={tmp_path / 'objects'}"))


@pytest.mark.slow
def test_norms_of_heads_alone_are_not_synchronised_on_a_cpu(object_run, monkeypatch, capsys):
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    model = open_task(object_run("train.norm=frozen", "train.head_norm=sync")).build_model(False, CPU)
    assert not any(type(module).__name__ == "SyncBatchNorm" for module in model.modules())
    assert "train.head_norm=sync: on a CPU the statistics" in capsys.readouterr().out


def test_what_a_task_shows_counts_and_refuses(object_run):
    task = open_task(object_run())
    assert (task.metric, task.classes) == ("mask_ap", ("disk", "square", "triangle", "star", "cross"))
    plan = task.plan_batches(3, ALONE)
    images, targets = batch = next(iter(task.build_loader(plan, ALONE).batches(0)))
    sheet = task.show(batch, Draws(0, 0, 0))()
    assert sheet.dtype == np.uint8 and sheet.shape[2] == 3
    without = task.show((images, [replace(target, boxes=target.boxes[:0]) for target in targets]), Draws(0, 0, 0))()
    assert sheet.shape == without.shape and (sheet != without).any(2).mean() > 0.01
    blank, objects = task.blank_batch(CPU)
    assert blank.shape == (2, 3, 64, 96) and not blank.any()
    assert [(target.boxes.tolist(), len(target.masks)) for target in objects] == [([[0, 0, 96, 64]], 1)] * 2
    generator = torch.get_rng_state()
    exact = task.count_kept_bytes(CPU)
    assert torch.equal(torch.get_rng_state(), generator)  # a run's plan asks for it
    assert exact < task.count_kept_bytes(CPU, enough=1e12) < 1e9 and task.count_kept_bytes(CPU, enough=exact) == exact
    # On a CPU norms are a rank's own; a GPU keeps more.
    assert task._recipe.norm == "bn" and open_task(object_run("train.norm=sync")).count_kept_bytes(CPU) == exact
    assert task.count_kept_bytes(torch.device("cuda")) > exact
    lines = task.describe(counts_cost=True)
    assert re.fullmatch(r"Mask R-CNN on resnest14_half, 5 classes, \d+\.\d GFLOPs at 64 x 96", lines["network"])
    assert "7 training and 3 val images" in lines["data"]
    numbers = np.bincount(task._train.labels, minlength=5)
    least, most = (f"{numbers[label]} ({task.classes[label]})" for label in (numbers.argmin(), numbers.argmax()))
    assert lines["objects per class"].startswith(f"{least} to {most}, ")
    boxes = open_task(object_run("train.masks=false", "train.cascade=true", "train.precise_batches=2"))
    assert boxes.metric == "box_ap"
    with pytest.raises(
        DataError, match="7 training images are less than a batch of 2 for each of 4 ranks, .*: lower tr"
    ):
        boxes.build_evaluation(replace(ALONE, world_size=4))
    with pytest.raises(ConfigError, match="a detector is trained on data=coco"):
        open_task(object_run("data.kind=folder"))
