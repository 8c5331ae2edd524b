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

ALL_EXPERIMENTS = {path.stem: path.read_text() for path in (find_conf() / "experiment").glob("*.yaml")}
OF_SCENES = {name for name, text in ALL_EXPERIMENTS.items() if "override /task: segmentation" in text}
EXPERIMENTS = {name: text for name, text in ALL_EXPERIMENTS.items() if name not in OF_SCENES}
RECIPES = {path.stem: path.read_text() for path in (find_conf() / "recipe").glob("*.yaml")}
PUBLISHED = sorted(name for name in RECIPES if not name.startswith("demo"))


@functools.cache
def compose_train(*overrides):
    return compose_config("train", TrainConfig, "data.root=/imagenet", *overrides)


def test_every_published_network_has_an_experiment_of_its_name():
    of_tables_5_to_7 = {"resnet50_msra", "resnet101_msra", "resnet50s", "resnet101s"}
    assert EXPERIMENTS.keys() - {"demo"} == set(list_models()) - {"resnest14_half"} - of_tables_5_to_7


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


@pytest.mark.parametrize("name", PUBLISHED)
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


DEEPLAB = {
    **{name: COMMON[name] for name in ("steps", "milestones", "step_factor", "warmup_steps", "compile")},
    **{name: COMMON[name] for name in ("warmup_start", "clip_norm", "clip_value", "max_skipped_steps", "betas", "eps")},
    "task": "segmentation", "optimizer": "sgd", "step_epochs": None, "init_from": None, "decay_biases": False,
    "ema_decay": None, "epochs": 120, "batch_size": 2, "global_batch": 16, "crop": 480, "base": 520,
    "scales": [0.5, 2.0],
    "schedule": "poly", "poly_power": 0.9, "lr": 0.01, "reference_batch": 16, "head_lr_factor": 10, "warmup_epochs": 0,
    "momentum": 0.9, "nesterov": False, "weight_decay": 1e-4, "decay_all": True, "output_stride": 8,
    "rates": [12, 24, 36], "head_channels": 256, "norm": "sync", "zero_gamma": True, "precision": "fp32",
}  # fmt: skip
FIGURES |= {
    "deeplab_gluon": {**DEEPLAB, "blur": 0.5, "auxiliary_weight": 0.5},
    "deeplab_encoding": {**DEEPLAB, "blur": 0, "auxiliary_weight": 0.2},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_figures_of_the_recipes(name):
    figures = FIGURES[name]
    task = ("task=segmentation", "protocol=whole") if figures["task"] == "segmentation" else ()
    assert compose_train(f"recipe={name}", *task).train.model_dump() == {"recipe": name, **figures}


# Table 7: mIoU and pixel accuracy on ADE20K, mIoU on Cityscapes; DOWNSTREAM's networks and their weights.
TABLE_7 = {
    "resnet50": ("ResNet-50", "resnet50s", "timm:resnet50s.gluon_in1k", "42.10", "80.39", "78.72"),
    "resnet101": ("ResNet-101", "resnet101s", "timm:resnet101s.gluon_in1k", "44.14", "81.11", "79.42"),
    "resnest50": ("ResNeSt-50", "resnest50", "official:resnest50", "45.12", "81.17", "79.87"),
    "resnest101": ("ResNeSt-101", "resnest101", "official:resnest101", "46.91", "82.07", "80.42"),
}


@pytest.mark.parametrize("kind", ["ade20k", "cityscapes"])
@pytest.mark.parametrize("network", TABLE_7)
@pytest.mark.slow
def test_a_row_of_table_7_says_what_it_trains_and_how(network, kind):
    title, model, init_from, ade20k, accuracy, cityscapes = TABLE_7[network]
    name = f"deeplabv3_{network}_{kind}"
    config, text = compose_train(f"+experiment={name}"), ALL_EXPERIMENTS[name]
    sizes = {"ade20k": (120, 480, 520), "cityscapes": (240, 768, 2048)}[kind]
    assert (config.model.name, config.train.init_from, config.run_dir) == (model, init_from, f"runs/{name}")
    assert (config.train.recipe, config.data.kind, config.protocol.name) == ("deeplab_gluon", kind, "whole")
    assert (config.train.epochs, config.train.crop, config.train.base) == sizes
    expected = f"{ade20k} %, pixel accuracy {accuracy} %" if kind == "ade20k" else f"{cityscapes} %"
    assert f"# DeepLabV3 with {title} on " in text and f"\n# Expected: mIoU {expected} (the paper" in text
    assert f"\n#   resnest-train +experiment={name} data.root=/" in text and "\n# Hardware: " in text
    assert f"\n#   resnest-eval ckpt=runs/{name}/checkpoints/best.pt data.root=/" in text


def test_every_row_of_table_7_has_an_experiment():
    rows = {f"deeplabv3_{network}_{kind}" for network in TABLE_7 for kind in ("ade20k", "cityscapes")}
    assert rows | {"demo_segmentation"} == OF_SCENES


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
