"""The recipes and experiments: complete, sourced, and true to the tables they come from."""

import functools
import re
from typing import get_args

import pytest

from conftest import compose_config
from resnest_imagenet import list_models
from resnest_imagenet.commands.launch import find_conf
from resnest_imagenet.config import TrainConfig
from resnest_imagenet.data.augment import POLICIES
from resnest_imagenet.recipe import ClassificationRecipe
from resnest_imagenet.reports.table3 import PAPER

EXPERIMENTS = {path.stem: path.read_text() for path in (find_conf() / "experiment").glob("*.yaml")}
RECIPES = {path.stem: path.read_text() for path in (find_conf() / "recipe").glob("*.yaml")}


@functools.cache
def compose_train(*overrides):
    return compose_config("train", TrainConfig, "data.root=/imagenet", *overrides)


def test_every_published_network_has_an_experiment_of_its_name():
    assert EXPERIMENTS.keys() - {"demo"} == set(list_models()) - {"resnest14_half"}


@pytest.mark.parametrize("name", sorted(EXPERIMENTS.keys() - {"demo"}))
@pytest.mark.slow
def test_an_experiment_trains_its_model_and_says_how(name):
    config = compose_train(f"+experiment={name}")
    assert config.model.name == name
    text = EXPERIMENTS[name]
    assert f"\n#   resnest-train +experiment={name} data.root=/imagenet\n" in text
    assert f"\n#   resnest-eval ckpt=runs/{name}/checkpoints/best.pt data.root=/imagenet crop=" in text
    assert "\n# Hardware: " in text
    (row,) = [row for row in PAPER if row.model == name] or [None]
    if row is None:
        assert "not in table 3." in text
        assert re.search(r"\n# Expected top-1: \d\d\.\d\d % at \d{3} \(", text)
    else:
        assert f"# {row.name} of table 3: {row.parameters} M parameters, {row.gflops:.3g}" in text.replace(
            "8.0 G", "8 G"
        )
        assert f"\n# Expected top-1: {row.top1[224]:.2f} % at 224, {row.top1[320]:.2f} % at 320 (the paper)." in text


BEHIND = {"resnet": "torchvision_v1", "resnext": "sknet", "seresnext": "sknet", "skresnext": "sknet"}


@pytest.mark.parametrize("row", PAPER, ids=lambda row: row.name)
@pytest.mark.slow
def test_a_row_has_the_recipe_behind_its_number(row):
    family = re.match("[a-z]+", row.model)[0]
    expected = "bag_of_tricks" if row.model.endswith("d") and family == "resnet" else BEHIND.get(family, "resnest")
    expected += "101" if row.model.startswith("resnest101") else ""
    assert compose_train(f"+experiment={row.model}").train.recipe == expected


@pytest.mark.slow
def test_one_recipe_for_all_models_is_one_override():
    runs = [compose_train(f"+experiment={name}", "recipe=sknet").train for name in EXPERIMENTS.keys() - {"demo"}]
    assert runs
    assert set(map(str, runs)) == {str(compose_train("recipe=sknet").train)}


@pytest.mark.parametrize("name", sorted(RECIPES.keys() - {"demo"}))
def test_every_value_of_a_recipe_has_a_comment(name):
    lines = RECIPES[name].splitlines()
    assert f"recipe: {name}" in lines
    values = [line for line in lines if line and not line.startswith(("#", "recipe:", "defaults:", "  - "))]
    assert values and all(re.fullmatch(r"\w+: \S+ # \S.+", line) for line in values)


