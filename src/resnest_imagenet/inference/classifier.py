"""Networks as they are used: how they see images, what they call their outputs, and the probabilities they give."""

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from resnest_imagenet.compute import autocast, place
from resnest_imagenet.config import InferenceConfig, OwnProtocolOptions
from resnest_imagenet.data.loader import Loader
from resnest_imagenet.data.transforms import EvalTransform
from resnest_imagenet.distributed import launched_as
from resnest_imagenet.evaluation.accuracy import require_finite
from resnest_imagenet.models.folding import fold_batch_norms
from resnest_imagenet.models.imagenet_classes import class_words, imagenet_synsets
from resnest_imagenet.models.zoo import count_outputs, usual_crop
from resnest_imagenet.weights.load import Weights, read_weights, restore_network


@dataclass(frozen=True)
class Classifier:
    """A network that is not trained any further.

    Attributes:
        source: where its weights are from, as the user gave it.
        name: of the network.
        classes: of its outputs, in order: class folders, or synsets for ImageNet's 1000, or else numbers.
        is_named: whether the weights tell these.
        transform: how it sees images.
        module: maps normalised images (B, 3, H, W) to logits (B, K).
    """

    source: str
    name: str
    classes: tuple[str, ...]
    is_named: bool
    transform: EvalTransform
    module: nn.Module

    @property
    def known(self) -> tuple[str, ...] | None:
        """The classes that the weights tell; None for bare weights."""
        return self.classes if self.is_named else None


def open_classifier(source: str, name: str | None, config: InferenceConfig, device: torch.device) -> Classifier:
    """Read a network for inference.

    Args:
        source: a checkpoint, a file of weights, or published weights.
        name: of the network; None where the weights tell.
        config: which weights, and how they see images.
        device: where it computes.

    Raises:
        UserError: the weights cannot be read or do not fit.
    """
    weights = read_weights(source, config.weights)
    model, name = restore_network(weights, name)
    crops = None if config.crop is None else [config.crop]
    (transform,) = choose_transforms(weights, name, crops, config.protocol)
    outputs = count_outputs(model, name)
    classes = weights.classes or (imagenet_synsets() if outputs == 1000 else [str(n) for n in range(outputs)])
    module = place(fold_batch_norms(model), device)
    return Classifier(source, name, tuple(classes), weights.classes is not None, transform, module)


def choose_transforms(
    weights: Weights, name: str, crops: Sequence[int] | None, protocol: OwnProtocolOptions
) -> list[EvalTransform]:
    """Return how a network sees images, at each crop: as asked for, and else as its weights were evaluated.

    Weights that do not tell are taken at the usual crop of their network, by the paper's protocol. That, and a crop
    that is not the weights' own, is said on stderr.

    Args:
        weights: the network's.
        name: of the network.
        crops: that were asked for, in pixels; None: one, the weights' own.
        protocol: what was asked for.
    """
    known = weights.protocol.model_dump() if weights.protocol else {}
    own = EvalTransform(weights.crop or usual_crop(name), **known)
    transforms = [replace(own, crop=crop, **protocol.list_changes()) for crop in crops or [own.crop]]
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
    classifiers: list[Classifier], loader: Loader, device: torch.device, precision: str, name: Callable[[int], str]
) -> Iterator[list[Tensor]]:
    """Yield for each batch the classifiers' probabilities, float32 (B, K) on the CPU; the images are decoded once.

    Args:
        classifiers: that see images alike.
        loader: of all images, in order.
        device: where they compute.
        precision: fp32, bf16 or fp16.
        name: of an image, by its index.

    Raises:
        NonFiniteError: of an image a logit is NaN or infinite.
    """
    done = 0
    for images, _ in loader.batches(epoch=0):
        with autocast(device, precision):
            logits = [classifier.module(images) for classifier in classifiers]
        for values in logits:
            require_finite(values.isfinite().all(1).cpu().numpy(), name, precision, done)
        done += len(images)
        yield [values.float().softmax(1).cpu() for values in logits]
