"""ResNeSt (Split-Attention Networks, arXiv 2004.08955): networks, training and evaluation."""

from importlib import import_module
from sys import modules
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from resnest_imagenet.extensions import register_model, register_source, register_task
    from resnest_imagenet.inference.classifier import open_classifier
    from resnest_imagenet.inference.compare import compare
    from resnest_imagenet.inference.compare_masks import compare_masks
    from resnest_imagenet.inference.compare_objects import compare_objects
    from resnest_imagenet.inference.detect import detect
    from resnest_imagenet.inference.detector import open_detector
    from resnest_imagenet.inference.explain import explain
    from resnest_imagenet.inference.features import extract_features
    from resnest_imagenet.inference.predict import predict
    from resnest_imagenet.inference.segment import segment
    from resnest_imagenet.inference.segmenter import open_segmenter
    from resnest_imagenet.models.zoo import build_model, list_models
    from resnest_imagenet.tasks.evaluate_checkpoint import evaluate
    from resnest_imagenet.weights.load import load_backbone

__version__ = "0.1.0"

__all__ = [
    "build_model",
    "compare",
    "compare_masks",
    "compare_objects",
    "detect",
    "evaluate",
    "explain",
    "extract_features",
    "list_models",
    "load_backbone",
    "open_classifier",
    "open_detector",
    "open_segmenter",
    "predict",
    "register_model",
    "register_source",
    "register_task",
    "segment",
]

_MODULES = {
    "build_model": "models.zoo",
    "compare": "inference.compare",
    "compare_masks": "inference.compare_masks",
    "compare_objects": "inference.compare_objects",
    "detect": "inference.detect",
    "evaluate": "tasks.evaluate_checkpoint",
    "explain": "inference.explain",
    "extract_features": "inference.features",
    "list_models": "models.zoo",
    "load_backbone": "weights.load",
    "open_classifier": "inference.classifier",
    "open_detector": "inference.detector",
    "open_segmenter": "inference.segmenter",
    "predict": "inference.predict",
    "register_model": "extensions",
    "register_source": "extensions",
    "register_task": "extensions",
    "segment": "inference.segment",
}


def __getattr__(name: str) -> Any:
    # torch is imported when a function is asked for: the commands answer --help before that.
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from resnest_imagenet.errors import explaining_runtime

    with explaining_runtime():  # torchvision may have been built for another torch
        return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    submodules = (name for name in globals() if f"{__name__}.{name}" in modules)
    return sorted({*__all__, *submodules})
