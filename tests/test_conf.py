"""The recipes and experiments: complete, sourced, and true to the tables they come from."""

import functools
import re
from typing import get_args

import pytest
import yaml

from conftest import compose_config
from resnest_imagenet import list_models
from resnest_imagenet.commands.launch import find_conf
from resnest_imagenet.config import TrainConfig
from resnest_imagenet.config_data import PreviewDataConfig
from resnest_imagenet.data.augment import POLICIES
from resnest_imagenet.errors import ConfigError
from resnest_imagenet.recipe import ClassificationRecipe, DetectionRecipe
from resnest_imagenet.reports.table3 import PAPER
from resnest_imagenet.schemas import RECIPE_NAMES
from resnest_imagenet.training.schedule import plan_steps

ALL_EXPERIMENTS = {path.stem: path.read_text() for path in (find_conf() / "experiment").glob("*.yaml")}
OF_SCENES = {name for name, text in ALL_EXPERIMENTS.items() if "override /task: segmentation" in text}
OF_OBJECTS = {name for name, text in ALL_EXPERIMENTS.items() if "override /task: detection" in text}
EXPERIMENTS = {name: text for name, text in ALL_EXPERIMENTS.items() if name not in OF_SCENES | OF_OBJECTS}
RECIPES = {path.stem: path.read_text() for path in (find_conf() / "recipe").glob("*.yaml")}
PUBLISHED = sorted(name for name in RECIPES if not name.startswith(("demo", "finetune")))
OWN = {"demo", "finetune"}  # experiments that are no network's


@functools.cache
def compose_train(*overrides):
    return compose_config("train", TrainConfig, "data.root=/imagenet", *overrides)


def test_every_published_network_has_an_experiment_of_its_name():
    of_tables_5_to_7 = {"resnet50_msra", "resnet101_msra", "resnet50s", "resnet101s"}
    assert EXPERIMENTS.keys() - OWN == set(list_models()) - {"resnest14_half"} - of_tables_5_to_7


@pytest.mark.parametrize("name", sorted(EXPERIMENTS.keys() - OWN))
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
    """An experiment chooses a model and a recipe and sets nothing of it: one of each recipe stands for its others."""
    one_of_each = {}
    for name in EXPERIMENTS.keys() - OWN:
        values = yaml.safe_load(EXPERIMENTS[name])
        choices = {group: choice for default in values["defaults"] for group, choice in default.items()}
        assert choices.keys() == {"override /model", "override /recipe"} and "train" not in values
        one_of_each[choices["override /recipe"]] = name
    runs = [compose_train(f"+experiment={name}", "recipe=sknet").train for name in one_of_each.values()]
    assert len(runs) > 5
    assert set(map(str, runs)) == {str(compose_train("recipe=sknet").train)}


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_value_of_a_recipe_has_a_comment(name):
    lines = RECIPES[name].splitlines()
    assert f"recipe: {name}" in lines
    values = [line for line in lines if line and not line.startswith(("#", "recipe:", "defaults:", "  - "))]
    assert values and all(re.fullmatch(r"\w+: (\S+|\[.+\]) # \S.+", line) for line in values)


OF_TUNING = {"layer_decay": 1, "ema_warmup": False, "patience": None}  # of no published recipe
COMMON = {"momentum": 0.9, "weight_decay": 1e-4, "lr": 0.1, "crop": 224, "dropout": 0, "ema_decay": None}
COMMON |= {"step_factor": 0.1, "mixup_per_sample": False, "init_from": None, "compile": False, "deterministic": False}
COMMON |= {"max_skipped_steps": 0, "task": "classification", "optimizer": "sgd", "decay_biases": False}
COMMON |= {"steps": None, "milestones": None, "warmup_steps": None, "warmup_start": 0, "reference_batch": 256}
COMMON |= {"head_lr_factor": 1, "clip_norm": None, "clip_value": None}
COMMON |= {"poly_power": 0.9, "betas": [0.9, 0.999], "eps": 1e-8}  # of no recipe here
COMMON |= {"cropping": "random_resized", "interpolation": "bilinear", "policy": None, "jitter": 0, "lighting": 0}
COMMON |= {"pixel_shift": 0, "erasing": 0, "cutmix_alpha": 0, "flips": "horizontal", "mean": None, "std": None}
COMMON |= {"class_weights": None, "drop_path": 0, "freeze": 0, **OF_TUNING}
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
    **OF_TUNING, "task": "segmentation", "optimizer": "sgd", "step_epochs": None, "init_from": None,
    "decay_biases": False, "ema_decay": None, "deterministic": False, "epochs": 120,
    "batch_size": 2, "global_batch": 16, "crop": 480, "base": 520,
    "scales": [0.5, 2.0],
    "schedule": "poly", "poly_power": 0.9, "lr": 0.01, "reference_batch": 16, "head_lr_factor": 10, "warmup_epochs": 0,
    "momentum": 0.9, "nesterov": False, "weight_decay": 1e-4, "decay_all": True, "output_stride": 8,
    "rates": [12, 24, 36], "head_channels": 256, "norm": "sync", "zero_gamma": True, "precision": "fp32",
}  # fmt: skip
FIGURES |= {
    "deeplab_gluon": {**DEEPLAB, "blur": 0.5, "auxiliary_weight": 0.5},
    "deeplab_encoding": {**DEEPLAB, "blur": 0, "auxiliary_weight": 0.2},
}


