"""The recipe of a task, and what becomes of recipes that earlier versions wrote."""

from typing import ClassVar

import pytest
from hydra import compose, initialize_config_dir

from conftest import compose_config
from resnest_imagenet import extensions
from resnest_imagenet.commands.launch import check_config, find_conf
from resnest_imagenet.config import TrainConfig
from resnest_imagenet.config_data import PreviewDataConfig
from resnest_imagenet.earlier import upgrade_identity, upgrade_recipe
from resnest_imagenet.errors import ConfigError
from resnest_imagenet.options import Positive
from resnest_imagenet.recipe import (
    ClassificationEvalOptions,
    ClassificationRecipe,
    EvalOptions,
    Recipe,
)
from resnest_imagenet.schemas import RECIPES, option_names

# As the version before train.task wrote recipe=sknet into checkpoints and config.yaml.
BEFORE = {
    "recipe": "sknet", "epochs": 100, "batch_size": 32, "global_batch": 256, "crop": 224, "min_crop_area": 0.08,
    "cropping": "random_resized", "antialias": True, "interpolation": "bilinear", "policy": "rotation", "jitter": 0.0,
    "lighting": 0.0, "pixel_shift": 20.0, "erasing": 0.0, "schedule": "step", "step_epochs": 30, "step_factor": 0.1,
    "lr_per_256": 0.1, "warmup_epochs": 0.0, "momentum": 0.9, "nesterov": False, "weight_decay": 0.0001,
    "decay_all": True, "label_smoothing": 0.1, "mixup_alpha": 0.0, "cutmix_alpha": 0.0, "mixup_per_sample": False,
    "mixup_partner": "reversed", "dropout": 0.0, "dropblock": 0.0, "init": "fan_out", "init_from": None,
    "zero_gamma": False, "ema_decay": None, "precision": "fp32", "compile": False, "max_skipped_steps": 0,
}  # fmt: skip


def test_a_recipe_of_before_is_todays_under_todays_names():
    now = compose_config("train", TrainConfig, "data.root=/x", "recipe=sknet").train
    assert upgrade_recipe(BEFORE) == now.model_dump()
    assert upgrade_recipe(now.model_dump()) == now.model_dump()
    assert ClassificationRecipe.model_validate(upgrade_recipe(BEFORE)) == ClassificationRecipe(**now.model_dump())


def test_the_values_of_a_newer_recipe_stay():
    options = ("train.optimizer=lamb", "train.lr=0.3", "train.reference_batch=512", "train.clip_norm=1")
    now = compose_config("train", TrainConfig, "data.root=/x", *options).train.model_dump()
    assert upgrade_recipe(now) == now


def test_an_identity_of_before_is_todays():
    def identify(recipe):
        options = {f"train.{name}": value for name, value in recipe.items() if name not in ("recipe", "batch_size")}
        return {"model.name": "resnest50", **options, "seed": 0}

    now = compose_config("train", TrainConfig, "data.root=/x", "recipe=sknet").train
    assert upgrade_identity(identify(BEFORE)) == identify(now.model_dump())


def test_the_recipe_and_the_evaluation_are_the_tasks():
    for name, schema, options in (
        ("train", TrainConfig, ()),
        ("data_preview", PreviewDataConfig, ("out=x.png",)),
    ):
        config = compose_config(name, schema, "data.root=/x", *options)
        assert isinstance(config, schema)
        assert isinstance(config.train, ClassificationRecipe) and isinstance(config.eval, ClassificationEvalOptions)
        assert (config.train.task, config.eval.crop, config.eval.every_epochs) == ("classification", 224, 1)


class PairsEvalOptions(EvalOptions):
    pairs: Positive


class PairsRecipe(Recipe):
    EVAL_OPTIONS: ClassVar = PairsEvalOptions

    distance: Positive


@pytest.fixture
def compose_pairs(tmp_path, monkeypatch):
    """Compose a run of another package's task, whose values stand in a folder of its own."""
    monkeypatch.setattr(extensions, "tasks", extensions.Registry("task"))
    extensions.tasks.reserve(RECIPES)
    extensions.register_task("pairs", print, PairsRecipe)
    head = "# @package _global_\n"
    (tmp_path / "task").mkdir()
    (tmp_path / "task/pairs.yaml").write_text(f"{head}train:\n  task: pairs\n  distance: 3\neval:\n  pairs: 9\n")
    values = {"recipe": "pairs", "epochs": 3, "batch_size": 1, "global_batch": "null", "schedule": "cosine"}
    values |= {"lr": 0.1, "warmup_epochs": 0, "momentum": 0.9, "nesterov": "false", "weight_decay": 0}
    values |= {"decay_all": "false", "ema_decay": "null", "precision": "fp32"}
    (tmp_path / "recipe").mkdir()
    text = "".join(f"{name}: {value}\n" for name, value in values.items())
    head = "# @package train\ndefaults:\n  - override /task@_global_.task: pairs\n\n"
    (tmp_path / "recipe/pairs.yaml").write_text(head + text)

    def make(*overrides):
        with initialize_config_dir(str(find_conf()), version_base="1.3"):
            words = [f"hydra.searchpath=[file://{tmp_path}]", "recipe=pairs", "data.root=/x", *overrides]
            return check_config(compose("train", words), TrainConfig)

    return make


def test_a_task_of_another_package_has_options_of_its_own(compose_pairs):
    config = compose_pairs("train.distance=5", "eval.every_epochs=2", "train.batch_size=1")
    assert isinstance(config.train, PairsRecipe)
    assert (config.train.distance, config.eval.pairs, config.eval.every_epochs) == (5, 9, 2)
    assert {"train.distance", "eval.pairs", "train.crop"} <= set(option_names(TrainConfig))
    for word, message in {
        "train.distance=0": "train.distance=0: input should be greater than or equal to 1",
        "+train.distanc=1": "unknown option train.distanc; did you mean 'train.distance'",
        "+train.crop=32": "unknown option train.crop",
        "+eval.crop=32": "unknown option eval.crop",
        "train.task=pears": r"unknown train.task 'pears'; did you mean 'pairs'\? \(classification, .*, pairs\)",
    }.items():
        with pytest.raises(ConfigError, match=f"^{message}"):
            compose_pairs(word)
