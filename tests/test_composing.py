"""What the tests merge into a composition that is kept is what Hydra composes."""

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from conftest import PLAIN_VALUE, SMALL, compose_config, compose_once, has_value, is_choice
from resnest_imagenet.commands.launch import check_config, find_conf
from resnest_imagenet.config import TrainConfig
from resnest_imagenet.config_reading import EvalConfig, ExportConfig, PredictConfig
from resnest_imagenet.errors import ConfigError

PLACES = ("data.root=/tmp/a-b_0/demo", "run_dir=/tmp/a_1/run.2")
VALUES = ("train.lr=1e-9", "train.ema_decay=null", "train.compile=true", "log.trackers=[tensorboard,wandb]", "seed=7")


OF_TRAINING = ("train.momentum=0.5", "train.init_from=timm:resnet50.tv_in1k", "train.betas=[0.8,0.99]")


@pytest.mark.parametrize(
    ("name", "schema", "overrides"),
    [
        ("train", TrainConfig, (*SMALL, *PLACES, *VALUES, *OF_TRAINING, "loader=torchvision", "loader.workers=0")),
        ("train", TrainConfig, ("train.epochs=3", *PLACES, "recipe=sknet", "log.trackers=[]", "train.epochs=4")),
        ("eval", EvalConfig, (PLACES[0], "ckpt=/x/best.pt", "crop=[32,64]", "protocol=full", "protocol.ratio=0.5")),
        ("export", ExportConfig, ("ckpt=official:resnest50", "format=onnx", "model=resnest50")),
        ("predict", PredictConfig, ("ckpt=/x/best.pt", "images=[/a/b,/c]", "top=2", "out=/x/y.csv")),
    ],
)
def test_merged_values_are_what_hydra_composes(name, schema, overrides):
    with initialize_config_dir(str(find_conf()), version_base="1.3"):
        expected = check_config(compose(name, list(overrides)), schema)
    before = OmegaConf.to_yaml(compose_once(name))
    assert compose_config(name, schema, *overrides) == expected
    assert OmegaConf.to_yaml(compose_once(name)) == before


def test_what_is_a_value():
    strange = (
        "seed=01",
        "seed=1_0",
        "a=yes",
        "a=2024-05-01",
        "a='b'",
        "a=x=y",
        "+a=b",
        "~a",
        "a={b:1}",
        "a=~/b",
        "a=ö",
    )
    for override in strange:
        assert not PLAIN_VALUE.fullmatch(override), override
    assert is_choice("loader=dali") and not is_choice("loader.workers=1")
    composed = compose_once("train")
    assert has_value(composed, "data.root") and has_value(composed, "train.milestones")
    assert not any(has_value(composed, option) for option in ("train", "train.epoch", "hydra.job.name", "nothing"))


def test_an_unknown_option_is_hydras_error():
    with pytest.raises(Exception, match="Could not override 'train.epoch'"):
        compose_config("train", TrainConfig, "data.root=/x", "train.epoch=3")
    with pytest.raises(ConfigError, match="train.epochs=0: input should be greater"):
        compose_config("train", TrainConfig, "data.root=/x", "train.epochs=0")
