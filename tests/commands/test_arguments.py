"""Words of the command line that are not options of this project: one line, which says what to type instead."""

import shlex

import pytest

from resnest_imagenet.commands import data, train
from resnest_imagenet.commands.arguments import FLAGS, Vocabulary, list_files_of_groups, refuse_words
from resnest_imagenet.commands.launch import find_conf
from resnest_imagenet.commands.synonyms import ADVICE, SYNONYMS, normalise
from resnest_imagenet.config import TrainConfig
from resnest_imagenet.config_data import CheckDataConfig, PrepareDataConfig
from resnest_imagenet.config_reading import (
    CompareConfig,
    EvalConfig,
    ExplainConfig,
    ExportConfig,
    InfoConfig,
    PredictConfig,
    ReportConfig,
    TablesConfig,
)
from resnest_imagenet.errors import ConfigError

CHOICES = list_files_of_groups(find_conf(), [])
SCHEMAS = {
    "train": TrainConfig,
    "eval": EvalConfig,
    "predict": PredictConfig,
    "compare": CompareConfig,
    "explain": ExplainConfig,
    "export": ExportConfig,
    "report": ReportConfig,
    "tables": TablesConfig,
    "info": InfoConfig,
    "check": CheckDataConfig,
    "prepare": PrepareDataConfig,
}
VOCABULARIES = {name: Vocabulary(schema, CHOICES) for name, schema in SCHEMAS.items()}
WRONG = [
    # flags
    ("train --epochs 10", "--epochs 10: write train.epochs=10"),
    ("train --epochs=10", "--epochs=10: write train.epochs=10"),
    ("train --train.epochs 10", "--train.epochs 10: write train.epochs=10"),
    ("train --data /x", "--data /x: write data.root=/x"),
    ("train data.root=/x --resume x", "--resume x: a run resumes by the same command: write run_dir=... if "),
    ("train resume=true", "unknown option resume: a run resumes by the same command: write run_dir=... if "),
    ("report runs=a --out x.html", "--out x.html: write out=x.html"),
    ("train -j 8", "-j 8: write loader.workers=8"),
    ("train --batch-size 64", "--batch-size 64: write train.batch_size=64"),
    ("predict --batch-size 64", "--batch-size 64: write batch_size=64"),
    ("train --lr 0.1 --wd 1e-4", "--lr 0.1: write train.lr=0.1"),
    ("train --accum-steps 4", "--accum-steps 4: a step accumulates up to train.global_batch=... images, in passes of "),
    ("train --amp", "--amp: write train.precision=bf16"),
    ("eval --amp", "--amp: write precision=bf16"),
    ("train --dry-run", "--dry-run: write dry_run=true"),
    ("train --nesterov seed=1", "--nesterov: write train.nesterov=true"),
    ("train --device", "--device: write device=..."),
    ("train --arch resnet50", "--arch resnet50: write model=resnet50"),
    ("train --model resnet50", "--model resnet50: write model=resnet50"),
    ("train --config resnest50", "--config resnest50: write +experiment=resnest50"),
    ("predict --weights a.pt", "--weights a.pt: write ckpt=a.pt"),
    (
        "train --pretrained official:resnest50",
        "--pretrained official:resnest50: write train.init_from=official:resnest50",
    ),
    ("train --gpus 8", "--gpus 8: start as many processes: torchrun --nproc-per-node 8 -m resnest_imagenet."),
    ("train --data '/my photos'", "--data /my photos: write 'data.root=/my photos'"),
    ("train --multi", "unknown option --multi: write --multirun"),
    ("train --foo 3", "unknown option --foo: options are written name=value, see --help"),
    # the field's names
    ("train lr=0.1", "unknown option lr: write train.lr=0.1"),
    ("train +lr=0.1", "unknown option lr: write train.lr=0.1"),
    ("train train.lr0=0.1", "unknown option train.lr0: write train.lr=0.1"),
    ("train learning_rate=0.1", "unknown option learning_rate: write train.lr=0.1"),
    ("train optimizer=adamw", "unknown option optimizer: write train.optimizer=adamw"),
    ("train train.opt=adamw", "unknown option train.opt: write train.optimizer=adamw"),
    ("train epochs=3", "unknown option epochs: write train.epochs=3"),
    ("train batch_size=3", "unknown option batch_size: write train.batch_size=3"),
    ("train data_dir=/x", "unknown option data_dir: write data.root=/x"),
    ("predict data_dir=/x", "unknown option data_dir: write images=/x"),
    ("train num_classes=3", "unknown option num_classes: write model.num_classes=3"),
    ("train patience=3", "unknown option patience: write train.patience=3"),
    ("train early_stopping=3", "unknown option early_stopping: write train.patience=3"),
    ("train ema=true", "unknown option ema: write train.ema_decay=0.9999"),
    ("train ema=false", "unknown option ema: write train.ema_decay=null"),
    ("train ema=0.99", "unknown option ema: write train.ema_decay=0.99"),
    ("train --model-ema", "--model-ema: write train.ema_decay=0.9999"),
    ("train mixup=true", "unknown option mixup: write train.mixup_alpha=0.2"),
    ("eval imgsz=224", "unknown option imgsz: write crop=224"),
    # values without an option
    ("train /imagenet", "/imagenet: write data.root=/imagenet"),
    ("check /imagenet", "/imagenet: write data.root=/imagenet"),
    ("prepare /downloads", "/downloads: write archives=/downloads"),
    ("tables runs/a runs/b", "runs/a runs/b: write 'results=[runs/a,runs/b]'"),
    ("info resnest50", "resnest50: write model=resnest50"),
    ("train resnest50", "resnest50: write model=resnest50"),
    ("train demo_detection", "demo_detection: write recipe=demo_detection"),
    ("export official:resnest50", "official:resnest50: write ckpt=official:resnest50"),
    ("predict runs/a/best.pt photos/", "runs/a/best.pt photos/: write ckpt=runs/a/best.pt images=photos/"),
    ("compare a.pt b.pt images=x", "a.pt b.pt: write 'ckpt=[a.pt,b.pt]'"),
    ("train data.root", "data.root has no value: write data.root=..."),
    ("train what", "cannot read 'what': options are written name=value, see --help"),
    # spaces
    ("train train.epochs = 3", "no spaces around =: write train.epochs=3"),
    ("train train.epochs =3", "no spaces around =: write train.epochs=3"),
    ("train train.epochs= 3", "no spaces around =: write train.epochs=3"),
    ("eval crop=[224, 320] ckpt=a", "no spaces in a list: write crop=[224,320]"),
    ("eval crop=[ 224 320 ]", "no spaces in a list: write crop=[224,320]"),
    # paths in the place of names
    ("train data=data/demo", "data is the kind of data, not its folder: write data.root=data/demo"),
    ("check data=data/demo", "data is the kind of data, not its folder: write data.root=data/demo"),
    ("eval model=best.pt", "model does not take a file of weights: write ckpt=best.pt"),
    ("eval weights=best.pt", "weights does not take a file of weights: write ckpt=best.pt"),
]
RIGHT = [
    "train data.root=/x train.epochs=3 +experiment=demo ~train.lr hydra.verbose=true",
    "train train.init_from= data.root=/x",
    "train --help",
    "train --cfg job --config-dir /own --package train",
    "train --config-dir=/own -m seed=1,2 hydra/sweeper=optuna",
    "eval ckpt=a crop=[224,320] '~model'",
    "eval ckpt=a 'crop=[224, 320]'",
    "predict images=[a,b] ckpt=x",
    # what is explained as well after Hydra has composed
    "train modle=resnest50 trian.epochs=3 train.epoch=3 model=resnest_50",
]


