"""The accuracy of a checkpoint at one or several crops."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from resnest_imagenet import distributed
from resnest_imagenet.compute import place
from resnest_imagenet.config import EvalConfig
from resnest_imagenet.data.folder import ImageFolder, label_by_classes, read_image_folder
from resnest_imagenet.data.loader import build_loader, choose_loader
from resnest_imagenet.data.plan import plan_evaluation
from resnest_imagenet.data.transforms import EvalTransform
from resnest_imagenet.errors import ConfigError, DataError
from resnest_imagenet.evaluation.counting import evaluate
from resnest_imagenet.models.zoo import list_imagenet_classes, require_model
from resnest_imagenet.weights.load import Weights, read_weights, restore_network


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
    weights = read_weights(config.ckpt, config.weights)
    model, name = restore_network(weights, config.model.name if config.model else None)
    num_outputs = len(model.get_parameter("fc.bias"))
    folder = _label(folder, weights, num_outputs)
    with distributed.join(device) as ranks:
        model = place(model, ranks.device)
        plan = plan_evaluation(len(folder), config.batch_size, ranks.rank, ranks.world_size)
        results = []
        for crop in config.crop:
            transform = EvalTransform(crop, **config.protocol.model_dump())
            loader = build_loader(config.loader.name, folder, plan, transform, ranks.device, config.loader.workers)
            accuracy = evaluate(model, loader, ranks, config.precision)
            results.append(
                CropResult(crop, accuracy.top1, accuracy.top5, **asdict(accuracy), protocol=transform.protocol)
            )
        if ranks.is_main and config.out is not None:
            measured = {
                "model": name,
                "ckpt": config.ckpt,
                "num_classes": num_outputs,
                "recipe": weights.recipe,
                "results": [asdict(result) for result in results],
            }
            Path(config.out).write_text(json.dumps(measured, indent=2) + "\n")
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


def _label(folder: ImageFolder, weights: Weights, num_outputs: int) -> ImageFolder:
    """Number the images as the model's outputs are; a folder may hold a part of the classes."""
    if weights.classes is not None:
        return label_by_classes(folder, weights.classes, "the checkpoint's classes")
    if len(folder.classes) == num_outputs:
        return folder
    if num_outputs == 1000:
        return label_by_classes(folder, list_imagenet_classes(), "ImageNet's 1000")
    raise DataError(
        f"{folder.root} has {len(folder.classes)} classes, fc.weight of {weights.source} {num_outputs}: "
        "set data.root or ckpt"
    )
