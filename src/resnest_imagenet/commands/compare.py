"""resnest-compare: several networks on the same images."""

from pathlib import Path
from typing import TYPE_CHECKING

from resnest_imagenet.commands.launch import report_skipped, run_command
from resnest_imagenet.config import CompareConfig
from resnest_imagenet.files import replacing

if TYPE_CHECKING:
    from resnest_imagenet.data.folder import ImageFolder
    from resnest_imagenet.inference.compare import Comparison


def run(config: CompareConfig) -> None:
    """Compare and print the tables; images that were skipped raise a DataError after it."""
    from resnest_imagenet.inference.compare import format_comparison

    comparison = compare_networks(config)
    print(format_comparison(comparison), flush=True)
    report_skipped(list(comparison.skipped))


def compare_networks(config: CompareConfig) -> "Comparison":
    """Compare, and write `config.csv` and `config.page` where they are set."""
    from resnest_imagenet.inference.classifier import open_classifier
    from resnest_imagenet.inference.compare import compare, encode_csv
    from resnest_imagenet.inference.images import prepare_inference
    from resnest_imagenet.reports.compare_page import render_comparison

    names = config.models or [None] * len(config.ckpt)
    outputs = {"csv": config.csv, "page": config.page}
    device = prepare_inference(names, config.loader.name, config.device, outputs)
    images = _list_images(config)
    protocol = config.protocol.list_changes()
    comparison = compare(
        [
            open_classifier(source, name, config.weights, config.crop, protocol, device)
            for source, name in zip(config.ckpt, names, strict=True)
        ],
        images,
        batch_size=config.batch_size,
        precision=config.precision,
        loader=config.loader.name,
        workers=config.loader.workers,
    )
    for path, encode in ((config.csv, encode_csv), (config.page, render_comparison)):
        if path is not None:
            with replacing(Path(path)) as file:
                file.write(encode(comparison).encode(errors="surrogateescape"))
    return comparison


def _list_images(config: CompareConfig) -> "ImageFolder":
    from resnest_imagenet.inference.images import list_classified_images, list_part

    if config.images is not None:
        return list_classified_images(config.images)
    assert config.data.root is not None
    return list_part(config.data.root, config.data.val_dir, "data.val_dir")


def main() -> None:
    """Entry of resnest-compare."""
    run_command("compare", CompareConfig, run)


if __name__ == "__main__":
    main()
