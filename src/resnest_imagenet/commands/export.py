"""resnest-export: a checkpoint for other programs."""

from typing import TYPE_CHECKING

from resnest_imagenet.commands.launch import run_command
from resnest_imagenet.config import ExportConfig

if TYPE_CHECKING:
    from resnest_imagenet.weights.card import ImageInput


def run(config: ExportConfig) -> None:
    """Import torch only now, and export."""
    from resnest_imagenet.weights.export import export_weights
    from resnest_imagenet.weights.graphs import export_graph
    from resnest_imagenet.weights.hub import export_folder

    if config.format in ("pth", "safetensors"):
        line = export_weights(config)
    else:
        line = (export_folder if config.format == "hub" else export_graph)(config, describe_input(config))
    print(line)


def describe_input(config: ExportConfig) -> "ImageInput":
    """Return how images are brought to the crop, for the program that will do it."""
    from resnest_imagenet.data.transforms import MEAN, STD, EvalTransform
    from resnest_imagenet.weights.card import ImageInput

    transform = EvalTransform(config.crop, **config.protocol.model_dump())
    mean, std = (tuple(round(value / 255, 3) for value in values) for values in (MEAN, STD))
    return ImageInput(
        config.crop, transform.resolved_ratio, transform.resolved_interpolation, transform.protocol, mean, std
    )


def main() -> None:
    """Entry of resnest-export."""
    run_command("export", ExportConfig, run)


if __name__ == "__main__":
    main()