def split(line):
    command, *words = shlex.split(line)
    return words, VOCABULARIES[command]


@pytest.mark.parametrize(("line", "message"), WRONG)
def test_a_wrong_use_says_what_to_type_instead(line, message):
    with pytest.raises(ConfigError) as error:
        refuse_words(*split(line))
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


@pytest.mark.parametrize(("line", "message"), WRONG)
def test_the_advice_itself_is_not_refused(line, message):
    _, write, advice = message.partition("write ")
    if write and "..." not in advice:
        refuse_words(shlex.split(advice), split(line)[1])


@pytest.mark.parametrize("line", RIGHT)
def test_what_hydra_reads_is_left_to_it(line):
    refuse_words(*split(line))


def test_a_path_that_is_there_is_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    (tmp_path / "run/checkpoints/best.pt").touch()
    with pytest.raises(ConfigError, match=r"^run photos: write ckpt=run images=photos$"):
        refuse_words(*split("predict run photos"))


@pytest.mark.parametrize("flag", [["--config-dir", "OWN"], ["-cd", "OWN"], ["--config-dir=OWN"]])
def test_a_folder_of_the_users_own_has_choices_too(flag, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own/data").mkdir(parents=True)
    (tmp_path / "own/data/photos.yaml").touch()
    (tmp_path / "photos").mkdir()
    words = [*(word.replace("OWN", "own") for word in flag), "data=photos"]
    refuse_words(words, Vocabulary(TrainConfig, list_files_of_groups(find_conf(), words)))
    with pytest.raises(ConfigError, match=r"write data\.root=photos$"):
        refuse_words(["data=photos"], VOCABULARIES["train"])


def test_many_words_are_not_all_repeated():
    with pytest.raises(ConfigError) as error:
        refuse_words([f"photos/{number}.jpg" for number in range(50)], VOCABULARIES["predict"])
    first = [f"photos/{number}.jpg" for number in range(4)]
    assert str(error.value) == f"{' '.join(first)} ...: write 'images=[{','.join(first)},...]'"


def test_the_tables_name_options_that_there_are():
    options = {option for vocabulary in VOCABULARIES.values() for option in vocabulary.options} | CHOICES.keys()
    for word, meant in SYNONYMS.items():
        assert normalise(word) == word and word not in ADVICE
        assert {option.partition("=")[0].lstrip("+") for option in meant} <= options, word
    assert all(normalise(word) == word for word in ADVICE)


def test_the_flags_are_hydras():
    from hydra._internal.utils import get_args_parser

    of_hydra = {
        flag: action.nargs != 0
        for action in get_args_parser()._actions
        for flag in action.option_strings
        if flag != "--version"  # ours
    }
    assert of_hydra == FLAGS


@pytest.mark.parametrize("flag", ["--version", "-V"])
def test_the_version_names_what_results_depend_on(flag, monkeypatch, capsys):
    for command, first in ((train, "resnest-train"), (data, "resnest-data")):
        monkeypatch.setattr("sys.argv", [first, flag])
        command.main()
        line = capsys.readouterr().out
        assert line.count("\n") == 1
        import torch

        assert line.startswith("resnest-imagenet 0.") and f", torch {torch.__version__.partition('+')[0]}" in line
        assert all(f", {name} " in line for name in ("torchvision", "DALI", "timm", "Python"))


def test_the_demo_of_another_task_is_named_for_its_options(tmp_path, monkeypatch, capsys):
    for words, line in (
        (["train_scenes=2"], "resnest-data: train_scenes is of task=segmentation: add task=segmentation"),
        (["val_images=2"], "resnest-data: val_images is of task=detection: add task=detection"),
        (["task=detection", "train_per_class=2"], "train_per_class is of task=classification: add task=classification"),
    ):
        monkeypatch.setattr("sys.argv", ["resnest-data", "demo", f"out={tmp_path / 'x'}", *words])
        with pytest.raises(SystemExit, match="2"):
            data.main()
        assert line in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
