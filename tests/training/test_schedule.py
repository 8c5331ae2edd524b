import math

import pytest

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
