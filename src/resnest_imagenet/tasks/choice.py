"""The choice of a task."""

from resnest_imagenet import extensions
from resnest_imagenet.config import RECIPES, TrainConfig
from resnest_imagenet.errors import ConfigError, suggest
from resnest_imagenet.tasks.task import Task


def open_task(config: TrainConfig) -> Task:
    """Open the task of a recipe.

    Raises:
        UserError: what cannot be trained: an unknown task or network, no data, classes that differ.
    """
    name = config.train.task
    outside = extensions.find(extensions.tasks, name, RECIPES)
    if outside is not None:
        with extensions.naming(f"train.task={name} of {outside.origin}"):
            return outside.open(config)
    if name == "classification":
        from resnest_imagenet.tasks.classification import Classification

        return Classification(config)
    valid = [*RECIPES, *extensions.tasks()]
    raise ConfigError(f"unknown train.task {name!r}{suggest(name, valid)} ({', '.join(valid)})")
