import math

import pytest
import torch
from torch.optim.lr_scheduler import MultiStepLR, PolynomialLR

from conftest import compose_config
from resnest_imagenet.config import TrainConfig
from resnest_imagenet.errors import ConfigError, DataError
from resnest_imagenet.training.schedule import plan_steps

IMAGENET = 1_281_167


def recipe_of(*overrides):
    return compose_config("train", TrainConfig, "data.root=/imagenet", *overrides).train


def cosine_tail(peak, steps):
    """A cosine's last step: 1 - cos(x) is x * x / 2 for small x."""
    return peak * (math.pi / steps) ** 2 / 4


# By hand, for 1,281,167 images: steps per epoch, in all, of warm-up, then the learning rate at the first step, the
# warm-up's last, the middle (of what follows the warm-up) and the last.
SCHEDULES = {
    # 8192 a step; peak .1 * 8192 / 256 = 3.2; 270 and 5 epochs of 156 steps
    "resnest": (156, 42120, 780, [0, 3.2 * 779 / 780, 1.6, cosine_tail(3.2, 41340)]),
    # 2048 a step; peak .8; 270 and 5 epochs of 625 steps
    "resnest_torch": (625, 168750, 3125, [0, 0.8 * 3124 / 3125, 0.4, cosine_tail(0.8, 165625)]),
    # 1024 a step; peak .4; 200 and 5 epochs of 1251 steps
    "bag_of_tricks": (1251, 250200, 6255, [0, 0.4 * 6254 / 6255, 0.2, cosine_tail(0.4, 243945)]),
    # 256 a step; 5004 steps an epoch; .1, .01 from epoch 30, .001 from epoch 60
    "torchvision_v1": (5004, 450360, 0, [0.1, 0.1, 0.01, 0.001]),
    # the same, 100 epochs: .0001 from epoch 90
    "sknet": (5004, 500400, 0, [0.1, 0.1, 0.01, 0.0001]),
}


