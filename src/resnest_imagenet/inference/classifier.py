"""Networks as they are used: how they see images, what they call their outputs, and the probabilities they give."""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from resnest_imagenet.compute import autocast, place
from resnest_imagenet.data.loader import Loader
from resnest_imagenet.data.transforms import EvalTransform
from resnest_imagenet.distributed import choose_device, launched_as
from resnest_imagenet.evaluation.accuracy import require_finite
from resnest_imagenet.inference.options import check_arguments, take_network
from resnest_imagenet.models.folding import fold_batch_norms
from resnest_imagenet.models.imagenet_classes import class_words
from resnest_imagenet.models.zoo import count_outputs, usual_crop
from resnest_imagenet.weights.load import Weights, list_classes, read_weights, restore_network


@dataclass(frozen=True)
class Classifier:
    """A network that is not trained any further.

    Attributes:
        weights: what their source tells; the tensors themselves are the module's.
        name: of the network.
        classes: of its outputs, in order: class folders, or synsets for ImageNet's 1000, or else numbers.
        transforms: how it sees images, at each crop that was asked for.
        module: maps normalised images (B, 3, H, W) to logits (B, K).
    """

    weights: Weights
    name: str
    classes: tuple[str, ...]
    transforms: tuple[EvalTransform, ...]
    module: nn.Module

    @property
    def source(self) -> str:
        """Where its weights are from, as the user gave it."""
        return self.weights.source

    @property
    def transform(self) -> EvalTransform:
        """How it sees images, at the first crop."""
        return self.transforms[0]

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return next(self.module.parameters()).device


def open_classifier(
    source: Weights | str | PathLike[str],
    model: str | None = None,
    weights: str = "auto",
    crop: int | Sequence[int] | None = None,
    protocol: Mapping[str, Any] | None = None,
    device: str | torch.device = "auto",
) -> Classifier:
    """Read a network to predict, evaluate, compare or explain with.

    Args:
        source: a checkpoint, a file of weights, or published weights: official:NAME or timm:NAME; or what
            `read_weights` has made of one.
        model: name of the network; None where the weights tell.
        weights: "model", "ema" (the moving average), or "auto": the moving average where there is one.
        crop: side of the images that it sees, in pixels, or several for an evaluation at each; None: the weights' own.
        protocol: what is to differ from the weights' own protocol, as `EvalTransform` has it: order, ratio,
            interpolation, antialias.
        device: where it computes: "auto", "cpu", "cuda", "cuda:1", "mps", or torch's own.

    Returns:
        The network, whose parameters need no gradients.

    Raises:
        UserError: the weights cannot be read or do not fit, an argument is not valid, or there is no such device.
    """
    asked = check_arguments(crop=crop, protocol=protocol)
    place_on = choose_device(device)
    loaded = source if isinstance(source, Weights) else read_weights(source, weights)
    network, name = restore_network(loaded, model)
    transforms = choose_transforms(loaded, name, asked.crop, asked.changes)
    outputs = count_outputs(network, name)
    classes = list_classes(loaded.classes, outputs) or [str(output) for output in range(outputs)]
    module = place(fold_batch_norms(network).requires_grad_(False), place_on)
    return Classifier(replace(loaded, tensors={}), name, tuple(classes), tuple(transforms), module)


def take_classifier(network: Classifier | str | PathLike[str]) -> Classifier:
    """Return the network that a library function was given; see `take_network`."""
    return take_network(network, Classifier, open_classifier)


def choose_transforms(
    weights: Weights, name: str, crops: Sequence[int] | None, protocol: Mapping[str, Any]
) -> list[EvalTransform]:
    """Return how a network sees images, at each crop: as asked for, and else as its weights were evaluated.

    Weights that do not tell are taken at the usual crop of their network, by the paper's protocol. A line on stderr
    names that, and a crop that is not the weights' own.

    Args:
        weights: the network's.
        name: of the network.
        crops: that were asked for, in pixels; None: one, the weights' own.
        protocol: what is to differ from the weights' own protocol, as `EvalTransform` has it.
    """
    own = EvalTransform.of(weights.crop or usual_crop(name), weights.protocol or ())
    transforms = [replace(own, crop=crop, **protocol) for crop in crops or [own.crop]]
    trained = (weights.training or {}).get("crop")
    others = [str(crop) for crop in crops or () if weights.crop is not None and crop not in (own.crop, trained)]
    line = None
    if crops is None and (weights.crop is None or weights.training is None):
        line = f"taking the usual test crop of {name}: {transforms[0].protocol}; crop=... sets another"
    elif others:
        line = f"crop={','.join(others)} is not its own: evaluated at {own.crop}"
        line += f", trained at {trained}" if trained else ""
    if line is not None and launched_as()[0] == 0:
        print(f"{weights.source}: {line}", file=sys.stderr)
    return transforms


def find_outputs(names: Sequence[str], classes: Sequence[str]) -> list[list[int]]:
    """Return the outputs that each of some names may mean.

    A class's name means that class; else what has it among its words: "goldfish" or "golden_retriever" for ImageNet's.

    Args:
        names: as people write them.
        classes: in the order of the outputs.
    """
    exact = {name: output for output, name in enumerate(classes)}
    by_words: dict[str, set[int]] = {}
    for output, text in enumerate(class_words(classes)):
        for words in (text, *text.split(", ")):
            by_words.setdefault(_simplify(words), set()).add(output)
    return [[exact[name]] if name in exact else sorted(by_words.get(_simplify(name), ())) for name in names]


def _simplify(words: str) -> str:
    return words.lower().replace("_", " ").replace("-", " ").strip()


@torch.inference_mode()
def compute_probabilities(
    classifiers: Sequence[Classifier], loader: Loader, precision: str, name: Callable[[int], str]
) -> Iterator[list[Tensor]]:
    """Yield for each batch the classifiers' probabilities, float32 (B, K) on the CPU; the images are decoded once.

    Args:
        classifiers: that see images alike, on one device.
        loader: of all images, in order.
        precision: fp32, bf16 or fp16.
        name: of an image, by its index.

    Raises:
        NonFiniteError: of an image a logit is NaN or infinite.
    """
    done = 0
    for images, _ in loader.batches(epoch=0):
        with autocast(images.device, precision):
            logits = [classifier.module(images) for classifier in classifiers]
        for values in logits:
            require_finite(values.isfinite().all(1).cpu().numpy(), name, precision, done)
        done += len(images)
        yield [values.float().softmax(1).cpu() for values in logits]
