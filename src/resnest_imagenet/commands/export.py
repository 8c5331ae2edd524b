"""resnest-export: a checkpoint for other programs."""

from functools import partial

from resnest_imagenet.commands.launch import run_command
from resnest_imagenet.config import ExportConfig


def run(config: ExportConfig) -> None:
    """Export, and print the line about what was written."""
    from resnest_imagenet.inference.describe import describe_input
    from resnest_imagenet.weights.export import export_weights
    from resnest_imagenet.weights.graphs import export_graph
    from resnest_imagenet.weights.hub import export_folder

    ckpt, out, weights = config.ckpt, config.out, config.weights
    model = config.model.name if config.model else None
    describe = partial(describe_input, crop=config.crop, protocol=config.protocol.list_changes())
    if config.format == "hub":
        line = export_folder(ckpt, describe, out, model=model, weights=weights)
    elif config.format in ("onnx", "torch_export"):
        line = export_graph(ckpt, describe, out, model=model, weights=weights, form=config.format)
    else:
        line = export_weights(ckpt, out, model=model, weights=weights, layout=config.layout, form=config.format)
    print(line)


def main() -> None:
    """Entry of resnest-export."""
    run_command("export", ExportConfig, run)


if __name__ == "__main__":
    main()
