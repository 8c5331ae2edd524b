"""Loads weights from any file into a network: all tensors fit, or a line names one that does not."""

import functools
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from os import PathLike, fspath
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
from pydantic import Field, TypeAdapter, ValidationError
from torch import Tensor, nn

from resnest_imagenet.checkpoint import load_checkpoint
from resnest_imagenet.errors import CheckpointError, ConfigError
from resnest_imagenet.models.imagenet_classes import imagenet_synsets
from resnest_imagenet.models.zoo import (
    ARCHITECTURES,
    build_model,
    find_head,
    list_models,
    require_model,
    strides_first,
    usual_crop,
)
from resnest_imagenet.options import Crop
from resnest_imagenet.recipe import ProtocolOptions
from resnest_imagenet.weights.folders import read_folder
from resnest_imagenet.weights.layouts import is_unread, recognise, rename
from resnest_imagenet.weights.pickles import load_pickle
from resnest_imagenet.weights.published import fetch, find_timm_test
from resnest_imagenet.weights.sources import find_weights, is_described, is_published

TASK = "classification"  # the task of the zoo's networks; old checkpoints, which name no task, have it too

_USES = {
    TASK: "start a run from it, train.init_from=...",
    "segmentation": "resnest-eval, resnest-predict, resnest-compare and resnest-export take it",
    "detection": "resnest-eval, resnest-predict, resnest-compare and resnest-export take it",
}
_COLOURS = TypeAdapter(list[Annotated[list[Annotated[int, Field(ge=0, le=255)]], Field(min_length=3, max_length=3)]])
_NUMBERS = TypeAdapter(list[int])
_COLOUR = TypeAdapter(list[Annotated[float, Field(ge=0, le=1)]])
T = TypeVar("T")
# The keys of the weights and of their moving average in a file: of this project and torch.save users; of torchvision;
# of mmpretrain, Lightning and timm.
_CONTAINERS = (("model", "ema"), ("model", "model_ema"), ("state_dict", "state_dict_ema"))


@dataclass(frozen=True)
class Weights:
    """The content of a file. Attributes are None if the source does not have them.

    Attributes:
        source: the file, or official:NAME or timm:NAME.
        tensors: by the names of the file's layout, without the prefixes of wrappers.
        is_average: whether they are the moving average of the trained weights.
        model: the network's name.
        classes: class names in the order of the outputs.
        training: the training options, in this project's checkpoints.
        epoch: epochs done, in this project's checkpoints.
        crop: side of the images on which the weights are evaluated, in pixels.
        protocol: how images are brought to that side.
        mean: of red, green and blue in 0..1, as their network expects; None: ImageNet's.
        std: the standard deviation, likewise.
        run: the whole configuration of the run, in this project's checkpoints.
        task: the task of the training; only this project's checkpoints have another one than classification.
        palette: red, green and blue of each class, 0 to 255.
        rcnn_options: of a detector that another program trained, see `adopt_rcnn`.
        category_ids: the data set's own numbers of the classes.
    """

    source: str
    tensors: dict[str, Tensor]
    is_average: bool = False
    model: str | None = None
    classes: list[str] | None = None
    training: dict[str, Any] | None = None
    epoch: int | None = None
    crop: int | None = None
    protocol: ProtocolOptions | None = None
    mean: list[float] | None = None
    std: list[float] | None = None
    run: dict[str, Any] | None = None
    task: str = TASK
    palette: list[list[int]] | None = None
    rcnn_options: dict[str, Any] | None = None
    category_ids: list[int] | None = None


def read_weights(source: str | PathLike[str], choice: str = "auto", tasks: Collection[str] = (TASK,)) -> Weights:
    """Read the weights of a network.

    Args:
        source: a .pth, .pt or .safetensors file: a checkpoint of this project, or a state dict, bare or under
            "state_dict" or "model"; a .pkl file: the same, of numpy arrays; a run folder: its best checkpoint; a folder
            of resnest-export format=hub of segmentation or detection; or published weights, official:NAME or timm:NAME.
        choice: "model", "ema" (the moving average), or "auto": the moving average if the file has one.
        tasks: the tasks whose checkpoints are taken.

    Raises:
        CheckpointError: it is missing, unreadable, damaged, not a state dict, lacks the name of an output, or is of a
            run of another task.
        ConfigError: the published name or the choice is unknown, or there is no moving average.
    """
    if choice not in ("auto", "model", "ema"):
        raise ConfigError(f"weights={choice!r}: auto, model and ema are valid")
    source = fspath(source)
    has_name = is_published(source)
    path, model = fetch(source) if has_name else (find_weights(source), None)
    if not has_name and path != Path(source):  # a run's best checkpoint: results name the file
        source = fspath(path)
    content = _read_content(path)
    if {"config", "epoch"} <= content.keys():
        require_task(content, source, tasks)
    state, is_average = _choose_state(content, choice, source)
    weights = Weights(source, _without_wrappers(_require_tensors(state, source)), is_average)
    _require_finite(weights)
    if has_name:
        outputs = weights.tensors.get("fc.weight")
        crop, protocol = _find_published_test(source, model or "")
        classes = None if outputs is None else list_classes(None, len(outputs))
        return replace(weights, model=model, classes=classes, crop=crop, protocol=protocol)
    return _add_description(weights, content) if {"config", "classes", "epoch"} <= content.keys() else weights


