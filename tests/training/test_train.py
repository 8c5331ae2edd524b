"""Whole runs of the shipped configuration on real images, shrunk: one of each kind, and what belongs to classification.

What surrounds the steps is tested on a task of a millisecond a step: test_resume.py, test_skip.py, test_start.py,
test_ranks.py.
"""

import inspect
import re
import shutil
import sys

import pytest
import torch
from torch import nn

from conftest import ALONE, CPU, evaluate_checkpoint, newest_checkpoint
from faulty_task import Fault
from forked import ask_to_stop
from resnest_imagenet import build_model, evaluate
from resnest_imagenet.checkpoint import load_checkpoint, save_checkpoint
from resnest_imagenet.data.augment import Augmentation
from resnest_imagenet.data.demo import write_demo_images
from resnest_imagenet.data.shards import write_shards
from resnest_imagenet.data.transforms import ERandomCrop
from resnest_imagenet.errors import CheckpointError, DataError, NonFiniteError, Stopped
from resnest_imagenet.models.dropblock import DropBlock
from resnest_imagenet.randomness import Draws
from resnest_imagenet.supervision import Watch
from resnest_imagenet.tasks import classification
from resnest_imagenet.tasks.choice import open_task
from resnest_imagenet.training import train as train_module
from resnest_imagenet.training.control import Control
from resnest_imagenet.training.health import Health
from resnest_imagenet.training.loop import train_epoch
from resnest_imagenet.training.saving import Saver
from resnest_imagenet.training.schedule import StepPlan
from resnest_imagenet.training.state import TrainingState
from resnest_imagenet.training.stopping import StopRequest
from resnest_imagenet.training.train import prepare, train
from run_files import (
    assert_equal,
    assert_same_run,
    list_places,
    read_events,
    read_scalars,
    read_status,
    without_clock,
)
from tiny_task import TinyTask

BOTH_PARTS = {"data.train_dir": "train", "data.val_dir": "val"}
ONE_EPOCH = ("train.epochs=1", "train.warmup_epochs=0")


@pytest.mark.slow
@pytest.mark.parametrize(("loader", "decay"), [("dali", "null"), ("torchvision", "0.5")])
def test_a_run_leaves_what_it_promises_and_evaluates_to_the_same_number(
    loader, decay, small_run, evaluation_of, tmp_path, capsys
):
    """Ten steps: the second epoch is shorter. With a moving average, that is what is evaluated."""
    options = (f"loader={loader}", f"train.ema_decay={decay}", "train.epochs=null", "train.steps=10")
    options += ("loader.workers=1",)
    state = train(small_run(*options, "log.every_steps=4", "train.mixup_alpha=0.2", "protocol=full"))
    run = tmp_path / "run"
    assert (state.epoch, state.step) == (2, 10)

    events = read_events(run)
    assert list_places(events) == [
        ("train", 1, 4), ("train", 1, 6), ("eval", 1, 6), ("train", 2, 8), ("train", 2, 10), ("eval", 2, 10),
    ]  # fmt: skip
    first = events[0]
    assert first["images_per_s"] > 0 and 0 <= first["data_wait"] <= 1 and 1.5 < first["loss"] < 5
    assert first["lr"] == pytest.approx(0.4 * 16 / 256 * 3 / 6)
    protocol = "short side 32 bilinear, centre crop 32"
    evaluations = [event for event in events if event["event"] == "eval"]
    assert [(event["protocol"], event["metric"]) for event in evaluations] == [(protocol, "top1")] * 2
    assert capsys.readouterr().out.count(f"of 40 images ({protocol})") == 2

    status = read_status(run)
    assert status["state"] == "finished" and status["step"] == 10
    assert (status["metric"], status["best"]) == ("top1", state.best)
    assert f'"torch": "{torch.__version__.partition("+")[0]}"' in (run / "environment.json").read_text()
    assert "resnest14_half" in (run / "config.yaml").read_text()
    scalars = read_scalars(run)
    assert scalars["train/loss"] == [
        (event["step"], pytest.approx(event["loss"])) for event in events if event["event"] == "train"
    ]
    assert scalars["eval/top1"] == [(event["step"], pytest.approx(event["top1"])) for event in evaluations]

    checkpoint = load_checkpoint(newest_checkpoint(run))
    assert (checkpoint["task"], checkpoint["metric"]) == ("classification", "top1")
    assert_equal(checkpoint["model"], state.model.state_dict())
    if state.ema is not None:
        assert checkpoint["ema_updates"] == 10
        assert_equal(checkpoint["ema"], state.ema.module.state_dict())
        assert not torch.equal(checkpoint["ema"]["fc.weight"], checkpoint["model"]["fc.weight"])
    assert not list((run / "checkpoints").glob("*.tmp"))
    (result,) = evaluate_checkpoint(evaluation_of(newest_checkpoint(run), f"loader={loader}", "protocol=full"))
    assert (result.top1, result.top5, result.count) == (evaluations[-1]["top1"], evaluations[-1]["top5"], 40)
    for name in ("macro_precision", "macro_recall", "macro_f1"):
        assert getattr(result, name) == evaluations[-1][name]
    best = max(evaluations, key=lambda event: event["top1"])
    (result,) = evaluate_checkpoint(evaluation_of(run / "checkpoints/best.pt", f"loader={loader}", "protocol=full"))
    assert result.top1 == best["top1"] == state.best
    rows = (run / "predictions.csv").read_text().splitlines()
    assert len(rows) == 1 + 40 and best["files"] == ["predictions.csv"]


