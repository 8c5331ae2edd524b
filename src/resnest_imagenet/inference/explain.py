"""Why a network says what it says: where it finds a class, and how its blocks weigh their splits."""

import csv
import io
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from resnest_imagenet import distributed
from resnest_imagenet.compute import autocast, keep_freed_memory
from resnest_imagenet.config import ExplainConfig
from resnest_imagenet.data.examine import split_unreadable
from resnest_imagenet.data.folder import find_images
from resnest_imagenet.data.loader import build_loader, choose_loader, to_pixels
from resnest_imagenet.data.plan import plan_evaluation
from resnest_imagenet.data.source import ImageSource, print_notes
from resnest_imagenet.errors import ConfigError, suggest
from resnest_imagenet.evaluation.accuracy import require_finite
from resnest_imagenet.evaluation.cells import guard
from resnest_imagenet.files import replacing, require_writable, storing
from resnest_imagenet.inference.classifier import Classifier, find_outputs, open_classifier
from resnest_imagenet.models.imagenet_classes import class_words, short_class_names
from resnest_imagenet.models.split_attention import SplitAttention
from resnest_imagenet.models.zoo import require_model


@dataclass(frozen=True)
class ClassMap:
    """Where in an image a network finds a class.

    Attributes:
        name: of the class, in words.
        probability: the network's, between 0 and 1.
        evidence: what `map_evidence` returns for this image, float32 (h, w).
    """

    name: str
    probability: float
    evidence: np.ndarray


@dataclass(frozen=True)
class Explanation:
    """What a network makes of one image.

    Attributes:
        file: the image's.
        pixels: what the network sees, uint8 (crop, crop, 3).
        maps: of the classes that were asked for.
        attention: the weights of the splits a_i^k(c) (section 3.1), float32 (R, C), by block: "layer1.0", ...; none
            for a network without split attention.
    """

    file: str
    pixels: np.ndarray
    maps: tuple[ClassMap, ...]
    attention: dict[str, np.ndarray]


def explain_images(config: ExplainConfig) -> tuple[list[str], list[str]]:
    """Write the pictures into `config.out`; images that cannot be used are skipped.

    Returns:
        Lines about what was written, and a line for each image that was skipped.

    Raises:
        UserError: for what a user can cause, as one line.
    """
    if find_spec("captum") is None:
        raise ConfigError("resnest-explain needs the extra [explain] of resnest-imagenet")
    if config.model is not None:
        require_model(config.model.name)
    choose_loader(config.loader.name)
    device = distributed.choose_device(config.device)
    keep_freed_memory()
    out = Path(os.path.abspath(config.out))
    require_writable(out / "attention.csv", "out")
    found = find_images(config.images)
    if any(out in Path(found.name(index)).parents for index in range(len(found))):
        raise ConfigError(f"out={config.out} holds images to explain: choose another folder")
    print_notes(found)
    images, faults = split_unreadable(found)
    if not len(images):
        return [], faults
    classifier = open_classifier(config.ckpt, config.model.name if config.model else None, config, device)
    names = name_pictures([images.name(index) for index in range(len(images))])
    explanations = _explain(config, images, classifier, device)
    progress = tqdm(explanations, total=len(names), unit="image", disable=None, dynamic_ncols=True, leave=False)
    return _write_pictures(out, names, config.layer, classifier.name, progress), faults


def _explain(
    config: ExplainConfig, images: ImageSource, classifier: Classifier, device: torch.device
) -> Iterator[Explanation]:
    """Yield the images' explanations, in order."""
    named = short_class_names(classifier.classes)
    target = None if config.target is None else find_class(str(config.target), classifier.classes)
    plan = plan_evaluation(len(images), config.batch_size, 0, 1)
    loader = build_loader(config.loader.name, images, plan, classifier.transform, device, config.loader.workers)
    model = classifier.module.requires_grad_(False)  # so that the graph begins at the layer, not at the image
    done = 0
    for batch, _ in loader.batches(epoch=0):
        with torch.no_grad(), autocast(device, config.precision), recording_attention(model) as attention:
            logits = model(batch)
        require_finite(logits.isfinite().all(1).cpu().numpy(), images.name, config.precision, done)
        probabilities = logits.float().softmax(1)
        if target is None:
            chosen = probabilities.topk(min(config.top, probabilities.shape[1])).indices
        else:
            chosen = torch.full((len(batch), 1), target, device=device)
        # In float32 whatever the precision is: fp16 would lose small gradients.
        evidence = torch.stack([map_evidence(model, config.layer, batch, classes) for classes in chosen.T], 1)
        pixels = to_pixels(batch)
        weights = {block: each.cpu().numpy() for block, each in attention.items()}
        for row, classes in enumerate(chosen.tolist()):
            maps = tuple(
                ClassMap(named[k], probabilities[row, k].item(), each)
                for k, each in zip(classes, evidence[row].cpu().numpy(), strict=True)
            )
            yield Explanation(
                images.name(done), pixels[row], maps, {block: each[row] for block, each in weights.items()}
            )
            done += 1


