"""Trained classifiers ready for use: their transforms, the names of their outputs, and their probabilities."""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from resnest_imagenet.compute import autocast, place
from resnest_imagenet.data.loader import Loader, build_loader
from resnest_imagenet.data.plan import plan_evaluation
from resnest_imagenet.data.source import ImageSource
from resnest_imagenet.data.transforms import EvalTransform
from resnest_imagenet.distributed import choose_device, launched_as
from resnest_imagenet.evaluation.accuracy import require_finite
from resnest_imagenet.evaluation.operators import choose_for_inference
from resnest_imagenet.inference.options import Arguments, check_arguments, take_network
from resnest_imagenet.models.folding import fold_batch_norms
from resnest_imagenet.models.imagenet_classes import class_words
from resnest_imagenet.models.zoo import count_outputs, usual_crop
from resnest_imagenet.weights.load import Weights, list_classes, read_weights, restore_network


@dataclass(frozen=True)
class Classifier:
    """A trained network, for inference only.

    Attributes:
        weights: the description of its weights; the tensors themselves are in the module.
        name: of the network.
        classes: of its outputs, in order: class folders, or synsets for ImageNet's 1000, or else numbers.
        transforms: how it sees images, one for each crop.
        module: maps normalised images (B, 3, H, W) to logits (B, K).
    """

    weights: Weights
    name: str
    classes: tuple[str, ...]
    transforms: tuple[EvalTransform, ...]
    module: nn.Module

    @property
    def source(self) -> str:
        """The source of its weights, as the user gave it."""
        return self.weights.source

    @property
    def transform(self) -> EvalTransform:
        """The transform at the first crop."""
        return self.transforms[0]

    @property
    def device(self) -> torch.device:
        """The device of its parameters."""
        return next(self.module.parameters()).device


def open_classifier(
    source: Weights | str | PathLike[str],
    model: str | None = None,
    weights: str = "auto",
    crop: int | Sequence[int] | None = None,
    protocol: Mapping[str, Any] | None = None,
    device: str | torch.device = "auto",
) -> Classifier:
    """Read a network to predict, evaluate, compare or explain.

    Args:
        source: a checkpoint, a file of weights, or published weights: official:NAME or timm:NAME; or the result of
            `read_weights` for one.
        model: name of the network; None if the weights include it.
        weights: "model", "ema" (the moving average), or "auto": the moving average if there is one.
        crop: side of the images that it sees, in pixels, or several for an evaluation at each; None: the weights' own.
        protocol: changes to the weights' own protocol, by the names of `EvalTransform`: order, ratio, interpolation,
            antialias.
        device: of the computation: "auto", "cpu", "cuda", "cuda:1", "mps", or a torch.device.

    Returns:
        The network; its parameters need no gradients.

    Raises:
        UserError: the weights cannot be read or do not fit, an argument is not valid, or there is no such device.
    """
    arguments = check_arguments(crop=crop, protocol=protocol)
    place_on = choose_device(device)
    loaded = source if isinstance(source, Weights) else read_weights(source, weights)
    network, name = restore_network(loaded, model)
    transforms = choose_transforms(loaded, name, arguments.crop, arguments.changes)
    outputs = count_outputs(network, name)
    classes = list_classes(loaded.classes, outputs) or [str(output) for output in range(outputs)]
    module = place(fold_batch_norms(network).requires_grad_(False), place_on)
    return Classifier(replace(loaded, tensors={}), name, tuple(classes), tuple(transforms), module)


def take_classifier(network: Classifier | str | PathLike[str]) -> Classifier:
    """Return a library function's argument as a network; see `take_network`."""
    return take_network(network, Classifier, open_classifier)


def choose_transforms(
    weights: Weights, name: str, crops: Sequence[int] | None, protocol: Mapping[str, Any]
) -> list[EvalTransform]:
    """Return a network's transform at each crop: like its weights' own evaluation, except where the arguments differ.

    Weights without such a record get the usual crop of their network and the paper's protocol. A line on stderr reports
    that, and any crop that is not the weights' own.

    Args:
        weights: the network's.
        name: of the network.
        crops: in pixels; None: only the weights' own.
        protocol: changes to the weights' own protocol, by the names of `EvalTransform`.
    """
    own = EvalTransform.of(weights.crop or usual_crop(name), weights.protocol or (), weights.mean, weights.std)
    transforms = [replace(own, crop=crop, **protocol) for crop in crops or [own.crop]]
    trained = (weights.training or {}).get("crop")
    other_crops = [str(crop) for crop in crops or () if weights.crop is not None and crop not in (own.crop, trained)]
    line = None
    if crops is None and (weights.crop is None or weights.training is None):
        line = f"taking the usual test crop of {name}: {transforms[0].protocol}; crop=... sets another"
    elif other_crops:
        line = f"crop={','.join(other_crops)} is not its own: evaluated at {own.crop}"
        line += f", trained at {trained}" if trained else ""
    if line is not None and launched_as()[0] == 0:
        print(f"{weights.source}: {line}", file=sys.stderr)
    return transforms


def find_outputs(names: Sequence[str], classes: Sequence[str]) -> list[list[int]]:
    """Return the outputs that each name may mean.

    A name means the class of that name or, without one, the classes that have it among their words, such as "goldfish"
    or "golden_retriever" for ImageNet's.

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


def load_in_order(
    classifiers: Sequence[Classifier], images: ImageSource, arguments: Arguments, needs_gradients: bool = False
) -> Loader:
    """Return the loader of images, in order, for classifiers of the same transform and device.

    The operators of the device are chosen here, before any of them computes.

    Args:
        classifiers: at least one.
        images: that can be decoded.
        arguments: batch_size, precision, loader and workers of the caller.
        needs_gradients: whether the caller computes gradients of the logits.
    """
    transform, device = classifiers[0].transform, classifiers[0].device
    for classifier in classifiers:
        size = (arguments.batch_size, transform.crop, transform.crop)
        choose_for_inference(classifier.module, size, arguments.precision, images, arguments.loader, needs_gradients)
    plan = plan_evaluation(len(images), arguments.batch_size, 0, 1)
    return build_loader(arguments.loader, images, plan, transform, device, arguments.workers)


@torch.inference_mode()
def compute_probabilities(
    classifiers: Sequence[Classifier], loader: Loader, precision: str, name: Callable[[int], str]
) -> Iterator[list[Tensor]]:
    """Yield for each batch the classifiers' probabilities, float32 (B, K) on the CPU; the images are decoded once.

    Args:
        classifiers: they have the same transform and device.
        loader: of all images, in order.
        precision: fp32, bf16 or fp16.
        name: returns an image's name, by its index.

    Raises:
        NonFiniteError: a logit of some image is NaN or infinite.
    """
    done = 0
    for images, _ in loader.batches(epoch=0):
        with autocast(images.device, precision):
            logits = [classifier.module(images) for classifier in classifiers]
        for values in logits:
            require_finite(values.isfinite().all(1).cpu().numpy(), name, precision, done)
        done += len(images)
        yield [values.float().softmax(1).cpu() for values in logits]