@pytest.mark.parametrize("recipe", SCHEDULES)
def test_learning_rates_of_each_recipe_by_hand(recipe):
    steps, total, warmup, rates = SCHEDULES[recipe]
    plan = plan_steps(IMAGENET, recipe_of(f"recipe={recipe}", "train.batch_size=32"), world_size=8)
    assert (plan.steps_per_epoch, plan.total_steps, plan.warmup_steps) == (steps, total, warmup)
    # An odd number of steps has its middle between two of them: 1e-5.
    at = [0, max(warmup - 1, 0), warmup + (total - warmup) // 2, total - 1]
    assert [plan.learning_rate(step) for step in at] == pytest.approx(rates, rel=1e-5)


def test_steps_of_a_step_schedule_are_at_whole_epochs():
    plan = plan_steps(IMAGENET, recipe_of("+experiment=resnet50"), world_size=8)
    edges = [30 * 5004 - 1, 30 * 5004, 60 * 5004 - 1, 60 * 5004]
    assert [plan.learning_rate(step) for step in edges] == pytest.approx([0.1, 0.01, 0.01, 0.001])


def test_the_peak_is_reached_after_the_warm_up():
    plan = plan_steps(IMAGENET, recipe_of("+experiment=resnest50"), world_size=64)
    assert (plan.global_batch, plan.accumulation, plan.learning_rate(780)) == (8192, 1, 3.2)


@pytest.mark.parametrize(("world_size", "accumulation"), [(64, 1), (8, 8), (1, 64)])
def test_fewer_gpus_accumulate_to_the_same_steps(world_size, accumulation):
    recipe = recipe_of("+experiment=resnest50")
    plan = plan_steps(IMAGENET, recipe, world_size)
    assert plan.accumulation == accumulation
    assert (plan.total_steps, plan.peak_lr) == (42120, 3.2)


def test_the_global_batch_defaults_to_what_the_ranks_hold():
    plan = plan_steps(1000, recipe_of("train.batch_size=50", "train.global_batch=null"), world_size=4)
    assert (plan.global_batch, plan.accumulation, plan.steps_per_epoch) == (200, 1, 5)
    assert plan.peak_lr == pytest.approx(0.1 * 200 / 256)


def test_no_warm_up_starts_at_the_peak():
    plan = plan_steps(1000, recipe_of("train.warmup_epochs=0", "train.global_batch=128"), world_size=1)
    assert plan.learning_rate(0) == plan.peak_lr


def test_numbers_that_do_not_divide_are_named():
    with pytest.raises(ConfigError, match=r"global_batch=8192 .* train.batch_size=100 x 3 ranks = 300"):
        plan_steps(IMAGENET, recipe_of("train.global_batch=8192", "train.batch_size=100"), world_size=3)


def test_a_set_smaller_than_a_step():
    for option in ("train.global_batch", "train.batch_size"):
        recipe = recipe_of("recipe=torchvision_v1", "train.batch_size=64", f"{option}=64")
        if option == "train.batch_size":
            recipe = recipe.model_copy(update={"global_batch": None})
        with pytest.raises(DataError, match=f"63 training images do not fill a step of 64: lower {option}$"):
            plan_steps(63, recipe, world_size=1)


# 16 images a step on 8 ranks; 117,266 images make 7329 steps an epoch.
DETECTION = ("train.dropblock=0", "train.batch_size=2", "train.global_batch=16", "train.lr=0.02")
DETECTION += ("train.reference_batch=16", "train.schedule=milestones", "train.warmup_epochs=null")
DETECTION += ("train.warmup_steps=1000", "train.warmup_start=0.001")
COCO = 117_266


def test_the_1x_schedule_of_detectron2():
    """0.02 for 16 images, 1000 steps of warm-up from 0.001 of it, a tenth at 60,000 and 80,000 of 90,000 steps."""
    recipe = recipe_of(*DETECTION, "train.epochs=null", "train.steps=90000", "train.milestones=[60000,80000]")
    plan = plan_steps(COCO, recipe, world_size=8)
    assert (plan.total_steps, plan.steps_per_epoch, plan.epochs) == (90_000, 7329, 13)
    assert (plan.end_of_epoch(11), plan.end_of_epoch(12)) == (12 * 7329, 90_000)  # the last epoch is shorter
    expected = {0: 2e-5, 500: 0.02 * 0.5005, 999: 0.02 * (0.001 + 0.999 * 0.999), 1000: 0.02, 59_999: 0.02}
    expected |= {60_000: 0.002, 79_999: 0.002, 80_000: 2e-4, 89_999: 2e-4}
    assert {step: plan.learning_rate(step) for step in expected} == pytest.approx(expected, rel=1e-12)
    # Half the ranks' images: half the rate.
    half = plan_steps(COCO, recipe.model_copy(update={"global_batch": 8}), world_size=4)
    assert half.peak_lr == 0.01


def test_the_1x_schedule_in_epochs():
    """torchvision's references: epochs 8 and 11 of 12."""
    recipe = recipe_of(*DETECTION, "train.epochs=12", "train.milestones=[8,11]")
    plan = plan_steps(COCO, recipe, world_size=8)
    edges = [8 * 7329 - 1, 8 * 7329, 11 * 7329 - 1, 11 * 7329, 12 * 7329 - 1]
    assert plan.total_steps == 12 * 7329
    assert [plan.learning_rate(step) for step in edges] == pytest.approx([0.02, 0.002, 0.002, 2e-4, 2e-4])


def test_the_poly_schedule_of_deeplab():
    """0.01 * (1 - step / steps) ** 0.9, for 16 images, without a warm-up; ADE20K's 20,210 images, 120 epochs."""
    options = ("train.dropblock=0", "train.schedule=poly", "train.lr=0.01", "train.reference_batch=16")
    options += ("train.batch_size=2", "train.global_batch=16", "train.warmup_epochs=0", "train.epochs=120")
    plan = plan_steps(20_210, recipe_of(*options), world_size=8)
    steps = 120 * 1263
    assert plan.total_steps == steps
    at = [0, 1, steps // 2, steps - 1]
    expected = [0.01 * (1 - step / steps) ** 0.9 for step in at]
    assert [plan.learning_rate(step) for step in at] == pytest.approx(expected, rel=1e-12)
    plan = plan_steps(20_210, recipe_of(*options, "train.warmup_epochs=1", "train.poly_power=2"), world_size=8)
    assert [plan.learning_rate(step) for step in (1263, 1263 + (steps - 1263) // 2)] == pytest.approx(
        [0.01, 0.0025], rel=1e-4
    )  # of an odd number of steps


def test_the_schedules_are_torchs():
    """Step for step those of torch.optim.lr_scheduler: linear warm-up, milestones, polynomial."""
    schedulers = {
        "milestones": lambda optimizer: MultiStepLR(optimizer, [30, 45]),
        "poly": lambda optimizer: PolynomialLR(optimizer, 60, power=0.9),
    }
    for name, make in schedulers.items():
        options = ("train.dropblock=0", "train.epochs=null", "train.steps=60", f"train.schedule={name}")
        options += (
            "train.milestones=[30,45]" if name == "milestones" else "train.poly_power=0.9",
            "train.lr=0.5",
            "train.batch_size=256",
            "train.global_batch=null",
        )
        plan = plan_steps(2560, recipe_of(*options, "train.warmup_epochs=null", "train.warmup_steps=0"), world_size=1)
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
        scheduler, rates = make(optimizer), []
        for _ in range(60):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        assert [plan.learning_rate(step) for step in range(60)] == pytest.approx(rates, rel=1e-9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ("train.epochs=2", "train.milestones=[1]"),
            r"train.warmup_steps=1000 must be less than the 200 steps of the run",
        ),
        (
            ("train.epochs=20", "train.milestones=[9]"),
            r"train.warmup_steps=1000 must end before the first of train.milestones, at step 900",
        ),
        (
            ("train.epochs=20", "train.schedule=step", "train.step_epochs=9"),
            r"train.warmup_steps=1000 must end before the first of train.step_epochs, at step 900",
        ),
        (
            ("train.epochs=null", "train.steps=100", "train.milestones=[50]", "train.warmup_steps=null"),
            r"train.warmup_epochs=2.0 must be less than the 100 steps of the run",
        ),
    ],
)
def test_a_warm_up_that_outlasts_the_rest(options, message):
    if "train.warmup_steps=null" in options:
        options += ("train.warmup_epochs=2",)
    recipe = recipe_of(*DETECTION, *options)
    with pytest.raises(ConfigError, match=message):
        plan_steps(1600, recipe, world_size=8)
