"""Measures the accuracy of a network at one or several crops."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor, nn

from resnest_imagenet import distributed
from resnest_imagenet.data.loader import build_loader
from resnest_imagenet.data.plan import plan_evaluation
from resnest_imagenet.data.source import ImageSource
from resnest_imagenet.evaluation.accuracy import TOP, Evaluation, measure_accuracy
from resnest_imagenet.evaluation.class_table import format_classes, list_classes
from resnest_imagenet.evaluation.mistakes import ClassFigures, count_confusions, measure_classes
from resnest_imagenet.evaluation.operators import choose_attention, choose_gpu_decoder
from resnest_imagenet.evaluation.predictions import encode_predictions
from resnest_imagenet.evaluation.results import CropResult, Results
from resnest_imagenet.files import write_atomically
from resnest_imagenet.inference.classifier import Classifier, take_classifier
from resnest_imagenet.inference.images import list_classified_images
from resnest_imagenet.inference.labels import label_images
from resnest_imagenet.inference.options import check_arguments
from resnest_imagenet.models.mirror import average_views, name_protocol
from resnest_imagenet.supervision import EVALUATING, supervise


@dataclass(frozen=True)
class CropEvaluation:
    """An accuracy with its images.

    Attributes:
        crop: side of the images that the network saw, in pixels.
        protocol: how the images were resized and cropped, and a test-time augmentation.
        images: the set, labelled by the network's outputs.
        evaluation: of each image.
        tta: the test-time augmentation, or None.
    """

    crop: int
    protocol: str
    images: ImageSource
    evaluation: Evaluation
    tta: str | None = None

    @property
    def top1(self) -> float:
        """Top-1 accuracy in percent."""
        return self.evaluation.top1

    @property
    def top5(self) -> float:
        """Top-5 accuracy in percent."""
        return self.evaluation.top5

    @property
    def figures(self) -> ClassFigures:
        """Precision, recall and F1 of each of the network's classes, `images.classes`."""
        return measure_classes(count_confusions(self.evaluation, len(self.images.classes)))

    @property
    def result(self) -> CropResult:
        """The numbers, without the images."""
        counts, figures = self.evaluation, self.figures
        return CropResult(
            crop=self.crop,
            top1=counts.top1,
            top5=counts.top5,
            correct1=counts.correct1,
            correct5=counts.correct5,
            count=counts.count,
            protocol=self.protocol,
            macro_precision=figures.macro_precision,
            macro_recall=figures.macro_recall,
            macro_f1=figures.macro_f1,
            classes=list_classes(figures, self.images.classes),
            tta=self.tta,
        )


def evaluate(
    network: Classifier | str | PathLike[str],
    images: ImageSource | str | PathLike[str],
    *,
    batch_size: int = 64,
    precision: str = "fp32",
    tta: str | None = None,
    compile_network: bool = False,
    loader: str = "auto",
    workers: int | None = None,
) -> list[CropEvaluation]:
    """Evaluate a network, each image once, at each of its crops; under torchrun the ranks share the images.

    Args:
        network: of `open_classifier`, or a source that it takes.
        images: a folder with one folder per true class, or any other source of images.
        batch_size: images at a time, per rank.
        precision: fp32, bf16 or fp16.
        tta: "flip": the mean of the probabilities of an image and its mirror image. None: of the image alone.
        compile_network: use torch.compile: it takes a minute first, then the network is some percent faster.
        loader: decodes the images: "auto", "dali" or "torchvision".
        workers: number of the loader's threads or processes; None: this process's cores, at most 8.

    Returns:
        One evaluation for each crop, the same on every rank.

    Raises:
        DataError: an image cannot be decoded, or a class has no output.
        UserError: another user's error, in one line.
    """
    arguments = check_arguments(batch_size=batch_size, precision=precision, tta=tta, loader=loader, workers=workers)
    listed = images if isinstance(images, ImageSource) else list_classified_images(images)
    classifier = take_classifier(network)
    labelled = label_images(listed, classifier.weights.classes, len(classifier.classes), classifier.source)
    compiled = _compile(classifier.module, arguments.batch_size) if compile_network else classifier.module
    module = average_views(compiled, tta)
    transforms = classifier.transforms
    with distributed.join(classifier.device) as ranks, supervise(ranks) as watch:
        plan = plan_evaluation(len(labelled), arguments.batch_size, ranks.rank, ranks.world_size)
        choose_gpu_decoder(labelled, arguments.loader, ranks)
        for transform in transforms if not compile_network else ():  # torch.compile fuses the formula
            size = (arguments.batch_size, transform.crop, transform.crop)
            choose_attention(classifier.module, size, precision, ranks)
        # Build all loaders before the first is used: a refusal then comes at once.
        loaders = [
            build_loader(arguments.loader, labelled, plan, transform, ranks.device, arguments.workers)
            for transform in transforms
        ]
        evaluations: list[Evaluation] = []

        def before_batch(batch: int, is_everywhere: bool) -> None:
            watch.at(len(evaluations), batch, EVALUATING)

        for _ in transforms:
            evaluations.append(measure_accuracy(module, loaders.pop(0), ranks, precision, before_batch, labelled.name))
    return [
        CropEvaluation(transform.crop, name_protocol(transform.protocol, tta), labelled, evaluation, tta)
        for transform, evaluation in zip(transforms, evaluations, strict=True)
    ]


