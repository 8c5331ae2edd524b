"""Explains a classifier's decision: where in an image it finds a class, and how its blocks weight their splits."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from os import PathLike
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from resnest_imagenet.compute import autocast
from resnest_imagenet.data.examine import split_unreadable
from resnest_imagenet.data.folder import ImageFolder
from resnest_imagenet.data.loader import Loader, to_pixels
from resnest_imagenet.errors import ConfigError, name_extra, suggest
from resnest_imagenet.evaluation.accuracy import require_finite
from resnest_imagenet.inference.classifier import Classifier, find_outputs, load_in_order, take_classifier
from resnest_imagenet.inference.images import Images, list_images
from resnest_imagenet.inference.options import check_arguments
from resnest_imagenet.models.imagenet_classes import class_words, short_class_names
from resnest_imagenet.models.split_attention import SplitAttention
from resnest_imagenet.models.zoo import find_head

LAYERS = ("layer1", "layer2", "layer3", "layer4")
PLACES = 7  # of a map's side, at least, as layer4 has at 224 pixels


@dataclass(frozen=True)
class ClassMap:
    """Where in an image a network finds a class.

    Attributes:
        name: of the class, in words.
        probability: the network's, between 0 and 1.
        evidence: the map of `map_evidence` for this image, float32 (h, w).
    """

    name: str
    probability: float
    evidence: np.ndarray


@dataclass(frozen=True)
class Explanation:
    """The explanation of one image.

    Attributes:
        file: the image's.
        pixels: what the network sees, uint8 (crop, crop, 3).
        maps: of the chosen classes.
        attention: the weights of the splits a_i^k(c) (section 3.1), float32 (R, C), by block: "layer1.0", ...; empty
            for a network without split attention.
    """

    file: str
    pixels: np.ndarray
    maps: tuple[ClassMap, ...]
    attention: dict[str, np.ndarray]


@dataclass(frozen=True)
class Explanations:
    """The explanations of N images, in order; a batch is computed when the iteration reaches it.

    Attributes:
        classifier: the network.
        images: the N images.
        skipped: a line for each image that cannot be used; these are not among the N.
        top: number of the likeliest classes to map.
        target: the output to map instead, or None.
        layer: the layer of the maps.
        batch_size: images at a time.
        precision: of the probabilities and the attention.
        loader, workers: decode the images.
    """

    classifier: Classifier
    images: ImageFolder
    skipped: tuple[str, ...]
    top: int
    target: int | None
    layer: str
    batch_size: int
    precision: str
    loader: str
    workers: int | None

    @property
    def files(self) -> list[str]:
        """The images' files."""
        return [self.images.name(index) for index in range(len(self.images))]

    def __len__(self) -> int:
        return len(self.images)

    def __iter__(self) -> Iterator[Explanation]:
        if len(self.images):
            arguments = check_arguments(
                batch_size=self.batch_size, precision=self.precision, loader=self.loader, workers=self.workers
            )
            yield from self._explain(load_in_order([self.classifier], self.images, arguments, needs_gradients=True))

    def _explain(self, loader: Loader) -> Iterator[Explanation]:
        names = short_class_names(self.classifier.classes)
        model = self.classifier.module
        done = 0
        for batch, _ in loader.batches(epoch=0):
            with torch.no_grad(), autocast(batch.device, self.precision), recording_attention(model) as attention:
                logits = model(batch)
            require_finite(logits.isfinite().all(1).cpu().numpy(), self.images.name, self.precision, done)
            probabilities = logits.float().softmax(1)
            chosen = self._choose_classes(probabilities)
            # Maps are computed in float32 at any precision: fp16 would lose small gradients.
            evidence = torch.stack([map_evidence(model, self.layer, batch, classes) for classes in chosen.T], 1)
            transform = self.classifier.transform
            maps_of_batch, pixels = evidence.cpu().numpy(), to_pixels(batch, transform.mean, transform.std)
            weights = {block: values.cpu().numpy() for block, values in attention.items()}
            for row, classes in enumerate(chosen.tolist()):
                maps = tuple(
                    ClassMap(names[output], probabilities[row, output].item(), class_evidence)
                    for output, class_evidence in zip(classes, maps_of_batch[row], strict=True)
                )
                of_image = {block: values[row] for block, values in weights.items()}
                yield Explanation(self.images.name(done), pixels[row], maps, of_image)
                done += 1

    def _choose_classes(self, probabilities: Tensor) -> Tensor:
        """Return the outputs to map, int64 (B, number of maps)."""
        if self.target is None:
            return probabilities.topk(min(self.top, probabilities.shape[1])).indices
        return torch.full((len(probabilities), 1), self.target, device=probabilities.device)


