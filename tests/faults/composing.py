"""Hydra's part of a start, done once for many trainers: it takes three quarters of the time of a small one."""

from functools import cache
from typing import TYPE_CHECKING, Any

import hydra
import yaml
from hydra import compose, initialize_config_dir

if TYPE_CHECKING:
    from omegaconf import DictConfig

GROUPS = {"loader": "loader.name"}  # that hold one value, with its name


@cache
def compose_train(options: tuple[str, ...]) -> "DictConfig":
    """Compose resnest-train's configuration."""
    from resnest_imagenet.commands.launch import find_conf

    with initialize_config_dir(str(find_conf()), version_base="1.3"):
        return compose("train", [*options])


def compose_early(first: tuple[str, ...], arguments: list[str]) -> None:
    """Let the command of this process start with a configuration that is composed already.

    Where an argument is more than the value of an option, as a choice of a group is, Hydra composes as ever.

    Args:
        first: arguments that are composed once.
        arguments: these, and those after them.
    """
    from omegaconf import OmegaConf

    config = compose_train(first).copy()
    for argument in arguments[len(first) :]:
        option, _, value = argument.partition("=")
        option = GROUPS.get(option, option)
        if OmegaConf.select(config, option, default=config) is config:
            return
        if OmegaConf.is_dict(OmegaConf.select(config, option)):
            return
        OmegaConf.update(config, option, yaml.safe_load(value))

    def main(**_: Any) -> Any:
        return lambda task: lambda: task(config)

    hydra.main = main
