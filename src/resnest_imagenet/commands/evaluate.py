"""resnest-eval: the accuracy of a checkpoint at one or several crops."""

from pathlib import Path
from typing import TYPE_CHECKING

from resnest_imagenet.commands.launch import run_command
from resnest_imagenet.config import EvalConfig

if TYPE_CHECKING:
    from resnest_imagenet.evaluation.results import CropResult


def run(config: EvalConfig) -> None:
    """Evaluate and print the table."""
    from resnest_imagenet.distributed import launched_as
    from resnest_imagenet.tasks.evaluate_checkpoint import format_results

    results = evaluate_checkpoint(config)
    if launched_as()[0] == 0:
        print(format_results(results))


def evaluate_checkpoint(config: EvalConfig) -> list["CropResult"]:
    """Evaluate on the data set's val folder; write `config.out` and `config.predictions` where they are set."""
    from resnest_imagenet.data.loader import open_source
    from resnest_imagenet.data.source import print_notes
    from resnest_imagenet.distributed import launched_as
    from resnest_imagenet.inference.classifier import open_classifier
    from resnest_imagenet.inference.images import prepare_inference
    from resnest_imagenet.tasks.evaluate_checkpoint import evaluate, write_evaluations, write_results

    is_main = launched_as()[0] == 0
    name = config.model.name if config.model else None
    outputs = {"out": config.out, "predictions": config.predictions}
    device = prepare_inference([name], config.loader.name, config.device, outputs)
    images = open_source(config.data.kind, config.data.root, config.data.val_dir, "data.val_dir")
    if is_main:
        print_notes(images)
    protocol = config.protocol.list_changes()
    classifier = open_classifier(config.ckpt, name, config.weights, config.crop, protocol, device)
    evaluations = evaluate(
        classifier,
        images,
        batch_size=config.batch_size,
        precision=config.precision,
        compile_network=config.compile,
        loader=config.loader.name,
        workers=config.loader.workers,
    )
    if is_main and config.out is not None:
        write_results(Path(config.out), classifier, evaluations)
    if is_main and config.predictions is not None:
        write_evaluations(Path(config.predictions), evaluations)
    return [evaluation.result for evaluation in evaluations]


def main() -> None:
    """Entry of resnest-eval and of torchrun -m resnest_imagenet.commands.evaluate."""
    run_command("eval", EvalConfig, run)


if __name__ == "__main__":
    main()
