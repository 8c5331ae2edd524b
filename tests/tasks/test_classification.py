import shutil

import pytest

from conftest import compose_config, evaluate_checkpoint, newest_checkpoint
from resnest_imagenet.checkpoint import load_checkpoint, save_checkpoint
from resnest_imagenet.commands.compare import compare_networks
from resnest_imagenet.config import TrainConfig
from resnest_imagenet.config_reading import CompareConfig, EvalConfig
from resnest_imagenet.data.parts import ClassifiedData
from resnest_imagenet.errors import CheckpointError
from resnest_imagenet.tasks.choice import open_task
from resnest_imagenet.tasks.classification import dropblock_probability
from resnest_imagenet.training.dry_run import describe_run
from resnest_imagenet.training.train import train
from run_files import assert_equal


def test_dropblock_rises_linearly_to_the_last_epoch():
    recipe = compose_config("train", TrainConfig, "recipe=resnest", "data.root=/imagenet").train
    assert [dropblock_probability(recipe, epoch) for epoch in (0, 134, 269)] == pytest.approx([0.1 / 270, 0.05, 0.1])


@pytest.mark.slow
def test_a_run_keeps_its_own_images_for_validation(small_run, demo_images, tmp_path, capsys):
    """resnest-eval measures these, by default; another share is another run; so is a run of before the option."""
    folder = f"data.root={demo_images / 'train'}"
    options = (folder, "data.val_split=0.3", "data.split_seed=5", "train.epochs=1", "train.warmup_epochs=0")
    config = small_run(*options)
    score = train(config).best
    evaluate = compose_config("eval", EvalConfig, folder, f"ckpt={tmp_path / 'run'}", "device=cpu", "loader.workers=0")
    capsys.readouterr()
    (result,) = evaluate_checkpoint(evaluate)
    expected = ClassifiedData("folder", str(demo_images / "train"), val_split=0.3, split_seed=5).open_part("val")
    assert (result.top1, result.count) == (score, len(expected)) and 25 < result.count < 35
    ckpt = tmp_path / "run/checkpoints/best.pt"
    assert capsys.readouterr().err == (
        f"{ckpt}: as in its run, {result.count} images of {demo_images}/train by data.val_split=0.3 data.split_seed=5\n"
    )
    everything = evaluate.model_copy(update={"data": evaluate.data.model_copy(update={"val_dir": "."})})
    assert evaluate_checkpoint(everything)[0].count == 103
    both = (f"ckpt=[{ckpt},{ckpt}]", "device=cpu", "loader.workers=0")
    assert len(compare_networks(compose_config("compare", CompareConfig, folder, *both)).images) == result.count
    assert "by data.val_split=0.3 data.split_seed=5, read by" in describe_run(config)
    for option, was, now in (("data.val_split=0.2", "0.3", "0.2"), ("data.split_seed=6", "5", "6")):
        with pytest.raises(CheckpointError, match=rf"trained with {option.partition('=')[0]}={was}, not {now}"):
            train(small_run(*options, option))
    with pytest.raises(CheckpointError, match=r"data.val_split=0.3, not null; data.split_seed=5, not null; "):
        train(small_run())


@pytest.mark.slow
def test_a_run_of_before_there_were_splits_resumes(small_run, tmp_path, capsys):
    train(small_run("train.epochs=1", "train.warmup_epochs=0"))
    newest = newest_checkpoint(tmp_path / "run")
    saved = load_checkpoint(newest)
    for name in ("csv", "val_split", "split_seed"):
        del saved["config"]["data"][name]
        saved["identity"].pop(f"data.{name}", None)
    save_checkpoint(saved, newest)
    capsys.readouterr()
    train(small_run("train.epochs=1", "train.warmup_epochs=0"))
    assert "nothing to do" in capsys.readouterr().out


def test_copies_of_training_images_are_reported(small_run, demo_images, tmp_path, capsys):
    shutil.copytree(demo_images, tmp_path / "copied")
    for name in ("disk/new.jpg", "ring/new.jpg"):
        original = min((demo_images / "train" / name).parent.iterdir())
        shutil.copy(original, tmp_path / "copied/val" / name)
    open_task(small_run(f"data.root={tmp_path / 'copied'}"))
    assert capsys.readouterr().err.startswith("WARNING: 2 of 42 val images are training images too (")
    open_task(small_run())
    assert capsys.readouterr().err == ""


@pytest.mark.slow
def test_a_list_of_the_same_images_is_the_same_run(small_run, demo_images, tmp_path):
    """data=csv of the folders' images: equal weights, bit for bit."""
    rows = ["part,label,path"]
    for file in sorted(demo_images.rglob("*.JPEG")):
        part, label, _ = file.relative_to(demo_images).parts
        rows.append(f"{part},{label},{file.relative_to(demo_images)}")
    (tmp_path / "mine.csv").write_text("\n".join(rows))
    short = ("train.epochs=1", "train.warmup_epochs=0", "loader=torchvision")
    listed = train(small_run(*short, "data=csv", f"data.csv={tmp_path / 'mine.csv'}", run="list"))
    folders = train(small_run(*short, run="folders"))
    assert_equal(listed.model.state_dict(), folders.model.state_dict())
    assert listed.best == folders.best
    evaluate = compose_config(
        "eval", EvalConfig, f"data.root={demo_images}", "data=csv", f"ckpt={tmp_path / 'list'}", "device=cpu"
    )
    assert evaluate_checkpoint(evaluate)[0].top1 == listed.best  # the run's own list, without data.csv