def _compile(module: nn.Module, batch_size: int) -> nn.Module:
    """Return a network that is compiled at its first use, once for all crops unless they are tiny."""
    compiled = copy.copy(module)  # the caller's network does not change
    compiled.compile(dynamic=True, options={"freezing": True})
    return _FullBatches(compiled, batch_size)


class _FullBatches(nn.Module):
    """Fills up a smaller last batch: for another number of images, the network would be compiled again."""

    def __init__(self, model: nn.Module, batch_size: int) -> None:
        super().__init__()
        self.model = model
        self.batch_size = batch_size

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of the images (B, 3, H, W), B at most `batch_size`."""
        if len(images) < self.batch_size:
            full = images.new_zeros(self.batch_size, *images.shape[1:]).to(memory_format=torch.channels_last)
            full[: len(images)] = images
            return self.model(full)[: len(images)]
        return self.model(images)


def write_results(path: Path, classifier: Classifier, evaluations: Sequence[CropEvaluation]) -> None:
    """Write the accuracies of a network as JSON, for `read_measured`.

    Raises:
        StorageError: the file cannot be written.
    """
    weights = classifier.weights
    results = Results(
        model=classifier.name,
        ckpt=classifier.source,
        is_average=weights.is_average,
        num_classes=len(classifier.classes),
        epoch=weights.epoch,
        training=weights.training,
        results=[evaluation.result for evaluation in evaluations],
    )
    with write_atomically(path) as file:
        file.write(results.model_dump_json(indent=2).encode() + b"\n")


def write_evaluations(path: Path, evaluations: Sequence[CropEvaluation]) -> None:
    """Write predictions.csv: the prediction for each image at each crop.

    Raises:
        StorageError: the file cannot be written.
    """
    by_protocol = [(evaluation.protocol, evaluation.evaluation) for evaluation in evaluations]
    with write_atomically(path) as file:
        file.write(encode_predictions(evaluations[0].images, by_protocol))


def format_results(results: Sequence[CropResult]) -> str:
    """Return a table for people: a line for each result."""
    has_top5 = any(result.classes is None or len(result.classes) > TOP for result in results)
    lines = [f"{'crop':>5} {'top-1 %':>8} " + f"{'top-5 %':>8} " * has_top5 + f"{'images':>7}  protocol"]
    for result in results:
        top5 = f"{result.top5:>8.2f} " * has_top5
        lines.append(f"{result.crop:>5} {result.top1:>8.2f} {top5}{result.count:>7}  {result.protocol}")
    return "\n".join(lines)


def format_class_results(results: Sequence[CropResult]) -> str:
    """Return a table for people for each result: precision, recall and F1 of the classes."""
    tables = [(result, format_classes(result.classes)) for result in results if result.classes is not None]
    if len(tables) == 1:
        return tables[0][1]
    return "\n\n".join(f"{result.protocol}\n{table}" for result, table in tables)
