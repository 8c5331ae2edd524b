import pytest

from conftest import compose_config
from resnest_imagenet.config import TrainConfig
from resnest_imagenet.errors import ConfigError, DataError
from resnest_imagenet.training.schedule import plan_steps

IMAGENET = 1_281_167


def recipe_of(*overrides):
    return compose_config("train", TrainConfig, "data.root=/imagenet", *overrides).train


def test_resnest50_on_64_gpus_by_hand():
    """8192 images per step: 156 steps an epoch, 780 of warm-up, 42120 in all, peak 0.1 * 8192 / 256 = 3.2."""
    plan = plan_steps(IMAGENET, recipe_of("+experiment=resnest50"), world_size=64)
    assert (plan.global_batch, plan.accumulation, plan.steps_per_epoch) == (8192, 1, 156)
    assert (plan.total_steps, plan.warmup_steps, plan.peak_lr) == (42120, 780, 3.2)
    assert plan.learning_rate(0) == 0
    assert plan.learning_rate(779) == pytest.approx(3.2 * 779 / 780, rel=1e-12)
    assert plan.learning_rate(780) == 3.2
    assert plan.learning_rate(780 + 41340 // 2) == pytest.approx(1.6, rel=1e-12)  # the cosine's middle
    assert plan.learning_rate(42119) == pytest.approx(3.2 * (3.141592653589793 / 41340) ** 2 / 4, rel=1e-6)


@pytest.mark.parametrize(("world_size", "accumulation"), [(64, 1), (8, 8), (1, 64)])
def test_fewer_gpus_accumulate_to_the_same_steps(world_size, accumulation):
    recipe = recipe_of("+experiment=resnest50")
    plan = plan_steps(IMAGENET, recipe, world_size)
    assert plan.accumulation == accumulation
    assert (plan.total_steps, plan.peak_lr) == (42120, 3.2)


def test_the_global_batch_defaults_to_what_the_ranks_hold():
    plan = plan_steps(1000, recipe_of("train.batch_size=50"), world_size=4)
    assert (plan.global_batch, plan.accumulation, plan.steps_per_epoch) == (200, 1, 5)
    assert plan.peak_lr == pytest.approx(0.1 * 200 / 256)


def test_no_warm_up_starts_at_the_peak():
    plan = plan_steps(1000, recipe_of("train.warmup_epochs=0", "train.epochs=2"), world_size=1)
    assert plan.learning_rate(0) == plan.peak_lr


def test_numbers_that_do_not_divide_are_named():
    with pytest.raises(ConfigError, match=r"global_batch=8192 .* train.batch_size=100 x 3 ranks = 300"):
        plan_steps(IMAGENET, recipe_of("train.global_batch=8192", "train.batch_size=100"), world_size=3)


def test_a_set_smaller_than_a_step():
    with pytest.raises(DataError, match="63 training images do not fill one step of 64"):
        plan_steps(63, recipe_of(), world_size=1)