def explain(
    network: Classifier | str | PathLike[str],
    images: Images,
    top: int = 1,
    target: str | int | None = None,
    layer: str | None = None,
    *,
    batch_size: int = 16,
    precision: str = "fp32",
    loader: str = "auto",
    workers: int | None = None,
) -> Explanations:
    """Explain a network's predictions for images; images that cannot be used are skipped.

    Args:
        network: of `open_classifier`, or a source that it takes.
        images: files, folders or patterns such as "photos/**/*.jpg", one or several.
        top: number of the likeliest classes to map.
        target: the class to map instead, as `find_class` takes it.
        layer: "layer1" to "layer4", or another module with maps: earlier layers give finer maps, but rougher evidence;
            None: of `choose_layer`.
        batch_size: images at a time.
        precision: of the probabilities and the attention, fp32, bf16 or fp16; the maps are fp32.
        loader: decodes the images: "auto", "dali" or "torchvision".
        workers: number of the loader's threads or processes; None: this process's cores, at most 8.

    Returns:
        The explanations, one for each image, as an iterable.

    Raises:
        UserError: a user's error, in one line.
    """
    require_captum()
    arguments = check_arguments(top=top, batch_size=batch_size, precision=precision, loader=loader, workers=workers)
    listed = list_images(images)
    classifier = take_classifier(network)
    if layer is None:
        layer = choose_layer(classifier)
    if layer not in dict(classifier.module.named_modules()):
        raise ConfigError(f"layer={layer}: {classifier.name} has no layer of that name")
    if layer in ("", find_head(classifier.name)):
        raise ConfigError(f"layer={layer!r} returns logits, not maps: choose a layer with maps, such as layer4")
    output = None if target is None else find_class(str(target), classifier.classes)
    usable, skipped = split_unreadable(listed)
    return Explanations(
        classifier,
        usable,
        tuple(skipped),
        arguments.top,
        output,
        layer,
        arguments.batch_size,
        arguments.precision,
        arguments.loader,
        arguments.workers,
    )


def choose_layer(classifier: Classifier) -> str:
    """Return the deepest layer whose maps have at least 7 x 7 places at the classifier's crop; layer1 if none has.

    A map of 2 x 2 places, as of layer4 at 56 pixels, is a wash of colour that shows nothing.
    """
    # Sizes need no values: on a GPU nothing must compute before its operators are tried.
    model, crop = copy.deepcopy(classifier.module).to("meta"), classifier.transform.crop
    modules, sizes = dict(model.named_modules()), dict[str, int]()
    if not modules.keys() >= set(LAYERS):
        return LAYERS[-1]

    def measure(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        return lambda module, inputs, output: sizes.update({name: min(output.shape[-2:])})

    for name in LAYERS:
        modules[name].register_forward_hook(measure(name))
    with torch.inference_mode():
        model(torch.empty(1, 3, crop, crop, device="meta"))
    return next((name for name in reversed(LAYERS) if sizes[name] >= PLACES), LAYERS[0])


def require_captum() -> None:
    """Raise a ConfigError if captum, which computes the maps, is not installed."""
    if find_spec("captum") is None:
        raise ConfigError(f"resnest-explain needs {name_extra('explain')}")


def map_evidence(model: nn.Module, layer: str, images: Tensor, classes: Tensor) -> Tensor:
    """Return the class-activation maps of a layer: Grad-CAM (arXiv 1610.02391, equations 1 and 2).

    A map is the sum over the layer's channels of activation times mean gradient of the class's logit. Negative values,
    which are evidence against the class, are set to 0. Only the global average and fc follow layer4, so there the
    gradient is fc's weight / (h w) at every place, and the map is CAM (arXiv 1512.04150): the share of each place in
    the logit. At earlier layers the gradients differ between places: the maps are finer, but rougher evidence.

    Args:
        model: a network in evaluation mode; its parameters need no gradients, so the graph begins at the layer.
        layer: the name of a module.
        images: normalised (B, 3, H, W).
        classes: int64 (B,), one for each image.

    Returns:
        (B, h, w), in logits; h and w are the layer's.
    """
    from captum.attr import LayerGradCam

    grad_cam = LayerGradCam(model, model.get_submodule(layer))
    return grad_cam.attribute(images, target=classes, relu_attributions=True)[:, 0].detach()


@contextmanager
def recording_attention(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Yield a dictionary that each forward pass fills with the weights (B, R, C) of every split attention, by block.

    The weights are not the output of a module, so no hook can see them: the method that computes them is replaced for
    the time of the context.
    """
    weights: dict[str, Tensor] = {}

    def record(block: str, weigh: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def weigh_and_record(pooled: Tensor) -> Tensor:
            weights[block] = weigh(pooled)
            return weights[block]

        return weigh_and_record

    named = [(name, module) for name, module in model.named_modules() if isinstance(module, SplitAttention)]
    for name, module in named:
        vars(module)["_weigh"] = record(name.rpartition(".")[0], module._weigh)
    try:
        yield weights
    finally:
        for _, module in named:
            del vars(module)["_weigh"]


def find_class(target: str, classes: Sequence[str]) -> int:
    """Return the output of the class that a user names.

    Args:
        target: a class's name, one of its words ("goldfish", "golden_retriever"), or its number, counted from 0.
        classes: the names, in the order of the outputs.

    Raises:
        ConfigError: the name fits no class, or several.
    """
    (outputs,) = find_outputs([target], classes)
    if not outputs and target.isdecimal() and int(target) < len(classes):
        return int(target)
    if not outputs:
        words = {word for text in class_words(classes) for word in text.split(", ")}
        near = suggest(target, sorted({*classes, *words}))
        raise ConfigError(f"target={target}: none of the network's {len(classes)} classes{near}")
    if len(outputs) > 1:
        raise ConfigError(f"target={target} may mean {' or '.join(classes[output] for output in outputs)}")
    return outputs[0]
