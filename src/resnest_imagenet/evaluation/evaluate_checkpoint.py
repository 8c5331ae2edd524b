"""The accuracy of a checkpoint at one or several crops."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from resnest_imagenet import distributed
from resnest_imagenet.checkpoint import load_checkpoint
from resnest_imagenet.compute import place
from resnest_imagenet.config import EvalConfig
from resnest_imagenet.data.folder import ImageFolder, label_by_classes, read_image_folder
from resnest_imagenet.data.loader import build_loader, choose_loader
from resnest_imagenet.data.plan import plan_evaluation
from resnest_imagenet.data.transforms import EvalTransform
from resnest_imagenet.errors import CheckpointError, ConfigError, DataError
from resnest_imagenet.evaluation.counting import evaluate
from resnest_imagenet.models.zoo import build_model, list_imagenet_classes, require_model


@dataclass(frozen=True)
class CropResult:
    """Accuracy under one protocol.

    Attributes:
        crop: side of the images the model saw, in pixels.
        top1, top5: percent.
        correct1, correct5, count: the integers behind them.
        protocol: how the images were resized and cropped.
    """

    crop: int
    top1: float
    top5: float
    correct1: int
    correct5: int
    count: int
    protocol: str


def evaluate_checkpoint(config: EvalConfig) -> list[CropResult]:
    """Evaluate a checkpoint on the data set's val folder, at each crop; write `config.out` if it is set.

    Raises:
        UserError: for what a user can cause, as one line.
    """
    if config.model is not None:
        require_model(config.model.name)
    choose_loader(config.loader.name)
    device = distributed.choose_device(config.device)
    rank, _, _ = distributed.launched_as()
    if rank == 0 and config.out is not None:
        _require_writable(Path(config.out))
    folder = read_image_folder(config.data.root, config.data.val_dir, "data.val_dir")
    model, classes = restore_model(config)
    folder = _label(folder, classes, num_outputs=len(model.get_parameter("fc.bias")))
    with distributed.join(device) as ranks:
        model = place(model, ranks.device)
        plan = plan_evaluation(len(folder), config.batch_size, ranks.rank, ranks.world_size)
        results = []
        for crop in config.crop:
            transform = EvalTransform(crop, config.ratio)
            loader = build_loader(config.loader.name, folder, plan, transform, ranks.device, config.loader.workers)
            accuracy = evaluate(model, loader, ranks, config.precision)
            results.append(
                CropResult(crop, accuracy.top1, accuracy.top5, **asdict(accuracy), protocol=transform.protocol)
            )
        if ranks.is_main and config.out is not None:
            Path(config.out).write_text(
                json.dumps({"results": [asdict(result) for result in results]}, indent=2) + "\n"
            )
    return results


def _require_writable(out: Path) -> None:
    """Make the folder of the results file, and raise a ConfigError now rather than after the evaluation."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.open("a").close()
    except OSError as error:
        raise ConfigError(f"out={out}: cannot be written ({error.strerror})") from error


def format_results(results: list[CropResult]) -> str:
    """Return a table for people."""
    lines = [f"{'crop':>5} {'top-1 %':>8} {'top-5 %':>8} {'images':>7}  protocol"]
    for r in results:
        lines.append(f"{r.crop:>5} {r.top1:>8.2f} {r.top5:>8.2f} {r.count:>7}  {r.protocol}")
    return "\n".join(lines)


def restore_model(config: EvalConfig) -> tuple[nn.Module, list[str] | None]:
    """Rebuild the network of a checkpoint from the configuration inside it, or of bare weights from `config.model`.

    Returns:
        The model on the CPU, and the class names in the order of its outputs where the checkpoint knows them.

    Raises:
        CheckpointError: unreadable, or other keys or shapes than the network's.
        ConfigError: options that the checkpoint cannot meet.
    """
    content = load_checkpoint(config.ckpt)
    if not {"model", "ema", "config", "classes"} <= content.keys():
        return _restore_bare(content, config), None
    options = content["config"]["model"]
    if config.model is not None and config.model.name != options["name"]:
        raise ConfigError(f"model={config.model.name}, but {config.ckpt} holds a {options['name']}: leave model= out")
    if config.weights == "ema" and content["ema"] is None:
        raise ConfigError(f"weights=ema, but {config.ckpt} was trained without a moving average")
    use_ema = config.weights != "model" and content["ema"] is not None
    model = build_model(options["name"], options["num_classes"])
    load_weights(model, content["ema" if use_ema else "model"], config.ckpt)
    return model, content["classes"]


def _restore_bare(weights: dict[str, Any], config: EvalConfig) -> nn.Module:
    if config.model is None:
        raise ConfigError(f"{config.ckpt} holds bare weights: name their network with model=NAME")
    if config.weights == "ema":
        raise ConfigError(f"weights=ema, but {config.ckpt} holds bare weights")
    classifier = weights.get("fc.weight")
    if not isinstance(classifier, Tensor) or classifier.ndim != 2:
        raise CheckpointError(f"{config.ckpt}: lacks fc.weight: not a checkpoint of {config.model.name}")
    model = build_model(config.model.name, num_classes=len(classifier))
    load_weights(model, weights, config.ckpt)
    return model


def load_weights(model: nn.Module, weights: Mapping[str, Any], source: str) -> None:
    """Load a state dict, all of it or nothing.

    Raises:
        CheckpointError: names the first key that is missing, superfluous or of another shape.
    """
    expected = model.state_dict()
    for key, value in expected.items():
        if not isinstance(weights.get(key), Tensor):
            raise CheckpointError(f"{source}: lacks {key}: not a checkpoint of this network")
        if weights[key].shape != value.shape:
            theirs, ours = tuple(weights[key].shape), tuple(value.shape)
            raise CheckpointError(
                f"{source}: {key} has shape {theirs}, the network {ours}: another model or class count"
            )
    for key in weights:
        if key not in expected:
            raise CheckpointError(f"{source}: {key} is not part of the network: not a checkpoint of this network")
    model.load_state_dict(weights)


def _label(folder: ImageFolder, classes: list[str] | None, num_outputs: int) -> ImageFolder:
    """Number the images as the model's outputs are; a folder may hold a part of the classes."""
    if classes is not None:
        return label_by_classes(folder, classes, "the checkpoint's classes")
    if len(folder.classes) == num_outputs:
        return folder
    if num_outputs == 1000:
        return label_by_classes(folder, list_imagenet_classes(), "ImageNet's 1000")
    raise DataError(f"{folder.root} has {len(folder.classes)} classes, the model {num_outputs}")
