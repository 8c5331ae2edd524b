"""resnest-eval: the accuracy of a checkpoint at one or several crops."""

from pathlib import Path
from typing import TYPE_CHECKING

from resnest_imagenet.commands.launch import run_command
from resnest_imagenet.config import EvalConfig, OwnProtocolOptions
from resnest_imagenet.errors import ConfigError
from resnest_imagenet.recipe import RegionProtocolOptions

if TYPE_CHECKING:
    import torch

    from resnest_imagenet.evaluation.results import CropResult
    from resnest_imagenet.weights.load import Weights


def run(config: EvalConfig) -> None:
    """Evaluate and print the table."""
    from resnest_imagenet.distributed import launched_as
    from resnest_imagenet.tasks.evaluate_checkpoint import format_results
    from resnest_imagenet.weights.segmentation import SEGMENTATION

    weights, device = read_network(config)
    if weights.task == SEGMENTATION:
        text = evaluate_scenes(config, weights, device)
    else:
        text = format_results(evaluate_images(config, weights, device))
    if launched_as().rank == 0:
        print(text)


def read_network(config: EvalConfig) -> tuple["Weights", "torch.device"]:
    """Return the weights, of any task, and the device, after what can be refused before."""
    from resnest_imagenet.inference.images import prepare_inference
    from resnest_imagenet.weights.load import TASK, read_weights
    from resnest_imagenet.weights.segmentation import SEGMENTATION

    name = config.model.name if config.model else None
    outputs = {"out": config.out, "predictions": config.predictions}
    device = prepare_inference([name], config.loader.name, config.device, outputs)
    return read_weights(config.ckpt, config.weights, (TASK, SEGMENTATION)), device


def evaluate_images(config: EvalConfig, weights: "Weights", device: "torch.device") -> list["CropResult"]:
    """Evaluate on the data set's val folder; write `config.out` and `config.predictions` where they are set."""
    from resnest_imagenet.data.loader import open_source
    from resnest_imagenet.data.source import print_notes
    from resnest_imagenet.distributed import launched_as
    from resnest_imagenet.inference.classifier import open_classifier
    from resnest_imagenet.tasks.evaluate_checkpoint import evaluate, write_evaluations, write_results

    protocol = take_own_protocol(config.protocol)
    is_main = launched_as().rank == 0
    images = open_source(config.data.kind, config.data.root, config.data.val_dir, "data.val_dir")
    if is_main:
        print_notes(images)
    name = config.model.name if config.model else None
    classifier = open_classifier(weights, name, crop=config.crop, protocol=protocol.list_changes(), device=device)
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


def evaluate_scenes(config: EvalConfig, weights: "Weights", device: "torch.device") -> str:
    """Evaluate a network of segmentation likewise; return the table."""
    from resnest_imagenet.data.scenes import LAYOUTS, open_scenes
    from resnest_imagenet.data.source import print_notes
    from resnest_imagenet.distributed import launched_as
    from resnest_imagenet.inference.segmenter import open_segmenter
    from resnest_imagenet.tasks.evaluate_segmentation import (
        evaluate_segmenter,
        format_regions,
        write_regions,
        write_scenes,
    )

    given = take_region_protocol(config.protocol)
    if config.crop is not None or config.compile:
        raise ConfigError(
            "crop and compile are of classification: set protocol.crop=... of protocol=slide or published"
        )
    segmenter = open_segmenter(weights, protocol=given, device=device)
    kind = config.data.kind if config.data.kind in LAYOUTS else segmenter.data_kind
    scenes = open_scenes(kind, config.data.root, config.data.val_dir)
    if launched_as().rank == 0:
        print_notes(scenes.images)
    regions = evaluate_segmenter(segmenter, scenes, precision=config.precision, workers=config.loader.workers)
    if launched_as().rank == 0 and config.out is not None:
        write_regions(Path(config.out), segmenter, kind, regions)
    if launched_as().rank == 0 and config.predictions is not None:
        write_scenes(Path(config.predictions), segmenter, scenes, regions)
    return format_regions(segmenter, regions)


def take_own_protocol(protocol: OwnProtocolOptions | RegionProtocolOptions) -> OwnProtocolOptions:
    """Return the protocol of a network of classification; a ConfigError for another task's."""
    if isinstance(protocol, RegionProtocolOptions):
        raise ConfigError(f"protocol={protocol.name} is of segmentation: choose own, paper, ecentercrop or full")
    return protocol


def take_region_protocol(protocol: OwnProtocolOptions | RegionProtocolOptions) -> RegionProtocolOptions | None:
    """Return the protocol of a network of segmentation, None for its own; a ConfigError for another task's."""
    if isinstance(protocol, RegionProtocolOptions):
        return protocol
    if protocol.list_changes():
        raise ConfigError("protocol is of classification: choose own, whole, slide, centre or published")
    return None


def main() -> None:
    """Entry of resnest-eval and of torchrun -m resnest_imagenet.commands.evaluate."""
    run_command("eval", EvalConfig, run)


if __name__ == "__main__":
    main()
