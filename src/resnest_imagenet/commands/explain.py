"""resnest-explain: where a network finds a class in images, and how its blocks weight their splits."""

import os
from pathlib import Path

from resnest_imagenet.commands.launch import report_skipped, run_command
from resnest_imagenet.config_reading import ExplainConfig
from resnest_imagenet.errors import ConfigError, printable


def run(config: ExplainConfig) -> None:
    """Write the pictures and print where they are; then raise a DataError if images were skipped."""
    written, skipped = explain_images(config)
    for line in written:
        print(printable(line), flush=True)
    report_skipped(skipped)


def explain_images(config: ExplainConfig) -> tuple[list[str], list[str]]:
    """Write the pictures into `config.out`; return lines about them, and a line for each image that was skipped."""
    from resnest_imagenet.inference.classifier import open_classifier
    from resnest_imagenet.inference.explain import explain, require_captum
    from resnest_imagenet.inference.images import list_images, prepare_inference
    from resnest_imagenet.reports.explain_pictures import write_pictures

    require_captum()
    name = config.model.name if config.model else None
    out = Path(os.path.abspath(config.out))
    device = prepare_inference([name], config.loader.name, config.device, {"out": str(out / "attention.csv")})
    images = list_images(config.images)
    if any(out in Path(images.name(index)).parents for index in range(len(images))):
        raise ConfigError(f"out={config.out} holds images to explain: choose another folder")
    protocol = config.protocol.list_changes()
    explanations = explain(
        open_classifier(config.ckpt, name, config.weights, config.crop, protocol, device),
        images,
        config.top,
        config.target,
        config.layer,
        batch_size=config.batch_size,
        precision=config.precision,
        loader=config.loader.name,
        workers=config.loader.workers,
    )
    written = write_pictures(out, explanations) if len(explanations) else []
    return written, list(explanations.skipped)


def main() -> None:
    """Entry of resnest-explain."""
    run_command("explain", ExplainConfig, run)


if __name__ == "__main__":
    main()