def _read_content(path: Path) -> dict[str, Any]:
    if is_described(path):
        return read_folder(path)
    return load_pickle(path) if path.suffix == ".pkl" else load_checkpoint(path)


def require_task(content: dict[str, Any], source: str, tasks: Collection[str]) -> None:
    """Raise a CheckpointError if a checkpoint is of a run of another task.

    Args:
        content: of the checkpoint.
        source: its file, for the message.
        tasks: the tasks that are taken.
    """
    task = content.get("task", TASK)
    if task not in tasks:
        raise CheckpointError(describe_other_task(source, task, tasks))


def describe_other_task(source: str, task: str, tasks: Collection[str]) -> str:
    """Return a line about a checkpoint of another task than those that are taken, with what to do with it."""
    advice = _USES.get(task, "choose another, or other weights")
    return f"{source}: a checkpoint of task {task}, not of {' or '.join(tasks)}: {advice}"


def list_classes(classes: Sequence[str] | None, num_outputs: int) -> list[str] | None:
    """Return the classes of a network's outputs: those of its weights, or else ImageNet's if there are 1000 outputs."""
    if classes is not None:
        return list(classes)
    return imagenet_synsets() if num_outputs == 1000 else None


def _add_description(weights: Weights, content: dict[str, Any]) -> Weights:
    """Return the weights of a run with the description in its checkpoint."""
    source = weights.source
    try:
        name, training = content["config"]["model"]["name"], content["config"]["train"]
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{source}: a checkpoint without its configuration") from error
    classes, epoch = content["classes"], content["epoch"]
    has_names = isinstance(classes, list) and all(isinstance(class_name, str) for class_name in classes)
    if not (has_names and isinstance(name, str) and isinstance(training, dict) and isinstance(epoch, int)):
        raise CheckpointError(f"{source}: not a configuration of this project")
    key = f"{find_head(name)}.weight"
    classifier = weights.tensors.get(key)
    if classifier is not None and classifier.shape[:1] != (len(classes),):
        raise CheckpointError(f"{source}: {len(classes)} class names for {key} {tuple(classifier.shape)}")
    crop, protocol = _read_evaluation(content["config"])
    values = {"classes": classes, "training": training, "epoch": epoch, "crop": crop, "protocol": protocol}
    values |= {name: _read_of_classes(_COLOUR, training.get(name), 3) for name in ("mean", "std")}
    values["palette"] = _read_of_classes(_COLOURS, content.get("palette"), len(classes))
    values["category_ids"] = _read_of_classes(_NUMBERS, content.get("category_ids"), len(classes))
    return replace(weights, model=name, run=content["config"], task=content.get("task", TASK), **values)


def _read_evaluation(config: dict[str, Any]) -> tuple[int | None, ProtocolOptions | None]:
    """Return crop and protocol of a run's evaluation after each epoch; None if the checkpoint lacks them."""
    try:
        crop = TypeAdapter(Crop).validate_python(config["eval"]["crop"], strict=True)
        return crop, ProtocolOptions.model_validate(config["protocol"])
    except (KeyError, ValidationError):
        return None, None


def _read_of_classes(kind: TypeAdapter[list[T]], content: Any, num_classes: int) -> list[T] | None:
    """Return a checkpoint's list with a value for each class; None if it has none, or something else."""
    try:
        values = kind.validate_python(content, strict=True)
    except ValidationError:
        return None
    return values if len(values) == num_classes else None


def _find_published_test(source: str, model: str) -> tuple[int | None, ProtocolOptions | None]:
    """Return crop and protocol of the test of published weights; the protocol is None if it is the paper's."""
    kind, _, name = source.partition(":")
    if kind != "timm":
        return usual_crop(model), None
    crop, ratio, interpolation = find_timm_test(name)
    values = {"order": "resize_crop", "ratio": ratio, "interpolation": interpolation, "antialias": True}
    return crop, ProtocolOptions.model_validate(values)