@pytest.mark.slow
def test_the_same_command_resumes_bit_for_bit(small_run, inject, tmp_path, capsys, signals):
    """With all that draws: stopped in the middle of an epoch, interrupted in the next, which loses a step."""
    write_demo_images(tmp_path / "images", seed=0, train_per_class=5, val_per_class=1)  # an epoch has three steps
    options = (f"data.root={tmp_path / 'images'}", "loader=torchvision", "loader.workers=1")
    options += ("train.ema_decay=0.9", "train.dropout=0.2", "train.mixup_alpha=0.2")
    # At 48 pixels layer3's maps hold one 3x3 block.
    options += ("train.dropblock=0.2", "train.crop=48", "train.mixup_per_sample=true", "train.mixup_partner=permuted")
    options += ("train.policy=resnest", "train.jitter=0.4", "train.lighting=0.1", "train.erasing=0.5")
    options += ("train.cutmix_alpha=1.0", "train.batch_size=8", "train.global_batch=16", "log.every_steps=5")
    options += ("checkpoint.every_steps=2", "checkpoint.keep=2", *write_start(tmp_path), *OF_FINE_TUNING)
    train(small_run(*options, run="whole"))
    config = small_run(*options, run="stopped")
    inject(Fault(0, 1, ask_to_stop))
    with pytest.raises(Stopped):
        train(config)
    assert load_checkpoint(newest_checkpoint(tmp_path / "stopped"))["step"] == 2
    inject(Fault(1, 4, interrupt))
    with pytest.raises(KeyboardInterrupt):
        train(config)
    inject()
    train(config)
    assert "resuming after step 4, 1 epochs done" in capsys.readouterr().out
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")
    assert read_scalars(tmp_path / "whole") == read_scalars(tmp_path / "stopped")
    files = [(tmp_path / run / "predictions.csv").read_bytes() for run in ("whole", "stopped")]
    assert files[0] == files[1]
    require_frozen_and_normalised(tmp_path / "whole", tmp_path)


OF_FINE_TUNING = ("train.freeze=2", "train.layer_decay=0.7", "train.drop_path=0.3", "train.class_weights=balanced")
OF_FINE_TUNING += ("train.ema_warmup=true", "train.patience=5", "train.flips=both", "train.optimizer=adamw")
OF_FINE_TUNING += ("train.mean=[0.5,0.4,0.3]", "train.std=[0.3,0.2,0.25]", "train.clip_norm=1.0", "train.lr=0.01")


def write_start(folder):
    """Write the weights of a network of other classes, and return the option that starts a run from them."""
    source = folder / "start.safetensors"
    save_checkpoint(build_model("resnest14_half", 7, zero_gamma=False).state_dict(), source)
    return (f"train.init_from={source}",)


