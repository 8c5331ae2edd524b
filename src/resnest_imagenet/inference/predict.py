"""The likeliest classes of single images."""

import csv
import io
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from tqdm import tqdm

from resnest_imagenet import distributed
from resnest_imagenet.compute import keep_freed_memory
from resnest_imagenet.config import PredictConfig
from resnest_imagenet.data.examine import split_unreadable
from resnest_imagenet.data.folder import find_images
from resnest_imagenet.data.loader import build_loader, choose_loader
from resnest_imagenet.data.plan import plan_evaluation
from resnest_imagenet.data.source import print_notes
from resnest_imagenet.errors import ConfigError, printable
from resnest_imagenet.evaluation.cells import guard
from resnest_imagenet.files import replacing, require_writable
from resnest_imagenet.inference.classifier import compute_probabilities, open_classifier
from resnest_imagenet.models.imagenet_classes import class_words
from resnest_imagenet.models.zoo import require_model


@dataclass(frozen=True)
class Prediction:
    """One of the likeliest classes of an image.

    Attributes:
        file: the image's.
        rank: 1 is the likeliest.
        label: the class's name in the checkpoint: its folder, or a synset.
        description: the class in words.
        probability: between 0 and 1.
    """

    file: str
    rank: int
    label: str
    description: str
    probability: float


def predict_images(config: PredictConfig) -> tuple[list[Prediction], list[str]]:
    """Predict, and write `config.out` if it is set; images that cannot be used are skipped.

    Returns:
        The predictions, by image and rank, and a line for each image that was skipped.

    Raises:
        UserError: for what a user can cause, as one line.
    """
    if config.model is not None:
        require_model(config.model.name)
    choose_loader(config.loader.name)
    device = distributed.choose_device(config.device)
    keep_freed_memory()
    if config.out is not None:
        if Path(config.out).suffix not in (".csv", ".json"):
            raise ConfigError(f"out={config.out} ends neither in .csv nor in .json")
        require_writable(Path(config.out), "out")
    found = find_images(config.images)
    print_notes(found)
    images, faults = split_unreadable(found)
    predictions: list[Prediction] = []
    if len(images):
        classifier = open_classifier(config.ckpt, config.model.name if config.model else None, config, device)
        described = class_words(classifier.classes)
        plan = plan_evaluation(len(images), config.batch_size, 0, 1)
        loader = build_loader(config.loader.name, images, plan, classifier.transform, device, config.loader.workers)
        done = 0
        with tqdm(total=len(images), unit="image", disable=None, dynamic_ncols=True, leave=False) as progress:
            batches = compute_probabilities([classifier], loader, device, config.precision, images.name)
            for (probabilities,) in batches:
                best = probabilities.topk(min(config.top, probabilities.shape[1]))
                for values, indices in zip(best.values.tolist(), best.indices.tolist(), strict=True):
                    file = images.name(done)
                    done += 1
                    predictions += [
                        Prediction(file, rank, classifier.classes[index], described[index], round(value, 6))
                        for rank, (value, index) in enumerate(zip(values, indices, strict=True), 1)
                    ]
                progress.update(len(probabilities))
    if config.out is not None:
        with replacing(Path(config.out)) as target:
            target.write(_encode(predictions, Path(config.out).suffix).encode(errors="surrogateescape"))
    return predictions, faults


def format_predictions(predictions: list[Prediction]) -> str:
    """Return a table for people: each image with its likeliest classes."""
    lines = []
    for each in predictions:
        lines += [printable(each.file)] if each.rank == 1 else []
        name = each.description if each.description == each.label else f"{each.description} ({each.label})"
        lines.append(f"  {100 * each.probability:>6.2f} %  {printable(name)}")
    return "\n".join(lines)


def _encode(predictions: list[Prediction], suffix: str) -> str:
    rows = [asdict(each) for each in predictions]
    if suffix == ".json":
        return json.dumps(rows, indent=1) + "\n"
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(Prediction)], lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: guard(value) for key, value in row.items()} for row in rows)
    return text.getvalue()