# The network of Tables 5 and 6: all of `RCNNOptions`, of which some are options of a recipe.
RCNN_NETWORK = {
    "cascade": False, "masks": False, "norm": "sync", "head_norm": None, "freeze_at": 2, "zero_gamma": True,
    "checkpoint_activations": False, "channels": 256, "anchor_sizes": [32, 64, 128, 256, 512],
    "anchor_ratios": [0.5, 1, 2], "anchors_rounded": False, "rpn_convs": 1, "rpn_ious": [0.3, 0.7], "rpn_samples": 256,
    "rpn_positive": 0.5, "rpn_beta": 0, "candidates": [2000, 1000], "proposals": None, "rpn_nms": 0.7, "aligned": True,
    "sampling": 0, "canonical_size": 224, "samples": 512, "positive": 0.25, "stages": None, "class_agnostic": None,
    "box_convs": 4, "box_fcs": 1, "box_width": 1024, "box_beta": 0, "mask_convs": 4,
    "min_score": 0.05, "nms": 0.5, "detections": 100,
}  # fmt: skip
DETECTRON = {
    **{name: value for name, value in RCNN_NETWORK.items() if name in DetectionRecipe.model_fields},
    **{name: COMMON[name] for name in ("step_factor", "poly_power", "head_lr_factor", "compile", "init_from")},
    **{name: COMMON[name] for name in ("clip_norm", "clip_value", "max_skipped_steps", "betas", "eps")},
    **OF_TUNING, "task": "detection", "optimizer": "sgd", "batch_size": 2, "global_batch": 16, "precision": "fp32",
    "deterministic": False,
    "epochs": None, "steps": 90_000, "step_epochs": None, "schedule": "milestones", "milestones": [60_000, 80_000],
    "lr": 0.02, "reference_batch": 16, "warmup_epochs": None, "warmup_steps": 1000, "warmup_start": 0.001,
    "momentum": 0.9, "nesterov": False, "weight_decay": 1e-4, "decay_biases": True, "decay_all": False,
    "ema_decay": None, "precise_batches": 200, "longest": 1333,
}  # fmt: skip
OF_TABLE_6 = {
    **DETECTRON, "masks": True, "short_sides": [640, 672, 704, 736, 768, 800], "side_sampling": "choice",
}  # fmt: skip
FIGURES |= {
    "detectron2_boxes": {**DETECTRON, "masks": False, "short_sides": [640, 800], "side_sampling": "range"},
    "detectron2_masks": OF_TABLE_6,
    "detectron2_masks_3x": {
        **OF_TABLE_6, "steps": 270_000, "milestones": [240_000, 255_000], "short_sides": [640, 864],
        "side_sampling": "range", "longest": 1440, "mask_convs": 8,
    },
}  # fmt: skip
OF_TASK = {
    "classification": (),
    "segmentation": ("task=segmentation", "protocol=whole", "data=masks"),
    "detection": ("task=detection", "protocol=coco", "data=coco"),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_figures_of_the_recipes(name):
    figures = FIGURES[name]
    assert compose_train(f"recipe={name}", *OF_TASK[figures["task"]]).train.model_dump() == {"recipe": name, **figures}


def test_recipes_are_offered_for_their_task():
    tasks = {name: task for task, names in RECIPE_NAMES.items() for name in names}
    assert tasks.items() <= {name: figures["task"] for name, figures in FIGURES.items()}.items()
    assert set(tasks.values()) == OF_TASK.keys()


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


# Tables 5 and 6: networks and the weights that they start from; box AP, and with masks mask AP, by detector.
BACKBONES = {
    "resnet50": ("ResNet-50", "resnet50_msra", None),
    "resnet101": ("ResNet-101", "resnet101_msra", None),
    "resnest50": ("ResNeSt-50", "resnest50", "official:resnest50"),
    "resnest101": ("ResNeSt-101", "resnest101", "official:resnest101"),
    "resnest200": ("ResNeSt-200", "resnest200", "official:resnest200"),
}
TABLES_5_AND_6 = {
    "faster_rcnn": ("Faster R-CNN", {
        "resnet50": ("39.25",), "resnet101": ("41.37",), "resnest50": ("42.33",), "resnest101": ("44.72",),
    }),
    "cascade_rcnn": ("Cascade R-CNN", {
        "resnet50": ("42.52",), "resnet101": ("44.03",), "resnest50": ("45.41",), "resnest101": ("47.50",),
        "resnest200": ("49.03",),
    }),
    "mask_rcnn": ("Mask R-CNN", {
        "resnet50": ("39.97", "36.05"), "resnet101": ("41.78", "37.51"),
        "resnest50": ("42.81", "38.14"), "resnest101": ("45.75", "40.65"),
    }),
    "cascade_mask_rcnn": ("Cascade Mask R-CNN", {
        "resnet50": ("43.06", "37.19"), "resnet101": ("44.79", "38.52"),
        "resnest50": ("46.19", "39.55"), "resnest101": ("48.30", "41.56"),
    }),
}  # fmt: skip
DETECTORS = [(detector, network) for detector, (_, rows) in TABLES_5_AND_6.items() for network in rows]


@pytest.mark.parametrize(("detector", "network"), DETECTORS)
@pytest.mark.slow
def test_a_row_of_tables_5_and_6_says_what_it_trains_and_how(detector, network):
    name = f"{detector}_{network}"
    (kind, rows), (title, model, init_from) = TABLES_5_AND_6[detector], BACKBONES[network]
    config, text = compose_train(f"+experiment={name}"), ALL_EXPERIMENTS[name]
    has_masks = "mask" in detector
    recipe, table = ("detectron2_masks", 6) if has_masks else ("detectron2_boxes", 5)
    choices = {"recipe": recipe, "cascade": "cascade" in detector, "init_from": init_from}
    assert config.train.model_dump() == {**FIGURES[recipe], **choices}
    assert (config.model.name, config.data.kind, config.run_dir) == (model, "coco", f"runs/{name}")
    assert config.protocol.model_dump() == COCO_PROTOCOL
    precisions = ", ".join(f"{what} AP {ap}" for what, ap in zip(("box", "mask"), rows[network], strict=False))
    assert f"# {kind} with {title} on COCO, of table {table}.\n" in text and len(rows[network]) == 1 + has_masks
    assert f"\n# Expected: {precisions} (the paper, val2017).\n" in text and "\n# Hardware: 8 GPUs with 2 " in text
    weights = "" if init_from else f" train.init_from=R-{network.removeprefix('resnet')}.pkl"
    assert f"\n#   resnest-train +experiment={name} data.root=/coco{weights}\n" in text
    assert f"\n#   resnest-eval ckpt=runs/{name}/checkpoints/best.pt data.root=/coco\n" in text


@pytest.mark.parametrize(
    ("recipe", "falls", "total"),
    [("detectron2_boxes", (60_000, 80_000), 90_000), ("detectron2_masks_3x", (240_000, 255_000), 270_000)],
)
def test_the_learning_rate_of_detection(recipe, falls, total):
    """Counted in steps; .02 for 16 images, and in proportion for others."""
    train = compose_train(f"recipe={recipe}", *OF_TASK["detection"]).train
    plan = plan_steps(117_266, train, world_size=8)
    assert (plan.global_batch, plan.accumulation, plan.steps_per_epoch, plan.total_steps) == (16, 1, 7329, total)
    rates = {0: 2e-5, 500: 0.01001, 1000: 0.02, falls[0] - 1: 0.02, falls[0]: 2e-3, falls[1] - 1: 2e-3, falls[1]: 2e-4}
    assert {step: plan.learning_rate(step) for step in rates} == pytest.approx(rates)
    half = plan_steps(117_266, train.model_copy(update={"global_batch": 8}), world_size=4)
    assert half.learning_rate(1000) == pytest.approx(0.01) and half.total_steps == total


def test_the_demo_of_detection_trains_a_small_detector():
    """The network of the prototype behind the demo's figures."""
    recipe = compose_train("+experiment=demo_detection").train.model_dump()
    small = {"channels": 48, "box_convs": 2, "box_width": 128, "samples": 64, "canonical_size": 56, "norm": "bn"}
    small |= {"batch_size": 8, "short_sides": [128], "freeze_at": 2, "masks": True, "cascade": False}
    small |= {"optimizer": "adamw", "anchor_sizes": [16, 32, 64, 96, 128], "task": "detection"}
    assert small.items() <= recipe.items()


def test_every_row_of_tables_5_and_6_has_an_experiment():
    assert len(DETECTORS) == 17
    assert {f"{detector}_{network}" for detector, network in DETECTORS} | {"demo_detection"} == OF_OBJECTS


COCO_PROTOCOL = {"short_side": 800, "longest": 1333, "min_score": 0.05, "nms": 0.5, "detections": 100}


@pytest.mark.parametrize("recipe", ["detectron2_boxes", "detectron2_masks"])
@pytest.mark.parametrize("cascade", [False, True])
@pytest.mark.slow
def test_the_network_of_tables_5_and_6(recipe, cascade):
    """Every setting that a detector of these rows is built with, typed a second time."""
    from resnest_imagenet.models.rcnn_options import RCNNOptions
    from resnest_imagenet.weights.detection import read_options  # late: torchvision's detectors

    figures = {**FIGURES[recipe], "cascade": cascade}
    options = RCNNOptions(**read_options(figures, COCO_PROTOCOL))
    plain = ((0.5, (10, 10, 5, 5)),)
    stages = (*plain, (0.6, (20, 20, 10, 10)), (0.7, (30, 30, 15, 15))) if cascade else plain
    values = {name: list(value) if isinstance(value, tuple) else value for name, value in vars(options).items()}
    assert values == {**RCNN_NETWORK, "cascade": cascade, "masks": recipe == "detectron2_masks"}
    assert (options.num_proposals, options.has_one_box) == ((2000 if cascade else 1000, 1000), cascade)
    assert (options.all_stages, options.norm_of_heads) == (stages, "sync")


@pytest.mark.parametrize(
    ("name", "crop"), [("resnest14", 224), ("resnest26", 224), ("resnest200", 320), ("resnest269", 416)]
)
def test_the_rest_of_the_family_is_evaluated_at_its_published_crop(name, crop):
    config = compose_train(f"+experiment={name}")
    assert (config.train.recipe, config.eval.crop) == (name, crop)


def test_fine_tuning_asks_for_its_start():
    with pytest.raises(ConfigError, match=r"train.layer_decay=0.8 is for a network that .*: set train.init_from to "):
        compose_config("train", TrainConfig, "+experiment=finetune", "data.root=/x")
    config = compose_config("train", TrainConfig, "+experiment=finetune", "train.init_from=official:resnest50")
    assert (config.model.name, config.data.root, config.train.recipe) == ("resnest50", "photos", "finetune")
    options = ("+experiment=finetune", "data.root=/x", "train.freeze=2", "out=x.png")
    assert compose_config("data_preview", PreviewDataConfig, *options).train.init_from is None  # it shows images alone


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("train.ema_warmup=true",), "train.ema_warmup=true needs a moving average: set train.ema_decay"),
        (("train.freeze=2",), "train.freeze=2 would keep random weights: set train.init_from"),
        (("train.freeze=6", "train.init_from=x.pt"), "train.freeze=6: "),
        (("train.std=[0.2,0,0.2]",), r"train.std=\[0.2, 0.0, 0.2\]: must be above 0"),
        (("train.mean=[123.7,116.3,103.5]",), "train.mean"),
        (("train.layer_decay=0",), "train.layer_decay=0"),
        (("train.drop_path=1",), "train.drop_path=1"),
        (("train.patience=0",), "train.patience=0"),
        (("train.flips=up",), "train.flips=up"),
        (("train.class_weights=5",), "train.class_weights=5"),
        (("data.split_seed=3",), "data.split_seed=3 needs data.val_split=..., 0.2 for example"),
    ],
)
def test_values_of_fine_tuning_that_cannot_work_are_a_line(options, words):
    with pytest.raises(ConfigError, match=words) as error:
        compose_train(*options)
    assert "\n" not in str(error.value)


def test_the_schema_names_every_policy():
    (names,) = [
        each for each in get_args(ClassificationRecipe.model_fields["policy"].annotation) if each is not type(None)
    ]
    assert set(get_args(names)) == POLICIES.keys()
