"""The choice of a task."""

from collections.abc import Callable

from resnest_imagenet import extensions
from resnest_imagenet.config import TrainConfig
from resnest_imagenet.schemas import find_outside_task
from resnest_imagenet.tasks.classification import Classification
from resnest_imagenet.tasks.segmentation import Segmentation
from resnest_imagenet.tasks.task import Task


def _open_detection(config: TrainConfig) -> Task:
    from resnest_imagenet.tasks.detection import Detection  # late: torchvision's detectors take a second to import

    return Detection(config)


TASKS: dict[str, Callable[[TrainConfig], Task]] = {
    "classification": Classification,
    "segmentation": Segmentation,
    "detection": _open_detection,
}


def open_task(config: TrainConfig) -> Task:
    """Open the task of a recipe.

    Raises:
        UserError: it cannot be trained: the task or network is unknown, there is no data, or classes differ.
    """
    outside = find_outside_task(config.train.task)
    if outside is None:
        return TASKS[config.train.task](config)
    with extensions.naming(f"train.task={config.train.task} of {outside.origin}"):
        return outside.open(config)
