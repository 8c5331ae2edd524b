"""Segmentation as a task: what it trains, measures and resumes, on drawn scenes."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import ALONE, CPU, compose_config, newest_checkpoint
from faults.harness import Command, Place
from faulty_task import Fault
from resnest_imagenet import build_model
from resnest_imagenet.checkpoint import load_checkpoint
from resnest_imagenet.commands.evaluate import run as evaluate
from resnest_imagenet.config import TrainConfig
from resnest_imagenet.config_reading import EvalConfig
from resnest_imagenet.data.demo_scenes import write_demo_scenes
from resnest_imagenet.data.scenes import VOID
from resnest_imagenet.errors import CheckpointError, ConfigError
from resnest_imagenet.randomness import Draws
from resnest_imagenet.tasks.choice import open_task
from resnest_imagenet.tasks.segmentation import masked_cross_entropy
from resnest_imagenet.training.train import train
from run_files import assert_same_run, read_events

SMALL_SCENES = ("+experiment=demo_segmentation", "device=cpu", "train.epochs=2", "train.crop=64", "train.batch_size=2")
SMALL_SCENES += ("loader.workers=1", "log.every_steps=1", "log.trackers=[]")


@pytest.fixture(scope="session")
def scenes(tmp_path_factory) -> Path:
    """8 training and 3 val scenes of five figures on a background."""
    folder = tmp_path_factory.mktemp("scenes")
    write_demo_scenes(folder, seed=0, train_scenes=8, val_scenes=3)
    return folder


@pytest.fixture
def scene_run(scenes, tmp_path):
    """Make the configuration of a small run in a folder of its own."""

    def make(*overrides, run="run"):
        places = (f"data.root={scenes}", f"run_dir={tmp_path / run}")
        return compose_config("train", TrainConfig, *SMALL_SCENES, *places, *overrides)

    return make


def test_the_loss_is_the_mean_over_labelled_pixels():
    rng = np.random.default_rng(0)
    logits, masks = rng.normal(size=(2, 3, 4, 5)), rng.integers(0, 3, size=(2, 4, 5))
    masks[rng.random(masks.shape) < 0.3] = VOID
    total, count = 0.0, 0
    for n, y, x in np.ndindex(masks.shape):
        if masks[n, y, x] != VOID:
            total += np.log(np.exp(logits[n, :, y, x]).sum()) - logits[n, masks[n, y, x], y, x]
            count += 1
    loss = masked_cross_entropy(torch.tensor(logits), torch.tensor(masks))
    assert loss.item() == pytest.approx(total / count, rel=1e-6)
    scores = torch.tensor(logits, requires_grad=True)
    nothing = masked_cross_entropy(scores, torch.full((2, 4, 5), VOID))
    nothing.backward()
    assert nothing.item() == 0 and not scores.grad.any()


@pytest.mark.slow
def test_a_run_leaves_what_it_promises_and_evaluates_to_the_same_number(segmentation_run, tmp_path, capsys):
    run, scenes = segmentation_run, segmentation_run.parent / "scenes"
    *_, evaluation = [event for event in read_events(run) if event["event"] == "eval"]
    assert evaluation["count"] == 3 and evaluation["protocol"] == "whole, own size"
    assert 0 <= evaluation["miou"] <= evaluation["miou_present"] <= 100
    assert "auxiliary" in next(event for event in read_events(run) if event["event"] == "train")
    best = load_checkpoint(run / "checkpoints/best.pt")
    assert (best["task"], best["metric"], len(best["classes"])) == ("segmentation", "miou", 6)
    with (run / "iou.csv").open() as file:
        assert [row["class"] for row in csv.DictReader(file)] == best["classes"]
    assert len((run / "scenes.csv").read_text().splitlines()) == 1 + 3
    out = tmp_path / "eval.json"
    arguments = (f"ckpt={newest_checkpoint(run)}", f"data.root={scenes}", "device=cpu", "loader.workers=0")
    capsys.readouterr()
    evaluate(compose_config("eval", EvalConfig, *arguments, f"out={out}"))
    (result,) = json.loads(out.read_text())["results"]
    names = ("miou", "miou_present", "pixel_accuracy", "count", "protocol")
    assert {name: result[name] for name in names} == {name: evaluation[name] for name in names}
    assert f"mIoU {evaluation['miou']:.2f} % of all 6 classes" in capsys.readouterr().out


@pytest.mark.slow
def test_each_protocol_evaluates_and_those_of_another_task_are_refused(scene_run, segmentation_run, tmp_path, capsys):
    """On one scene: the published protocol scores it many times."""
    shutil.copytree(segmentation_run.parent / "scenes", tmp_path / "one")
    for part in ("images", "masks"):
        for file in sorted((tmp_path / "one" / part / "val").iterdir())[1:]:
            file.unlink()
    places = (f"ckpt={newest_checkpoint(segmentation_run)}", f"data.root={tmp_path / 'one'}")
    arguments = (*places, "device=cpu", "loader.workers=0")
    for protocol, words in (
        ("slide", "slide, own size, windows of 64"),
        ("centre", "short side 64 bilinear, centre crop 64"),
        (
            "published",
            "published, long side 128 times 0.5 0.75 1 1.25 1.5 1.75, windows of 64, flipped too",
        ),
    ):
        evaluate(compose_config("eval", EvalConfig, *arguments, f"protocol={protocol}"))
        assert f"1 scenes: {words}" in capsys.readouterr().out
    for options, message in (
        (("protocol=paper",), "protocol is of classification: choose own, whole, slide, centre or published"),
        (("crop=64",), "crop and compile are of classification"),
        (("data.kind=imagenet",), "unknown data.kind=imagenet"),
    ):
        with pytest.raises(ConfigError, match=message):
            evaluate(compose_config("eval", EvalConfig, *arguments, *options))
    with pytest.raises(ConfigError, match=r"protocol is not of train\.task=segmentation: choose whole, slide"):
        scene_run("protocol=paper")


@pytest.mark.slow
def test_trackers_show_scenes_under_their_masks_and_how_classes_are_confused(scene_run):
    task = open_task(scene_run("loader.workers=0"))
    images, masks = next(iter(task.build_loader(task.plan_batches(4, ALONE), ALONE).batches(0)))
    sheet = task.show((images, masks), Draws(0, 0, 0))()
    assert sheet.shape == (2 * 68, 2 * 68, 3)
    from resnest_imagenet.data.loader import to_pixels

    for row, (pixels, mask) in enumerate(zip(to_pixels(images), masks.numpy(), strict=True)):
        colours = np.where((mask == VOID)[..., None], pixels, task.palette[np.where(mask == VOID, 0, mask)])
        top = row * 68 + 2
        assert np.array_equal(sheet[top : top + 64, 2:66], pixels)
        assert np.abs(sheet[top : top + 64, 70:134] - (pixels.astype(float) + colours) / 2).max() <= 1
    score = task.build_evaluation(ALONE)(task.build_model(True, CPU), lambda batch, is_everywhere: None)
    confusions = score.pictures["confusions"]()
    assert confusions.dtype == np.uint8 and len({row.tobytes() for row in confusions}) > 50


def interrupt() -> None:
    raise KeyboardInterrupt


@pytest.mark.slow
def test_a_run_resumes_bit_for_bit(scene_run, inject, tmp_path):
    """With all that draws: crops, blur and dropout."""
    options = ("train.epochs=1", "train.blur=0.5", "train.ema_decay=0.9", "checkpoint.every_steps=2")
    train(scene_run(*options, run="whole"))
    config = scene_run(*options, run="stopped")
    inject(Fault(0, 3, interrupt))
    with pytest.raises(KeyboardInterrupt):
        train(config)
    inject()
    train(config)
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")
    for name in ("iou.csv", "scenes.csv"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "stopped" / name).read_bytes()


@pytest.mark.process
def test_two_ranks_equal_one_process_that_accumulates(scenes, tmp_path):
    """With frozen norms bit for bit; trained ones have each rank's own statistics, as they have each batch's own."""
    place, models, runs = Place(tmp_path, fast=True), {}, []
    for ranks in (1, 2):
        run = place.new_run()
        runs.append(run)
        options = (f"data.root={scenes}", f"run_dir={run}", "train.global_batch=4", "train.norm=frozen")
        options += ("train.epochs=1",)
        trainer = Command(place, "train", *SMALL_SCENES, *options, ranks=ranks)
        assert trainer.wait() == [0] * ranks, trainer.output
        models[ranks] = load_checkpoint(newest_checkpoint(run))
    assert models[1]["step"] == models[2]["step"] == 2
    weights = [models[ranks]["model"] for ranks in (1, 2)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    first, second = ([event["miou"] for event in read_events(run) if event["event"] == "eval"] for run in runs)
    assert first == second and len(first) == 1


@pytest.mark.slow
def test_a_changed_mask_is_another_run(scene_run, scenes, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(scenes, copy)
    options = ("train.epochs=null", "train.steps=1", f"data.root={copy}", "data.digest=content")
    train(scene_run(*options))
    path = next((copy / "masks/train").glob("*.png"))
    mask = np.array(Image.open(path))
    mask[0, 0] = 1 - mask[0, 0]
    Image.fromarray(mask).save(path)
    with pytest.raises(CheckpointError, match="training_mask images of other"):
        train(scene_run(*options))


@pytest.mark.slow
def test_a_run_starts_from_a_network_of_classification(scene_run, tmp_path, capsys):
    torch.manual_seed(0)
    source = build_model("resnest14_half", 10)
    torch.save(source.state_dict(), tmp_path / "bare.pth")
    train(scene_run(f"train.init_from={tmp_path}/bare.pth", "train.epochs=null", "train.steps=1", "train.lr=1e-12"))
    assert f"starting from {tmp_path}/bare.pth: its backbone\n" in capsys.readouterr().out
    model = load_checkpoint(newest_checkpoint(tmp_path / "run"))["model"]
    torch.testing.assert_close(model["backbone.layer4.0.conv3.weight"], source.state_dict()["layer4.0.conv3.weight"])


@pytest.mark.slow
def test_a_run_is_compiled_once(scene_run, graphs):
    train(scene_run("train.compile=true", "train.epochs=1"))
    assert graphs.frame_count == 1  # for all steps, both heads and the evaluation
