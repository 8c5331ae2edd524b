"""The recipes and experiments: complete, sourced, and true to the tables they come from."""

import re

import pytest

from conftest import compose_config
from resnest_imagenet import list_models
from resnest_imagenet.commands.launch import find_conf
from resnest_imagenet.config import TrainConfig
from resnest_imagenet.evaluation.table3 import PAPER

EXPERIMENTS = {path.stem: path.read_text() for path in (find_conf() / "experiment").glob("*.yaml")}
RECIPES = {path.stem: path.read_text() for path in (find_conf() / "recipe").glob("*.yaml")}


def compose_train(*overrides):
    return compose_config("train", TrainConfig, "data.root=/imagenet", *overrides)


def test_every_published_network_has_an_experiment_of_its_name():
    assert EXPERIMENTS.keys() - {"demo"} == set(list_models()) - {"resnest14_half"}


@pytest.mark.parametrize("name", sorted(EXPERIMENTS.keys() - {"demo"}))
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
def test_a_row_has_the_recipe_behind_its_number(row):
    family = re.match("[a-z]+", row.model)[0]
    expected = "bag_of_tricks" if row.model.endswith("d") and family == "resnet" else BEHIND.get(family, "resnest")
    assert compose_train(f"+experiment={row.model}").train.recipe == expected


def test_one_recipe_for_all_rows_is_one_override():
    """Apart from the ResNeSt-101s, whose global batch in the paper is half."""
    runs = {row.model: compose_train(f"+experiment={row.model}", "recipe=resnest").train for row in PAPER}
    for name in ("resnest101", "resnest101_fast"):
        assert (runs[name].batch_size, runs[name].global_batch) == (64, 4096)
        runs[name] = runs[name].model_copy(update={"batch_size": 128, "global_batch": 8192})
    assert len(set(map(str, runs.values()))) == 1


@pytest.mark.parametrize("name", sorted(RECIPES.keys() - {"demo"}))
def test_every_value_of_a_recipe_has_a_source(name):
    lines = RECIPES[name].splitlines()
    assert f"recipe: {name}" in lines
    values = [line for line in lines if not line.startswith(("#", "recipe:"))]
    assert len(values) > 15
    assert all(re.fullmatch(r"\w+: \S+ # \S.+", line) for line in values)


# FACTS of the recipes, as (recipe, options).
FIGURES = {
    "resnest": {"epochs": 270, "global_batch": 8192, "nesterov": True, "mixup_alpha": 0.2, "dropblock": 0.1},
    "resnest_torch": {"epochs": 270, "global_batch": 2048, "nesterov": False, "mixup_partner": "permuted"},
    "bag_of_tricks": {"epochs": 200, "global_batch": 1024, "nesterov": True, "mixup_alpha": 0.2, "zero_gamma": True},
    "torchvision_v1": {"epochs": 90, "global_batch": 256, "label_smoothing": 0, "decay_all": True, "step_epochs": 30},
    "sknet": {"epochs": 100, "global_batch": 256, "label_smoothing": 0.1, "mixup_alpha": 0, "step_epochs": 30},
}


@pytest.mark.parametrize("name", FIGURES)
def test_figures_of_the_recipes(name):
    recipe = compose_train(f"recipe={name}").train
    assert {key: getattr(recipe, key) for key in FIGURES[name]} == FIGURES[name]
    assert (recipe.momentum, recipe.weight_decay, recipe.lr_per_256, recipe.crop) == (0.9, 1e-4, 0.1, 224)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnest14", {"global_batch": 1024, "dropblock": 0, "crop": 224}),
        ("resnest26", {"global_batch": 1024, "dropblock": 0.1, "crop": 224}),
        ("resnest200", {"global_batch": 2048, "dropout": 0.2, "crop": 256}),
        ("resnest269", {"global_batch": 2048, "dropout": 0.2, "crop": 320}),
    ],
)
def test_figures_of_the_rest_of_the_family(name, expected):
    config = compose_train(f"+experiment={name}")
    assert {key: getattr(config.train, key) for key in expected} == expected
    assert config.eval.crop == {"resnest200": 320, "resnest269": 416}.get(name, 224)