def require_frozen_and_normalised(run, folder):
    """Require that the frozen stages are those of the start, and that readers of best.pt normalise as the run did."""
    from resnest_imagenet import open_classifier  # late: torchvision
    from resnest_imagenet.inference.describe import describe_input
    from resnest_imagenet.weights.load import read_weights

    start, best = load_checkpoint(folder / "start.safetensors"), load_checkpoint(run / "checkpoints/best.pt")
    for weights in (best["model"], best["ema"]):
        is_same = {name: torch.equal(weights[name], value) for name, value in start.items() if "fc" not in name}
        counted = {name for name in is_same if "num_batches" in name}
        frozen = {name for name in is_same if name.startswith(("conv1", "bn1", "layer1"))} - counted
        assert {name for name in is_same if is_same[name]} - counted == frozen
    classifier = open_classifier(run / "checkpoints/best.pt", device="cpu")
    assert classifier.transform.mean == (127.5, 102.0, 76.5) and classifier.transform.std == (76.5, 51.0, 63.75)
    card = describe_input(read_weights(run / "checkpoints/best.pt"), "resnest14_half")
    assert (card.mean, card.std) == ((0.5, 0.4, 0.3), (0.3, 0.2, 0.25))
    (result,) = evaluate(classifier, folder / "images/val", loader="torchvision", workers=0)
    assert result.top1 == best["best"]


def interrupt():
    raise KeyboardInterrupt


@pytest.mark.slow
def test_a_run_on_shards_is_the_run_on_the_folder_and_resumes(small_run, inject, demo_images, evaluation_of, tmp_path):
    write_shards(str(demo_images), BOTH_PARTS, tmp_path / "shards", 30, shuffle=False)
    shards = ("data=webdataset", f"data.root={tmp_path / 'shards'}")
    options = ("loader=dali", *ONE_EPOCH, "checkpoint.every_steps=3", "log.trackers=[]")
    train(small_run(*options, run="folder"))
    inject(Fault(0, 4, interrupt))
    with pytest.raises(KeyboardInterrupt):
        train(small_run(*options, *shards, run="shards"))
    inject()
    train(small_run(*options, *shards, run="shards"))
    runs = [tmp_path / "folder", tmp_path / "shards"]
    assert without_clock(read_events(runs[0])) == without_clock(read_events(runs[1]))
    folder, sharded = (load_checkpoint(newest_checkpoint(run)) for run in runs)
    assert_equal(folder["model"], sharded["model"])
    assert folder["classes"] == sharded["classes"]
    with pytest.raises(CheckpointError, match="was trained with data.shuffle_shards=null, not 2"):
        train(small_run(*options, *shards, "data.shuffle_shards=2", run="shards"))
    (result,) = evaluate_checkpoint(evaluation_of(newest_checkpoint(runs[1]), *shards, "loader=dali"))
    assert (result.top1, result.count) == (read_events(runs[0])[-1]["top1"], 40)


@pytest.mark.slow
def test_bad_images_end_a_run_or_are_replaced_as_asked(small_run, demo_images, tmp_path, monkeypatch, capsys):
    """A run that they ended resumes with on_error=substitute, and both loaders then agree about the labels."""
    shutil.copytree(demo_images, tmp_path / "data")
    bad = sorted((tmp_path / "data/train").rglob("*.JPEG"))[::20]
    for path in bad:
        path.write_bytes(b"<html>")
    options = (f"data.root={tmp_path / 'data'}", "log.trackers=[]", *ONE_EPOCH, "train.batch_size=34")
    with pytest.raises(DataError, match="JPEG: not a readable image"):
        train(small_run(*options, "loader=torchvision", run="torchvision"))
    seen = {"dali": [], "torchvision": []}
    real = classification.Classification.loss
    for loader, labels in seen.items():

        def loss(task, network, batch, draws, out=labels):
            out.append(batch[1])
            return real(task, network, batch, draws)

        monkeypatch.setattr(classification.Classification, "loss", loss)
        train(small_run(*options, f"loader={loader}", "data.on_error=substitute", run=loader))
        assert {line.partition(": ")[0] for line in capsys.readouterr().err.splitlines()} == {str(path) for path in bad}
    assert_equal(*seen.values())
    with pytest.raises(DataError, match="bad image number 3, data.max_errors=2"):
        train(small_run(*options, "data.on_error=substitute", "data.max_errors=2"))


