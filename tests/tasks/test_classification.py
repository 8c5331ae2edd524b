import pytest

from conftest import compose_config
from resnest_imagenet.config import TrainConfig
from resnest_imagenet.tasks.classification import dropblock_probability


def test_dropblock_rises_linearly_to_the_last_epoch():
    recipe = compose_config("train", TrainConfig, "recipe=resnest", "data.root=/imagenet").train
    assert [dropblock_probability(recipe, epoch) for epoch in (0, 134, 269)] == pytest.approx([0.1 / 270, 0.05, 0.1])
