"""resnest-export: writes a checkpoint's network for other programs."""

from functools import partial
from typing import TYPE_CHECKING

from resnest_imagenet.commands.evaluate import is_own_protocol, take_box_protocol, take_own_protocol
from resnest_imagenet.commands.launch import report_skipped, run_command
from resnest_imagenet.config_reading import ExportConfig
from resnest_imagenet.errors import ConfigError

if TYPE_CHECKING:
    from resnest_imagenet.weights.load import Weights


def run(config: ExportConfig) -> None:
    """Export, and print the line about the file."""
    from resnest_imagenet.weights.detection import DETECTION
    from resnest_imagenet.weights.graphs import require_form
    from resnest_imagenet.weights.load import TASK, read_weights
    from resnest_imagenet.weights.segmentation import SEGMENTATION

    require_form(config.format)
    export = {TASK: export_classifier, SEGMENTATION: export_segmenter, DETECTION: export_detector}
    weights = read_weights(config.ckpt, config.weights, tuple(export))
    if config.int8 is not None:
        if weights.task != TASK:
            raise ConfigError(f"int8 is of classification: {config.ckpt} is of {weights.task}")
        text, skipped = export_integers(config, config.int8, weights)
        print(text, flush=True)
        report_skipped(skipped)
        return
    print(export[weights.task](config, weights))


def export_integers(config: ExportConfig, images: str, weights: "Weights") -> tuple[str, list[str]]:
    """Export a network of classification in 8-bit integers; return the table, and a line per skipped image."""
    from resnest_imagenet.inference.quantise import export_int8

    return export_int8(
        weights,
        images,
        config.out,
        model=config.model.name if config.model else None,
        crop=config.crop,
        protocol=take_own_protocol(config.protocol).list_changes(),
        form=config.format,
        sizes=config.sizes,
    )


def export_classifier(config: ExportConfig, weights: "Weights") -> str:
    """Export a network of classification; return a line about the file."""
    from resnest_imagenet.inference.describe import describe_input
    from resnest_imagenet.weights.export import export_weights
    from resnest_imagenet.weights.graphs import SUFFIXES, export_graph
    from resnest_imagenet.weights.hub import export_folder

    model = config.model.name if config.model else None
    describe = partial(describe_input, crop=config.crop, protocol=take_own_protocol(config.protocol).list_changes())
    if config.format == "hub":
        return export_folder(weights, describe, config.out, model=model, push=config.push)
    if config.format in SUFFIXES:
        return export_graph(weights, describe, config.out, model=model, form=config.format, sizes=config.sizes)
    _refuse_images(config)
    return export_weights(weights, config.out, model=model, layout=config.layout, form=config.format)


def export_segmenter(config: ExportConfig, weights: "Weights") -> str:
    """Export a network of segmentation; return a line about the file."""
    from resnest_imagenet.inference.describe import describe_scene_input
    from resnest_imagenet.weights.export import export_deeplab
    from resnest_imagenet.weights.graphs import SUFFIXES, export_deeplab_graph
    from resnest_imagenet.weights.hub_deeplab import export_deeplab_folder

    if config.model is not None or not is_own_protocol(config.protocol):
        raise ConfigError(
            f"model and protocol are of classification: {config.ckpt} is of segmentation and has its run's"
        )
    if config.format == "hub":
        if config.crop is not None:
            raise ConfigError("crop with format=hub is of classification: a DeepLabV3 takes images of any size")
        return export_deeplab_folder(weights, describe_scene_input, config.out, push=config.push)
    if config.format in SUFFIXES:
        return export_deeplab_graph(
            weights, describe_scene_input, config.out, crop=config.crop, form=config.format, sizes=config.sizes
        )
    _refuse_images(config)
    return export_deeplab(weights, config.out, layout=config.layout, form=config.format)


def _refuse_images(config: ExportConfig) -> None:
    """Raise a ConfigError where an option about images is set for a state dict, which has none."""
    if config.crop is not None or not is_own_protocol(config.protocol):
        raise ConfigError(f"crop and protocol are of images: format={config.format} has weights alone")


def export_detector(config: ExportConfig, weights: "Weights") -> str:
    """Export a detector; return a line about the file."""
    from resnest_imagenet.inference.describe_objects import describe_object_input
    from resnest_imagenet.weights.export_rcnn import export_rcnn
    from resnest_imagenet.weights.graphs import SUFFIXES
    from resnest_imagenet.weights.graphs_rcnn import export_rcnn_graph
    from resnest_imagenet.weights.hub_rcnn import export_rcnn_folder

    if config.model is not None:
        raise ConfigError(f"model is of classification: {config.ckpt} is of detection and has its run's")
    protocol = take_box_protocol(config.protocol)
    describe = partial(describe_object_input, protocol=protocol)
    if config.format in SUFFIXES:
        values = protocol.model_dump() if protocol else None
        return export_rcnn_graph(
            weights, describe, config.out, protocol=values, crop=config.crop, form=config.format, sizes=config.sizes
        )
    if config.format == "hub":
        if config.crop is not None or protocol is not None:
            raise ConfigError("crop and protocol with format=hub are of classification: a detector has its run's")
        return export_rcnn_folder(weights, describe, config.out, push=config.push)
    _refuse_images(config)
    return export_rcnn(weights, config.out, layout=config.layout, form=config.format)


def main() -> None:
    """Entry of resnest-export."""
    run_command("export", ExportConfig, run)


if __name__ == "__main__":
    main()