def _choose_state(content: dict[str, Any], choice: str, source: str) -> tuple[Any, bool]:
    """Return the state dict in a file's content, and whether it is a moving average."""
    trained, average = content, None
    for container, average_key in _CONTAINERS:
        if isinstance(content.get(container), dict):
            trained, average = content[container], average or content.get(average_key)
    if choice == "ema" and average is None:
        raise ConfigError(f"weights=ema, but {source} holds no moving average")
    return (trained, False) if average is None or choice == "model" else (average, True)


def restore_network(weights: Weights, name: str | None) -> tuple[nn.Module, str]:
    """Build a network with as many classes as the weights have, and load them.

    Args:
        weights: with a classifier.
        name: of the network; None if the weights include it.

    Returns:
        The network, on the CPU, and its name.

    Raises:
        CheckpointError: a key is missing, unexpected or of another shape; names it, and the networks that would fit.
        ConfigError: there is no name, or it is not the weights'.
    """
    name, tensors = match_tensors(weights, name)
    key = f"{find_head(name)}.weight"
    if key not in tensors:
        raise CheckpointError(f"{weights.source}: lacks the classifier: train one with train.init_from=...")
    model = build_model(name, num_classes=len(tensors[key]))
    model.load_state_dict(tensors)
    return model, name


def start_from(model: nn.Module, name: str, classes: list[str], weights: Weights) -> bool:
    """Load the weights into a new network; the classifier too if it is for the same classes, in any order.

    Returns:
        Whether the classifier was loaded.
    """
    _, tensors = match_tensors(weights, name)
    output_of = {name: output for output, name in enumerate(weights.classes or ())}
    initial = model.state_dict()
    classifier = _list_classifier(name, initial)
    is_same = {len(tensors[key]) for key in classifier if key in tensors} == {len(classes)}
    is_same = is_same and output_of.keys() == set(classes)
    if is_same:
        rows = torch.tensor([output_of[class_name] for class_name in classes])
        tensors.update({key: tensors[key][rows] for key in classifier})
    else:
        tensors.update({key: initial[key] for key in classifier})
    model.load_state_dict(tensors)
    return is_same


def load_backbone(backbone: nn.Module, name: str, source: str | PathLike[str], choice: str = "auto") -> None:
    """Load weights into a network of `build_model(name, features_only=True)`; a classifier is not loaded.

    Args:
        backbone: with all stages, or the first ones.
        name: of the network.
        source: a file of weights, or published ones, as for `read_weights`.
        choice: "model", "ema" or "auto".

    Raises:
        UserError: the weights cannot be read, or are not those of this network.
    """
    _, tensors = match_tensors(read_weights(source, choice), name)
    backbone.load_state_dict({key: tensors[key] for key in backbone.state_dict()})


def require_usual_pixels(weights: Weights) -> None:
    """Raise a CheckpointError if the weights' network expects another normalisation than ImageNet's."""
    for name in ("mean", "std"):
        if (values := getattr(weights, name)) is not None:
            raise CheckpointError(
                f"{weights.source}: trained with train.{name}={values}, which only task=classification has: train a "
                f"backbone with train.{name}=null"
            )


def match_tensors(weights: Weights, name: str | None) -> tuple[str, dict[str, Tensor]]:
    """Return the network's name and all its tensors by its own key names; a classifier only if the weights have one.

    Counters of batches (num_batches_tracked), which no computation reads, are 0 if a file has none.

    Args:
        weights: in any layout.
        name: of the network; None if the weights include it.

    Raises:
        CheckpointError: a key is missing, unexpected or of another shape; names it, and the networks that would fit.
        ConfigError: there is no name, or it is not the weights'.
    """
    if name is not None:
        require_model(name)
    if name is not None and weights.model not in (None, name):
        raise ConfigError(f"model={name}, but {weights.source} holds a {weights.model}")
    name = name or weights.model
    if name is None:
        raise ConfigError(f"{weights.source} holds bare weights, and {_advise(weights)}")
    problem, tensors = _match(weights, name)
    if problem:
        raise CheckpointError(f"{weights.source}: {problem}: not the weights of {name}; {_advise(weights)}")
    return name, tensors


def _advise(weights: Weights) -> str:
    """Name the networks that the weights fit: networks that differ only in the place of a pool share all their shapes.

    This builds every network, without memory for weights. It takes some seconds, for a more helpful error.
    """
    fitting = [f"model={name}" for name in list_models() if not _match(weights, name)[0]]
    return f"they fit {' or '.join(fitting)}" if fitting else "they fit no model of this project"


