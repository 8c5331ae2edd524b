"""resnest-eval: the accuracy of a checkpoint at one or several crops."""

from pathlib import Path
from typing import TYPE_CHECKING

from resnest_imagenet.commands.launch import run_command
from resnest_imagenet.config_reading import AnyProtocolOptions, EvalConfig, OwnProtocolOptions
from resnest_imagenet.errors import ConfigError
from resnest_imagenet.recipe import BoxProtocolOptions, RegionProtocolOptions

if TYPE_CHECKING:
    import torch

    from resnest_imagenet.evaluation.results import CropResult
    from resnest_imagenet.weights.load import Weights


def run(config: EvalConfig) -> None:
    """Evaluate and print the table."""
    from resnest_imagenet.distributed import launched_as
    from resnest_imagenet.tasks.evaluate_checkpoint import format_class_results, format_results
    from resnest_imagenet.weights.detection import DETECTION
    from resnest_imagenet.weights.segmentation import SEGMENTATION

    weights, device = read_network(config)
    if weights.task == SEGMENTATION:
        text = evaluate_scenes(config, weights, device)
    elif weights.task == DETECTION:
        text = evaluate_objects(config, weights, device)
    else:
        results = evaluate_images(config, weights, device)
        text = f"{format_results(results)}\n\n{format_class_results(results)}"
    if launched_as().rank == 0:
        print(text)


def read_network(config: EvalConfig) -> tuple["Weights", "torch.device"]:
    """Return the weights, of any task, and the device, after what can be refused before."""
    from resnest_imagenet.inference.images import prepare_inference
    from resnest_imagenet.weights.detection import DETECTION
    from resnest_imagenet.weights.load import TASK, read_weights
    from resnest_imagenet.weights.published_rcnn import adopt_rcnn
    from resnest_imagenet.weights.segmentation import SEGMENTATION

    name = config.model.name if config.model else None
    outputs = {"out": config.out, "predictions": config.predictions}
    device = prepare_inference([name], config.loader.name, config.device, outputs)
    weights = adopt_rcnn(read_weights(config.ckpt, config.weights, (TASK, SEGMENTATION, DETECTION)))
    require_classifier("tta", config.tta, weights)
    return weights, device


def require_classifier(option: str, value: str | None, weights: "Weights") -> None:
    """Raise a ConfigError where an option of classification is set for a network of another task."""
    from resnest_imagenet.weights.load import TASK
    from resnest_imagenet.weights.segmentation import SEGMENTATION

    if value is not None and weights.task != TASK:
        hint = (
            ": protocol.flip=true sees the mirrored scene too"
            if (option, weights.task) == ("tta", SEGMENTATION)
            else ""
        )
        raise ConfigError(f"{option}={value} is of classification: {weights.source} is of {weights.task}{hint}")


