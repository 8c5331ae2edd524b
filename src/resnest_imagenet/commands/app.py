"""resnest-app: a page on this machine that predicts and explains a dropped picture."""

import threading
from typing import TYPE_CHECKING

from resnest_imagenet.commands.evaluate import take_box_protocol, take_own_protocol, take_region_protocol
from resnest_imagenet.commands.launch import run_command
from resnest_imagenet.config_reading import AppConfig
from resnest_imagenet.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from resnest_imagenet.reports.app import Page
    from resnest_imagenet.weights.load import Weights


def run(config: AppConfig) -> None:
    """Open the network, serve the page and print its address, until the process is interrupted."""
    from resnest_imagenet.reports.app import serving

    with serving(plan_page(config), config.ckpt, config.port) as address:
        print(f"{address}  (Ctrl+C stops it)", flush=True)
        threading.Event().wait()


def plan_page(config: AppConfig) -> "Page":
    """Open the network, and return the page for it."""
    from resnest_imagenet.inference.images import prepare_inference
    from resnest_imagenet.reports.app import require_app
    from resnest_imagenet.weights.detection import DETECTION
    from resnest_imagenet.weights.load import TASK, read_weights
    from resnest_imagenet.weights.published_rcnn import adopt_rcnn
    from resnest_imagenet.weights.segmentation import SEGMENTATION

    require_app()
    device = prepare_inference([config.model.name if config.model else None], "torchvision", config.device, {})
    plans = {TASK: _plan_classifier, SEGMENTATION: _plan_segmenter, DETECTION: _plan_detector}
    weights = adopt_rcnn(read_weights(config.ckpt, config.weights, tuple(plans)))
    for option, task in (("crop", TASK), ("model", TASK), ("layer", TASK), ("score", DETECTION)):
        if getattr(config, option) is not None and weights.task != task:
            raise ConfigError(f"{option} is of {task}: {config.ckpt} is of {weights.task}")
    return plans[weights.task](config, weights, device)


def _plan_classifier(config: AppConfig, weights: "Weights", device: "torch.device") -> "Page":
    from resnest_imagenet.inference.classifier import open_classifier
    from resnest_imagenet.reports.app import plan_classifier

    name, protocol = config.model.name if config.model else None, take_own_protocol(config.protocol).list_changes()
    classifier = open_classifier(weights, name, crop=config.crop, protocol=protocol, device=device)
    return plan_classifier(classifier, config.top, config.layer, config.precision)


def _plan_segmenter(config: AppConfig, weights: "Weights", device: "torch.device") -> "Page":
    from resnest_imagenet.inference.segmenter import open_segmenter
    from resnest_imagenet.reports.app import plan_segmenter

    segmenter = open_segmenter(weights, protocol=take_region_protocol(config.protocol), device=device)
    return plan_segmenter(segmenter, config.top, config.precision)


def _plan_detector(config: AppConfig, weights: "Weights", device: "torch.device") -> "Page":
    from resnest_imagenet.inference.detect import SCORE
    from resnest_imagenet.inference.detector import open_detector
    from resnest_imagenet.reports.app import plan_detector

    chosen, score = take_box_protocol(config.protocol), SCORE if config.score is None else config.score
    protocol = {**(chosen.model_dump() if chosen else {}), "min_score": score}
    detector = open_detector(weights, protocol=protocol, device=device)
    return plan_detector(detector, config.top, score, config.precision)


def main() -> None:
    """Entry of resnest-app."""
    run_command("app", AppConfig, run)


if __name__ == "__main__":
    main()