def _match(weights: Weights, name: str) -> tuple[str | None, dict[str, Tensor]]:
    """Return the first misfit in words, or None, and the tensors by the network's own key names."""
    expected = _list_expected(name) if name in ARCHITECTURES else _build_expected(name)
    classifier = _list_classifier(name, expected)
    layout = recognise(weights.tensors)
    names = _list_names(name, expected, layout)
    unused = {key: value for key, value in weights.tensors.items() if not is_unread(key, layout)}
    matched = {}
    for key, value in expected.items():
        key_in_file = names[key]
        tensor = unused.pop(key_in_file, None) if key_in_file else None
        # The file decides the number of classes.
        shape = value.shape
        if tensor is not None and key in classifier and tensor.ndim and len(tensor):
            shape = torch.Size([len(tensor), *shape[1:]])
        if tensor is not None and tensor.shape != shape:
            return f"{key_in_file} has shape {tuple(tensor.shape)}, not {tuple(shape)}", {}
        if tensor is not None and value.is_floating_point() and not tensor.is_floating_point():
            return f"{key_in_file} is not a dense tensor of floating-point numbers", {}
        if tensor is not None:
            matched[key] = tensor
        elif key.endswith(".num_batches_tracked"):
            matched[key] = torch.zeros((), dtype=torch.int64)
        elif key not in classifier:
            return f"{key_in_file} is missing", {}
    if unused:
        return f"unexpected key {next(iter(unused))}", {}
    heads = {len(matched[key]) for key in classifier if key in matched}
    if len(heads) > 1 or (heads and not set(classifier) <= matched.keys()):
        return f"{' and '.join(classifier)} do not match each other", {}
    return None, matched


def _build_expected(name: str) -> dict[str, Tensor]:
    """Return a network's tensors on the meta device: shapes and types only."""
    with torch.device("meta"):
        return build_model(name).state_dict()


_list_expected = functools.cache(_build_expected)  # for built-in networks, which no registration can change


def _list_classifier(name: str, keys: Iterable[str]) -> list[str]:
    """Return the keys of a network's classifier: its weight, and its bias if it has one."""
    head = find_head(name)
    return [key for key in (f"{head}.weight", f"{head}.bias") if key in keys]


def _list_names(name: str, expected: dict[str, Tensor], layout: str) -> dict[str, str | None]:
    """Return the file's name of each of a network's tensors; None for a tensor that its layout lacks."""
    if name in ARCHITECTURES:
        # MSRA's names are only for networks whose blocks have their strides in the first convolution.
        own_layout = "official" if layout == "caffe2" and not strides_first(name) else layout
        return {key: rename(key, own_layout) for key in expected}
    # A registered network may be a wrapper itself: remove from its own keys what is removed from the file's.
    return dict(zip(expected, _without_wrappers(expected), strict=True))


def _require_tensors(content: Any, source: str) -> dict[str, Tensor]:
    """Return the content if it is a state dict: names and dense tensors."""
    if not isinstance(content, dict):
        raise CheckpointError(f"{source}: holds a {type(content).__name__}, not a state dict")
    # torch's AveragedModel has a counter beside its module's tensors.
    tensors = {key: value for key, value in content.items() if key != "n_averaged"}
    for key, value in tensors.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise CheckpointError(f"{source}: {key} is not a tensor: not a state dict")
        if value.is_meta or value.layout != torch.strided:
            raise CheckpointError(f"{source}: {key} is not a dense tensor of floating-point numbers")
        # A few numbers in the file may be expanded to a classifier that does not fit into memory.
        if value.nbytes > value.untyped_storage().nbytes():
            raise CheckpointError(f"{source}: {key} {tuple(value.shape)} repeats its numbers: save its .clone()")
    return tensors


def _require_finite(weights: Weights) -> None:
    """Raise a CheckpointError that names the first tensor with a NaN or infinite value."""
    for key, value in weights.tensors.items():
        if not value.is_floating_point() or not value.numel():
            continue
        # Lowest and highest value, NaN if any value is NaN; only types of one byte need a copy.
        extremes = torch.stack((value.float() if value.itemsize == 1 else value).aminmax())
        if not extremes.isfinite().all():
            raise CheckpointError(f"{weights.source}: {key} has values that are not finite: not usable weights")


def _without_wrappers(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Remove the prefixes that DistributedDataParallel, torch.compile and Lightning add to every key, in any order."""
    for prefix in ("module.", "_orig_mod.", "model."):
        if tensors and all(key.startswith(prefix) for key in tensors):
            return _without_wrappers({key.removeprefix(prefix): value for key, value in tensors.items()})
    return tensors