def map_evidence(model: nn.Module, layer: str, images: Tensor, classes: Tensor) -> Tensor:
    """Return the class-activation maps of a layer: Grad-CAM (arXiv 1610.02391, equations 1 and 2).

    The sum over the layer's channels of activation times mean gradient of the class's logit; what is negative, which
    speaks against the class, is 0. At layer4, which only the global average and fc follow, the gradient is fc's
    weight / (h w) at every place, and this is CAM (arXiv 1512.04150): how much of the logit each place gives. At
    earlier layers the gradients differ between the places: the maps are finer, but rougher evidence.

    Args:
        model: a network in evaluation mode, whose parameters need no gradients.
        layer: the name of a module.
        images: normalised (B, 3, H, W).
        classes: int64 (B,), of each image one.

    Returns:
        (B, h, w), in logits; h and w are the layer's.
    """
    from captum.attr import LayerGradCam

    grad_cam = LayerGradCam(model, model.get_submodule(layer))
    return grad_cam.attribute(images, target=classes, relu_attributions=True)[:, 0].detach()


@contextmanager
def recording_attention(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Yield what fills, at each forward pass, with the weights (B, R, C) of every split attention, by block.

    They are no module's output, which a hook could see: the method that computes them is replaced meanwhile.
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
    """Return the output that a user means.

    Args:
        target: a class's name, one of its words ("goldfish", "golden_retriever"), or its number from 0 on.
        classes: the names, in the order of the outputs.

    Raises:
        ConfigError: no class is meant, or several are.
    """
    (meant,) = find_outputs([target], classes)
    if not meant and target.isdecimal() and int(target) < len(classes):
        return int(target)
    if not meant:
        words = {word for text in class_words(classes) for word in text.split(", ")}
        near = suggest(target, sorted({*classes, *words}))
        raise ConfigError(f"target={target}: none of the network's {len(classes)} classes{near}")
    if len(meant) > 1:
        raise ConfigError(f"target={target} may be {' or '.join(classes[k] for k in meant)}")
    return meant[0]


def _write_pictures(
    out: Path, names: Sequence[str], layer: str, model: str, explanations: Iterable[Explanation]
) -> list[str]:
    """Write a picture of each image's maps and attention, then of the attention over all; return lines about them."""
    from resnest_imagenet.reports.explain_pictures import draw_attention, draw_maps, draw_summary, encode_png

    files: list[str] = []
    kept: list[dict[str, np.ndarray]] = []  # 30 KB per image of a ResNeSt-50
    for name, explanation in zip(names, explanations, strict=True):
        _write(out / "maps" / name, encode_png(draw_maps(explanation, layer)))
        if explanation.attention:
            _write(out / "attention" / name, encode_png(draw_attention(explanation)))
        files.append(explanation.file)
        kept.append(explanation.attention)
    lines = [f"pictures in {out}/maps: {len(kept)}"]
    if not kept[0]:
        return [*lines, f"{model} has no split attention to draw"]
    attention = {block: np.stack([each[block] for each in kept]) for block in kept[0]}
    _write(out / "attention.csv", encode_csv(files, attention).encode(errors="surrogateescape"))
    _write(out / "attention.png", encode_png(draw_summary(model, attention)))
    return [
        *lines,
        f"pictures in {out}/attention: {len(kept)}",
        f"over all images: {out}/attention.png and {out}/attention.csv",
    ]


def name_pictures(files: Sequence[str]) -> list[str]:
    """Return a file name for the picture of each image: its path below the folder that all have in common, and .png."""
    common = os.path.commonpath([os.path.dirname(file) for file in files])
    return [os.path.relpath(file, common) + ".png" for file in files]


def encode_csv(files: Sequence[str], attention: dict[str, np.ndarray]) -> str:
    """Return a row for each image, block and split: mean and standard deviation of its weights over the channels.

    Args:
        files: of the N images.
        attention: the weights, (N, R, C) by block.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["file", "block", "split", "mean", "std"])
    for row, file in enumerate(files):
        for block, weights in attention.items():
            for split, each in enumerate(weights[row], 1):
                writer.writerow([guard(file), block, split, f"{each.mean():.6f}", f"{each.std():.6f}"])
    return text.getvalue()


def _write(path: Path, content: bytes) -> None:
    with storing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write(content)