COMMON = {"momentum": 0.9, "weight_decay": 1e-4, "lr": 0.1, "crop": 224, "dropout": 0, "ema_decay": None}
COMMON |= {"step_factor": 0.1, "mixup_per_sample": False, "init_from": None, "compile": False}
COMMON |= {"max_skipped_steps": 0, "task": "classification", "optimizer": "sgd", "decay_biases": False}
COMMON |= {"steps": None, "milestones": None, "warmup_steps": None, "warmup_start": 0, "reference_batch": 256}
COMMON |= {"head_lr_factor": 1, "clip_norm": None, "clip_value": None}
COMMON |= {"poly_power": 0.9, "betas": [0.9, 0.999], "eps": 1e-8}  # of no recipe here
COMMON |= {"cropping": "random_resized", "interpolation": "bilinear", "policy": None, "jitter": 0, "lighting": 0}
COMMON |= {"pixel_shift": 0, "erasing": 0, "cutmix_alpha": 0}
COSINE = {**COMMON, "schedule": "cosine", "step_epochs": None, "warmup_epochs": 5, "decay_all": False}
COSINE |= {"label_smoothing": 0.1, "mixup_alpha": 0.2, "zero_gamma": True, "jitter": 0.4, "lighting": 0.1}
GLUON = {**COSINE, "nesterov": True, "mixup_partner": "reversed", "init": "fan_in", "antialias": False}
GLUON |= {"min_crop_area": 0.08}
STEPS = {**COMMON, "schedule": "step", "step_epochs": 30, "warmup_epochs": 0, "decay_all": True, "nesterov": False}
STEPS |= {"mixup_alpha": 0, "mixup_partner": "reversed", "zero_gamma": False, "init": "fan_out", "dropblock": 0}
STEPS |= {"batch_size": 32, "global_batch": 256, "min_crop_area": 0.08, "antialias": True, "precision": "fp32"}
RESNEST = {
    **GLUON,
    "policy": "resnest",
    "epochs": 270,
    "dropblock": 0.1,
    "precision": "fp32",
    "batch_size": 128,
    "global_batch": 8192,
}
# Whole recipes, typed from their sources a second time.
FIGURES = {
    "resnest": RESNEST,
    "resnest14": {**RESNEST, "global_batch": 1024, "dropblock": 0},
    "resnest26": {**RESNEST, "global_batch": 1024},
    "resnest101": {**RESNEST, "batch_size": 64, "global_batch": 4096},
    "resnest200": {**RESNEST, "batch_size": 32, "global_batch": 2048, "crop": 256, "dropout": 0.2},
    "resnest269": {
        **RESNEST, "batch_size": 32, "global_batch": 2048, "crop": 320, "dropout": 0.2, "cropping": "erandom",
        "min_crop_area": 0.1, "interpolation": "bicubic", "antialias": True,
    },
    "resnest_torch": {
        **COSINE, "epochs": 270, "batch_size": 32, "global_batch": 2048, "min_crop_area": 0.1, "nesterov": False,
        "mixup_partner": "permuted", "init": "fan_out", "dropblock": 0, "antialias": True, "precision": "fp32",
        "policy": "resnest_torch", "cropping": "erandom",
    },
    "bag_of_tricks": {
        **GLUON, "epochs": 200, "dropblock": 0, "precision": "fp16", "batch_size": 128, "global_batch": 1024,
    },
    "torchvision_v1": {**STEPS, "epochs": 90, "label_smoothing": 0},
    "sknet": {**STEPS, "epochs": 100, "label_smoothing": 0.1, "policy": "rotation", "pixel_shift": 20},
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(RECIPES.keys() - {"demo"}))
def test_figures_of_the_recipes(name):
    assert compose_train(f"recipe={name}").train.model_dump() == {"recipe": name, **FIGURES[name]}


@pytest.mark.parametrize(
    ("name", "crop"), [("resnest14", 224), ("resnest26", 224), ("resnest200", 320), ("resnest269", 416)]
)
def test_the_rest_of_the_family_is_evaluated_at_its_published_crop(name, crop):
    config = compose_train(f"+experiment={name}")
    assert (config.train.recipe, config.eval.crop) == (name, crop)


def test_the_schema_names_every_policy():
    (names,) = [
        each for each in get_args(ClassificationRecipe.model_fields["policy"].annotation) if each is not type(None)
    ]
    assert set(get_args(names)) == POLICIES.keys()
