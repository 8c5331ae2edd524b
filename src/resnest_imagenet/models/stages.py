"""The stage that a parameter belongs to, and freezing the first stages of a classifier."""

from torch import nn

from resnest_imagenet.errors import ConfigError
from resnest_imagenet.models.features import STAGES

_STAGE_OF = {part: stage for stage, parts in enumerate(STAGES.values()) for part in parts}


def find_stage(name: str) -> int | None:
    """Return the stage of a parameter by its name, 0 for the stem's to 4; None for a head's.

    Args:
        name: layer1.0.conv1.weight, or of detectors and segmentation networks backbone.layer1.0.conv1.weight.
    """
    return _STAGE_OF.get(name.removeprefix("backbone.").partition(".")[0])


def freeze_stages(model: nn.Module, count: int) -> list[nn.Module]:
    """Freeze the first stages of a network: no gradients for their parameters.

    Returns:
        Their modules, which must be in evaluation mode in training too: so their batch norms keep their statistics.

    Raises:
        ConfigError: the network has other stages.
    """
    modules = []
    for stage in list(STAGES)[:count]:
        for part in STAGES[stage]:
            if not hasattr(model, part):
                raise ConfigError(f"train.freeze={count}: a {type(model).__name__} has no {part}: set train.freeze=0")
            modules.append(model.get_submodule(part).requires_grad_(False))
    return modules


def keep_in_evaluation(modules: list[nn.Module]) -> None:
    """Put modules into evaluation mode, if `train()` has ended it."""
    for module in modules:
        if module.training:
            module.eval()