@pytest.mark.process
def test_shuffling_by_shards_reaches_the_plan(small_run, demo_images, tmp_path):
    write_shards(str(demo_images), BOTH_PARTS, tmp_path / "shards", 30, shuffle=False)
    config = small_run("data=webdataset", f"data.root={tmp_path / 'shards'}", "data.shuffle_shards=2")
    plan = open_task(config).plan_batches(6, ALONE)
    assert (plan.shard_sizes, plan.shuffle_shards, plan.shuffle, plan.seed) == ((30, 30, 30, 13), 2, True, 0)


@pytest.mark.slow
def test_every_option_of_the_recipe_reaches_its_place(small_run, monkeypatch):
    """Two runs that lose the same option are equal: so what each part is given is looked at, all off their defaults."""
    seen = {}

    def spy(place, name):
        real = getattr(place, name)

        def call(*args, **kwargs):
            seen[name] = inspect.signature(real).bind(*args, **kwargs).arguments
            return real(*args, **kwargs)

        monkeypatch.setattr(place, name, call)

    for name in ("build_model", "TrainTransform", "dropblock_probability", "add_drop_path"):
        spy(classification, name)
    for name in ("draw_mixup", "draw_cutmix", "erase_rectangles", "smoothed_cross_entropy"):
        spy(classification, name)
    spy(DropBlock, "set_probability")
    options = {"dropblock": 0.3, "mixup_alpha": 0.7, "mixup_per_sample": True, "mixup_partner": "permuted"}
    options |= {"label_smoothing": 0.17, "init": "fan_out", "zero_gamma": False, "dropout": 0.13, "crop": 40}
    options |= {"min_crop_area": 0.6, "antialias": True, "interpolation": "bicubic", "cropping": "erandom"}
    options |= {"policy": "rotation", "jitter": 0.21, "lighting": 0.22, "pixel_shift": 3, "erasing": 0.23}
    options |= {"cutmix_alpha": 0.8, "decay_all": True, "weight_decay": 0.003, "momentum": 0.8}
    options |= {"head_lr_factor": 7, "clip_norm": 0.9, "flips": "vertical", "drop_path": 0.24}
    options |= {"mean": "[0.5,0.4,0.3]", "std": "[0.25,0.2,0.1]", "class_weights": "balanced"}
    spy(nn.utils, "clip_grad_norm_")
    overrides = [f"train.{name}={value}" for name, value in options.items()]
    state = train(small_run(*ONE_EPOCH, "train.nesterov=false", "log.trackers=[]", *overrides))
    assert seen["set_probability"]["probability"] == 0.3
    assert [seen["draw_mixup"][name] for name in ("alpha", "per_sample", "partner")] == [0.7, True, "permuted"]
    assert seen["add_drop_path"]["probability"] == 0.24
    assert seen["smoothed_cross_entropy"]["smoothing"] == 0.17
    few, many = 4, 11  # images of disk, and of each other class
    assert sorted(seen["smoothed_cross_entropy"]["class_weights"].tolist()) == pytest.approx(
        [103 / 10 / many] * 9 + [103 / 10 / few]
    )
    assert seen["smoothed_cross_entropy"]["targets"].shape == (16, 10)
    built = seen["build_model"]
    assert (built["dropout"], built["zero_gamma"], built["init"]) == (0.13, False, "fan_out")
    cropping, look = ERandomCrop(40, 0.6), Augmentation("rotation", 0.21, 0.22, 3)
    flips, mean, std = (0, 0.5), (0.5 * 255, 0.4 * 255, 0.3 * 255), (0.25 * 255, 0.2 * 255, 0.1 * 255)
    assert list(seen["TrainTransform"].values()) == [40, 0, cropping, True, "bicubic", look, *flips, mean, std]
    assert (seen["draw_cutmix"]["alpha"], seen["draw_cutmix"]["partner"]) == (0.8, "permuted")
    assert seen["erase_rectangles"]["probability"] == 0.23
    assert seen["clip_grad_norm_"]["max_norm"] == 0.9
    groups = state.optimizer.param_groups
    assert {(g["weight_decay"], g["momentum"], g["nesterov"]) for g in groups} == {(0.003, 0.8, False)}
    heads = [parameter for group in groups if group["lr_factor"] == 7 for parameter in group["params"]]
    assert {id(parameter) for parameter in heads} == {id(parameter) for parameter in state.model.fc.parameters()}


