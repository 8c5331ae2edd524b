"""resnest-export: a checkpoint for other programs."""

from functools import partial
from typing import TYPE_CHECKING

from resnest_imagenet.commands.launch import run_command
from resnest_imagenet.config import ExportConfig

if TYPE_CHECKING:
    from resnest_imagenet.weights.card import ImageInput
    from resnest_imagenet.weights.load import Weights


def run(config: ExportConfig) -> None:
    """Import torch only now, and export."""
    from resnest_imagenet.weights.export import export_weights
    from resnest_imagenet.weights.graphs import export_graph
    from resnest_imagenet.weights.hub import export_folder

    if config.format in ("pth", "safetensors"):
        line = export_weights(config)
    else:
        export = export_folder if config.format == "hub" else export_graph
        line = export(config, partial(describe_input, config))
    print(line)


def describe_input(config: ExportConfig, weights: "Weights", name: str) -> "ImageInput":
    """Return how images are brought to the crop, for the program that will do it.

    Args:
        config: what was asked for.
        weights: of the network.
        name: of the network.
    """
    from resnest_imagenet.data.transforms import MEAN, STD
    from resnest_imagenet.inference.classifier import choose_transforms
    from resnest_imagenet.weights.card import ImageInput

    crops = None if config.crop is None else [config.crop]
    (transform,) = choose_transforms(weights, name, crops, config.protocol)
    mean, std = (tuple(round(value / 255, 3) for value in values) for values in (MEAN, STD))
    return ImageInput(
        transform.crop,
        transform.resolved_ratio,
        transform.resolved_interpolation,
        transform.order,
        transform.antialias,
        transform.protocol,
        mean,
        std,
    )


def main() -> None:
    """Entry of resnest-export."""
    run_command("export", ExportConfig, run)


if __name__ == "__main__":
    main()
