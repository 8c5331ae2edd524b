"""The accuracy of a checkpoint at one or several crops."""

from pathlib import Path

import torch
from torch import Tensor, nn

from resnest_imagenet import distributed
from resnest_imagenet.compute import keep_freed_memory, place
from resnest_imagenet.config import EvalConfig
from resnest_imagenet.data.loader import build_loader, choose_loader, open_source
from resnest_imagenet.data.plan import plan_evaluation
from resnest_imagenet.data.source import print_notes
from resnest_imagenet.evaluation.accuracy import Evaluation, measure_accuracy
from resnest_imagenet.evaluation.predictions import encode_predictions
from resnest_imagenet.evaluation.results import CropResult, Results
from resnest_imagenet.files import replacing, require_writable
from resnest_imagenet.inference.classifier import choose_transforms
from resnest_imagenet.inference.labels import label_images
from resnest_imagenet.models.folding import fold_batch_norms
from resnest_imagenet.models.zoo import count_outputs, require_model
from resnest_imagenet.supervision import EVALUATING, supervise
from resnest_imagenet.weights.load import read_weights, restore_network


def evaluate_checkpoint(config: EvalConfig) -> list[CropResult]:
    """Evaluate a checkpoint on the data set's val folder, at each crop; write `config.out` and `config.predictions`.

    Raises:
        UserError: for what a user can cause, as one line.
    """
    if config.model is not None:
        require_model(config.model.name)
    choose_loader(config.loader.name)
    device = distributed.choose_device(config.device)
    keep_freed_memory()
    rank, _, _ = distributed.launched_as()
    for option, path in (("out", config.out), ("predictions", config.predictions)):
        if rank == 0 and path is not None:
            require_writable(Path(path), option)
    images = open_source(config.data.kind, config.data.root, config.data.val_dir, "data.val_dir")
    if rank == 0:
        print_notes(images)
    weights = read_weights(config.ckpt, config.weights)
    model, name = restore_network(weights, config.model.name if config.model else None)
    num_outputs = count_outputs(model, name)
    images = label_images(images, weights.classes, num_outputs, weights.source)
    transforms = choose_transforms(weights, name, config.crop, config.protocol)
    with distributed.join(device) as ranks, supervise(ranks) as watch:
        model = place(fold_batch_norms(model), ranks.device)
        if config.compile:
            model.compile(dynamic=True, options={"freezing": True})  # once for all crops, where they are not tiny
            model = _FullBatches(model, config.batch_size)
        plan = plan_evaluation(len(images), config.batch_size, ranks.rank, ranks.world_size)
        # All before the first is used: what one of them refuses is known at once.
        loaders = [
            build_loader(config.loader.name, images, plan, transform, ranks.device, config.loader.workers)
            for transform in transforms
        ]
        evaluations: list[tuple[str, Evaluation]] = []

        def before_batch(batch: int, is_everywhere: bool) -> None:
            watch.at(len(evaluations), batch, EVALUATING)

        for transform in transforms:
            said = measure_accuracy(model, loaders.pop(0), ranks, config.precision, before_batch, images.name)
            evaluations.append((transform.protocol, said))
        results = [
            CropResult(
                crop=transform.crop,
                top1=said.top1,
                top5=said.top5,
                correct1=said.correct1,
                correct5=said.correct5,
                count=said.count,
                protocol=protocol,
            )
            for transform, (protocol, said) in zip(transforms, evaluations, strict=True)
        ]
        if ranks.is_main and config.out is not None:
            measured = Results(
                model=name,
                ckpt=config.ckpt,
                is_average=weights.is_average,
                num_classes=num_outputs,
                epoch=weights.epoch,
                training=weights.training,
                results=results,
            )
            with replacing(Path(config.out)) as file:
                file.write(measured.model_dump_json(indent=2).encode() + b"\n")
        if ranks.is_main and config.predictions is not None:
            with replacing(Path(config.predictions)) as file:
                file.write(encode_predictions(images, evaluations))
    return results


class _FullBatches(nn.Module):
    """Fills up the last batch, which may be smaller: a network is compiled again for another number of images."""

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


def format_results(results: list[CropResult]) -> str:
    """Return a table for people."""
    lines = [f"{'crop':>5} {'top-1 %':>8} {'top-5 %':>8} {'images':>7}  protocol"]
    for r in results:
        lines.append(f"{r.crop:>5} {r.top1:>8.2f} {r.top5:>8.2f} {r.count:>7}  {r.protocol}")
    return "\n".join(lines)