def evaluate_images(config: EvalConfig, weights: "Weights", device: "torch.device") -> list["CropResult"]:
    """Evaluate on the data set's val folder; write `config.out` and `config.predictions` where they are set."""
    from resnest_imagenet.data.parts import ClassifiedData
    from resnest_imagenet.distributed import launched_as
    from resnest_imagenet.inference.classifier import open_classifier
    from resnest_imagenet.inference.images import open_own_val
    from resnest_imagenet.tasks.evaluate_checkpoint import evaluate, write_evaluations, write_results

    protocol = take_own_protocol(config.protocol)
    is_main = launched_as().rank == 0
    images = open_own_val(ClassifiedData.of(config.data.model_dump()), weights)
    name = config.model.name if config.model else None
    classifier = open_classifier(weights, name, crop=config.crop, protocol=protocol.list_changes(), device=device)
    evaluations = evaluate(
        classifier,
        images,
        batch_size=config.batch_size,
        precision=config.precision,
        tta=config.tta,
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
    from resnest_imagenet.data.scenes import open_scenes
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
    # Without another kind the folder is in the layout that the network was trained on.
    kind = segmenter.data_kind if config.data.kind == "folder" else config.data.kind
    scenes = open_scenes(kind, config.data.root, config.data.val_dir)
    if launched_as().rank == 0:
        print_notes(scenes.images)
    regions = evaluate_segmenter(segmenter, scenes, precision=config.precision, workers=config.loader.workers)
    if launched_as().rank == 0 and config.out is not None:
        write_regions(Path(config.out), segmenter, kind, regions)
    if launched_as().rank == 0 and config.predictions is not None:
        write_scenes(Path(config.predictions), segmenter, scenes, regions)
    return format_regions(segmenter, regions)


def evaluate_objects(config: EvalConfig, weights: "Weights", device: "torch.device") -> str:
    """Evaluate a detector likewise; return the table."""
    from resnest_imagenet.data.coco import open_coco
    from resnest_imagenet.data.source import print_notes
    from resnest_imagenet.distributed import launched_as
    from resnest_imagenet.inference.detector import open_detector
    from resnest_imagenet.tasks.evaluate_detection import (
        evaluate_detector,
        format_scores,
        write_detections,
        write_scores,
    )

    given = take_box_protocol(config.protocol)
    if config.crop is not None or config.compile:
        raise ConfigError("crop and compile are of classification: set protocol.short_side=... of protocol=coco")
    if config.predictions is not None and Path(config.predictions).suffix != ".json":
        raise ConfigError(f"predictions={config.predictions}: a detector's results are JSON: let it end in .json")
    detector = open_detector(weights, protocol=given, device=device)
    data = config.data
    if data.kind not in ("coco", "folder"):
        raise ConfigError(f"data.kind={data.kind}: a detector is evaluated on data=coco")
    # Without data=coco the folder is COCO's own.
    val_dir = data.val_dir if data.kind == "coco" or data.val_dir != "val" else None
    instances = open_coco(data.root, "val", data.val_json, val_dir, masks=detector.finds_masks)
    if launched_as().rank == 0:
        print_notes(instances.images)
    scores, truth = evaluate_detector(detector, instances, precision=config.precision, workers=config.loader.workers)
    if launched_as().rank == 0 and config.out is not None:
        write_scores(Path(config.out), detector, scores, truth)
    if launched_as().rank == 0 and config.predictions is not None:
        write_detections(Path(config.predictions), scores, truth)
    return format_scores(detector, scores, truth)


def take_own_protocol(protocol: AnyProtocolOptions) -> OwnProtocolOptions:
    """Return the protocol of a network of classification; a ConfigError for another task's."""
    if isinstance(protocol, OwnProtocolOptions):
        return protocol
    raise ConfigError(f"{_describe_protocol(protocol)}: choose own, paper, ecentercrop or full")


def take_region_protocol(protocol: AnyProtocolOptions) -> RegionProtocolOptions | None:
    """Return the protocol of a network of segmentation, None for its own; a ConfigError for another task's."""
    if isinstance(protocol, RegionProtocolOptions) or is_own_protocol(protocol):
        return protocol if isinstance(protocol, RegionProtocolOptions) else None
    raise ConfigError(f"{_describe_protocol(protocol)}: choose own, whole, slide, centre or published")


def take_box_protocol(protocol: AnyProtocolOptions) -> BoxProtocolOptions | None:
    """Return the protocol of a detector, None for its own; a ConfigError for another task's."""
    if isinstance(protocol, BoxProtocolOptions) or is_own_protocol(protocol):
        return protocol if isinstance(protocol, BoxProtocolOptions) else None
    raise ConfigError(f"{_describe_protocol(protocol)}: choose own or coco")


def is_own_protocol(protocol: AnyProtocolOptions) -> bool:
    """Return whether it is that of the network's own evaluation."""
    return isinstance(protocol, OwnProtocolOptions) and not protocol.list_changes()


def _describe_protocol(protocol: AnyProtocolOptions) -> str:
    """Return the start of a line about a protocol of another task."""
    if isinstance(protocol, RegionProtocolOptions):
        return f"protocol={protocol.name} is of segmentation"
    return f"protocol is of {'detection' if isinstance(protocol, BoxProtocolOptions) else 'classification'}"


def main() -> None:
    """Entry of resnest-eval and of torchrun -m resnest_imagenet.commands.evaluate."""
    run_command("eval", EvalConfig, run)


if __name__ == "__main__":
    main()
