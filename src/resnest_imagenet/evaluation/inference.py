"""Networks for single images: what they call their outputs, and the probabilities they give."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from resnest_imagenet.compute import autocast, place
from resnest_imagenet.data.loader import Loader
from resnest_imagenet.models.folding import fold_batch_norms
from resnest_imagenet.models.zoo import describe_classes, list_imagenet_classes
from resnest_imagenet.weights.load import read_weights, restore_network


@dataclass(frozen=True)
class Classifier:
    """A network that is not trained any further.

    Attributes:
        source: where its weights are from, as the user gave it.
        name: of the network.
        classes: of its outputs, in order: class folders, or synsets for ImageNet's 1000, or else numbers.
        module: maps normalised images (B, 3, H, W) to logits (B, K).
    """

    source: str
    name: str
    classes: tuple[str, ...]
    module: nn.Module


def open_classifier(source: str, choice: str, name: str | None, device: torch.device) -> Classifier:
    """Read a network for inference.

    Args:
        source: a checkpoint, a file of weights, or published weights.
        choice: "auto", "model" or "ema".
        name: of the network; None where the weights tell.
        device: where it computes.

    Raises:
        UserError: the weights cannot be read or do not fit.
    """
    weights = read_weights(source, choice)
    model, name = restore_network(weights, name)
    outputs = len(model.get_parameter("fc.bias"))
    classes = weights.classes or (list_imagenet_classes() if outputs == 1000 else [str(n) for n in range(outputs)])
    return Classifier(source, name, tuple(classes), place(fold_batch_norms(model), device))


def find_outputs(names: Sequence[str], classes: Sequence[str]) -> list[list[int]]:
    """Return the outputs that each of some names may mean.

    A class's name means that class; else what has it among its words: "goldfish" or "golden_retriever" for ImageNet's.

    Args:
        names: as people write them.
        classes: in the order of the outputs.
    """
    exact = {name: output for output, name in enumerate(classes)}
    by_words: dict[str, set[int]] = {}
    for output, text in enumerate(describe_classes(classes)):
        for words in (text, *text.split(", ")):
            by_words.setdefault(_simplify(words), set()).add(output)
    return [[exact[name]] if name in exact else sorted(by_words.get(_simplify(name), ())) for name in names]


def _simplify(words: str) -> str:
    return words.lower().replace("_", " ").replace("-", " ").strip()


@torch.inference_mode()
def compute_probabilities(
    classifiers: list[Classifier], loader: Loader, device: torch.device, precision: str
) -> Iterator[list[Tensor]]:
    """Yield for each batch the classifiers' probabilities, float32 (B, K) on the CPU; the images are decoded once."""
    for images, _ in loader.batches(epoch=0):
        with autocast(device, precision):
            logits = [classifier.module(images) for classifier in classifiers]
        yield [each.float().softmax(1).cpu() for each in logits]