@pytest.mark.slow
def test_a_run_imports_neither_the_compiler_nor_sympy(small_run, few_images, monkeypatch):
    """Each takes a second or more, and only compiled networks need them."""
    for name in ("torch._dynamo", "torch.fx.experimental.symbolic_shapes"):
        monkeypatch.setitem(sys.modules, name, None)
    assert train(small_run(*ONE_EPOCH, "log.trackers=[]", f"data.root={few_images}")).step == 1


@pytest.mark.slow
def test_fine_tuning_starts_from_a_backbone_and_does_not_read_it_again(small_run, few_images, tmp_path, capsys):
    source = tmp_path / "imagenet.safetensors"
    backbone = build_model("resnest14_half", 1000, zero_gamma=False)
    save_checkpoint(backbone.state_dict(), source)
    # A step of almost nothing leaves the weights where they started.
    others = ("train.lr=1e-9", *ONE_EPOCH, "train.ema_decay=0.5", "log.trackers=[]", f"data.root={few_images}")
    options = (f"train.init_from={source}", "model.num_classes=10", *others)
    state = train(small_run(*options))
    torch.testing.assert_close(state.model.layer4[0].conv1.weight, backbone.layer4[0].conv1.weight)
    torch.testing.assert_close(state.ema.module.layer4[0].conv1.weight, backbone.layer4[0].conv1.weight)
    assert state.model.fc.out_features == 10
    assert f"starting from {source}, with a new classifier of 10 classes" in capsys.readouterr().out
    source.unlink()
    assert train(small_run(*options)).step == 1
    with pytest.raises(CheckpointError, match="trained with train.init_from=.*imagenet.safetensors, not null"):
        train(small_run(*others))

    again = small_run(*options, f"train.init_from={tmp_path}/run/checkpoints/best.pt", run="again")
    torch.testing.assert_close(train(again).model.fc.weight, state.ema.module.fc.weight)
    assert "best.pt, its classifier too" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("c++"), reason="torch.compile needs a C++ compiler on a CPU")
def test_a_compiled_run_has_the_plain_keys_and_resumes_bit_for_bit(tiny_run, tmp_path, capsys):
    """The real compiler, of the tiny network; that one of the zoo is compiled once is the next test's."""
    config = tiny_run("train.compile=true", "checkpoint.every_steps=4", "checkpoint.keep=9", *ONE_EPOCH)
    whole = train(config).state_dict(ALONE)
    assert re.search(r"^compiled in \d+ s$", capsys.readouterr().out, re.MULTILINE)
    assert whole["model"].keys() == TinyTask(config).build_model(True, CPU).state_dict().keys()
    saved = sorted((tmp_path / "run/checkpoints").glob("step-*.pt"))
    assert [path.stem for path in saved] == [f"step-{step:09}" for step in (4, 6)]
    saved[1].unlink()
    assert_equal(train(config).state_dict(ALONE), whole)
    assert "resuming after step 4" in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_is_compiled_once_before_its_first_step(small_run, few_images, graphs, tmp_path, monkeypatch):
    compiled = []

    def count_graphs(*args):
        compiled.append(graphs.frame_count)
        train_epoch(*args)

    monkeypatch.setattr(train_module, "train_epoch", count_graphs)
    options = (*ONE_EPOCH, "train.crop=48", "train.batch_size=8", "train.erasing=0.5", "log.trackers=[]")
    options += ("train.global_batch=16", "train.mixup_alpha=0.2", "train.cutmix_alpha=1.0", "train.dropblock=0.2")
    options += (f"data.root={few_images}", *write_start(tmp_path), "train.freeze=2", "train.drop_path=0.3")
    options += ("train.class_weights=balanced",)
    train(small_run("train.compile=true", "loader=dali", "train.precision=bf16", *options))
    assert (compiled, graphs.frame_count) == ([1], 1)


