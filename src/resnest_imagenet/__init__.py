"""ResNeSt (Split-Attention Networks, arXiv 2004.08955): networks, training and evaluation."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from resnest_imagenet.extensions import register_model, register_source, register_task
    from resnest_imagenet.models.zoo import build_model, list_models

__all__ = ["build_model", "list_models", "register_model", "register_source", "register_task"]


def __getattr__(name: str) -> Any:
    if name.startswith("register_") and name in __all__:
        from resnest_imagenet import extensions

        return getattr(extensions, name)
    # torch is imported when a model is asked for: the commands answer --help before that.
    if name in __all__:
        from resnest_imagenet.models import zoo

        return getattr(zoo, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