@pytest.mark.slow
def test_an_evaluation_that_is_not_finite_stops_the_run(small_run, tmp_path):
    """Losses are finite, with each batch's own statistics; those of evaluation have no square root."""
    model = build_model("resnest14_half", 10)
    torch.nn.init.constant_(model.bn1.running_var, -1e9)
    torch.save(model.state_dict(), tmp_path / "bare.pth")
    config = small_run(f"train.init_from={tmp_path}/bare.pth", *ONE_EPOCH, "train.global_batch=96")
    with pytest.raises(
        NonFiniteError, match=r"checker_0_00000\.JPEG: its logits are not finite in fp32, like .* 40 of 40"
    ):
        train(config)
    status = read_status(tmp_path / "run")
    assert (status["state"], status["exit_code"]) == ("failed", 5)
    assert not list((tmp_path / "run/checkpoints").iterdir())


def test_accumulated_gradients_are_the_mean_over_the_whole_batch(tiny_run):
    """Without batch norm, whose statistics are of one batch: a linear network, one step of 16 and of 2 x 8 samples."""
    weights = []
    for batch_size in (16, 8):
        config = tiny_run(f"train.batch_size={batch_size}", "train.global_batch=16", "train.warmup_epochs=0")
        task, plan, _ = prepare(config)
        plan = StepPlan(**{**vars(plan), "steps_per_epoch": 1})
        loader = task.build_loader(task.plan_batches(plan.accumulation, ALONE), ALONE)
        torch.manual_seed(0)
        network = nn.Linear(8, 2)
        state = TrainingState(network, config.train)
        initial = network.weight.detach().clone()
        with Health(state, config.train) as health:
            control = Control(ALONE, Watch(ALONE, 60, print), StopRequest(), health, Silent(), None, 1000)
            train_epoch(state, network, task, loader, plan, control)
        assert state.step == 1
        weights.append(network.weight.detach() - initial)
    assert weights[0].abs().max() > 1e-3
    torch.testing.assert_close(weights[0], weights[1], rtol=0, atol=1e-6)


class Silent:
    """A log that has nothing to report."""

    wants_samples = False

    def start_epoch(self, state):
        pass

    def is_due(self, state):
        return False

    def advance(self):
        pass


def test_trackers_show_the_batch_as_the_network_sees_it(small_run):
    """Sixteen images in a square, erased and mixed; and how classes are confused."""
    options = ("train.mean=[0.5,0.5,0.5]", "train.std=[0.2,0.2,0.2]", "loader=torchvision", "loader.workers=0")
    config = small_run("train.cutmix_alpha=1.0", "train.erasing=0.5", *options)
    task = open_task(config)
    loader = task.build_loader(task.plan_batches(6, ALONE), ALONE)
    images, labels = next(iter(loader.batches(0)))
    before, draws = images.clone(), Draws(0, 0, 0)
    sheet = task.show((images, labels), draws)()
    assert torch.equal(images, before)
    seen = []
    network = task.build_model(True, CPU)
    network.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].clone()))
    task.loss(network, (images, labels), draws)
    assert sheet.shape == (4 * 36, 4 * 36, 3) and not torch.equal(seen[0], before)
    from resnest_imagenet.data.loader import to_pixels

    for number, pixels in enumerate(to_pixels(seen[0], (127.5,) * 3, (51.0,) * 3)):
        top, left = number // 4 * 36 + 2, number % 4 * 36 + 2
        assert (sheet[top : top + 32, left : left + 32] == pixels).all()
    score = task.build_evaluation(ALONE)(network, lambda batch, is_everywhere: None)
    confusions = score.pictures["confusions"]()
    assert confusions.dtype.name == "uint8" and len({row.tobytes() for row in confusions}) > 50
    assert score.files.keys() == {"predictions.csv"}


def test_a_saver_describes_a_run_of_classification(small_run, tmp_path):
    from resnest_imagenet.training.run_folder import RunFolder

    config = small_run()
    task, plan, _ = prepare(config)
    saver = Saver.of(RunFolder(config.run_dir, 2, True), ALONE, task, plan, tick=lambda: None)
    assert (saver.metric, saver.description["task"]) == ("top1", "classification")
    assert len(saver.description["classes"]) == saver.description["config"]["model"]["num_classes"] == 10
    assert saver.identity["evaluation"] == "short side 37 bilinear, centre crop 32"
    assert saver.identity["training images"].startswith("103 ")
