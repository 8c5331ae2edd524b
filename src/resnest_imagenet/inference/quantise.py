"""Writes a classifier as a graph of 8-bit integers, for onnxruntime or OpenVINO, and measures what that changes."""

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from resnest_imagenet.data.examine import split_unreadable
from resnest_imagenet.data.folder import ImageFolder, tell_by_name
from resnest_imagenet.data.loader import build_loader
from resnest_imagenet.data.plan import plan_evaluation
from resnest_imagenet.errors import DataError
from resnest_imagenet.inference.classifier import Classifier, find_outputs, open_classifier
from resnest_imagenet.inference.compare import compare
from resnest_imagenet.inference.describe import describe_transform
from resnest_imagenet.inference.images import list_classified_images, list_images
from resnest_imagenet.inference.labels import label_images
from resnest_imagenet.inference.predict import predict
from resnest_imagenet.weights.card import Card
from resnest_imagenet.weights.export import describe_weights
from resnest_imagenet.weights.graphs import (
    GraphForm,
    choose_any,
    choose_graph_file,
    draw_images,
    load_graph,
    make_graph,
    name_written,
    quiet,
    require_form,
    write_contents,
)
from resnest_imagenet.weights.load import Weights, list_classes
from resnest_imagenet.weights.openvino import encode_openvino

CALIBRATION = 256  # images at most: their activations' ranges become those of the integers
_BATCH = 16
_ROUNDS, _WARM_UP = 30, 3  # of the latencies


class GraphNetwork(nn.Module):
    """A graph in the place of a network: normalised images (B, 3, H, W) to logits (B, K), on the CPU."""

    def __init__(self, contents: tuple[bytes, ...], form: GraphForm) -> None:
        super().__init__()
        self.num_bytes = sum(map(len, contents))
        self._run = load_graph(contents, form)
        self._place = nn.Parameter(torch.zeros(()), requires_grad=False)  # its device is the network's

    def forward(self, images: Tensor) -> Tensor:
        """Run the graph."""
        return self._run(images.contiguous())


@dataclass(frozen=True)
class _Answers:
    """The predictions of the two graphs for the images of a folder.

    Attributes:
        num_images: that can be used.
        num_alike: those with the same likeliest class.
        correct: for each graph, the number of images whose class folder is the likeliest class; None: no class folders.
        skipped: a line for each image that cannot be used.
    """

    num_images: int
    num_alike: int
    correct: tuple[int, int] | None
    skipped: list[str]


def export_int8(
    source: Weights | str | PathLike[str],
    images: str | PathLike[str],
    out: str | PathLike[str] | None = None,
    *,
    model: str | None = None,
    weights: str = "auto",
    crop: int | None = None,
    protocol: Mapping[str, Any] | None = None,
    form: str = "onnx",
    sizes: str | None = None,
) -> tuple[str, list[str]]:
    """Write a classifier as a graph of 8-bit integers; compare it with the exact graph on a folder of images.

    Weights and activations are quantised by onnxruntime's static quantisation: the weights per channel, with 7 bits, so
    that processors without VNNI instructions do not overflow; the activations with the ranges that at most
    `CALIBRATION` of the images give them, taken evenly over the folder. Inputs and outputs are those of
    `weights.graphs.export_graph`.

    Args:
        source: a checkpoint, a file of weights, or published weights; or the result of `read_weights` for one.
        images: a folder of images like those to come; with one folder per true class they give the accuracy too.
        out: the file; None: MODEL-int8.onnx or .xml.
        model: name of the network; None if the weights include it.
        weights: "model", "ema" or "auto".
        crop: side of the images in pixels; None: the weights' own.
        protocol: changes to the weights' own protocol, as of `open_classifier`.
        form: "onnx" or "openvino": whose graphs are compared too.
        sizes: of the graph's images: "any" or "crop"; None: any.

    Returns:
        A line about the file and a table of size, accuracy and latency of both graphs; a line per skipped image.

    Raises:
        UserError: a user's error, in one line; or the exact graph's logits differ from the network's.
    """
    require_form(form)
    require_form("onnx", "int8")
    classifier = open_classifier(source, model, weights, crop, protocol, "cpu")
    listed, has_classes = _list_folder(images, classifier)  # refused here, not after minutes of work
    graph_form = GraphForm(form, classifier.transform.crop, choose_any(form, sizes))
    file = choose_graph_file(classifier.source, out, f"{classifier.name}-int8", form)
    metadata = _describe(classifier).to_metadata()
    (exact,), _ = make_graph(classifier.module, classifier.source, file, replace(graph_form, name="onnx"), metadata)
    used = _choose_calibration(listed)
    graphs = {"float32": exact, "int8": quantise_graph(exact, _load_batches(classifier, used))}
    contents = {name: encode_openvino(graph) if form == "openvino" else (graph,) for name, graph in graphs.items()}
    networks = {name: GraphNetwork(files, graph_form) for name, files in contents.items()}
    answers = _ask([replace(classifier, module=network) for network in networks.values()], listed, has_classes)
    seconds = _measure(list(networks.values()), graph_form.crop)
    calibrated = f"8-bit integers, calibrated with {len(used)} images of {os.fspath(images)}"
    words = f"{describe_weights(classifier.weights, classifier.name)}, {graph_form.text}"
    line = f"wrote {name_written(file, graph_form)}: {words}, {write_contents(file, contents['int8'], calibrated)}"
    return "\n".join([line, *_format_table(networks, answers, seconds, graph_form.crop)]), answers.skipped


def _list_folder(images: str | PathLike[str], classifier: Classifier) -> tuple[ImageFolder, bool]:
    """List the images of a folder; return whether its folders are classes of a network.

    They are not if there are images beside them, or if none has the name of a class: a line on stderr reports that.

    Raises:
        DataError: there are no images, or only some folders are classes.
    """
    entries = list(os.scandir(images)) if os.path.isdir(images) else []
    has_images = any(entry.is_file() and tell_by_name(entry.name) == "image" for entry in entries)
    folders = [entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")]
    if has_images or not folders:
        return list_images(images), False
    try:
        listed = list_classified_images(images)
        label_images(listed, classifier.weights.classes, len(classifier.classes), classifier.source)
    except DataError:
        if any(find_outputs(folders, classifier.classes)):
            raise
        print(f"{images}: no folder has the name of a class of {classifier.source}: no accuracy", file=sys.stderr)
        return list_images(images), False
    return listed, True


def _describe(classifier: Classifier) -> Card:
    classes = list_classes(classifier.weights.classes, len(classifier.classes))
    return Card(classifier.name, describe_transform(classifier.transform), tuple(classes) if classes else None)


def _choose_calibration(images: ImageFolder) -> ImageFolder:
    """Return at most `CALIBRATION` usable images, evenly over the listing, so that each class has its share."""
    rows = np.linspace(0, len(images) - 1, min(len(images), CALIBRATION)).round().astype(np.int64)
    usable, skipped = split_unreadable(replace(images, files=images.files[rows], labels=images.labels[rows]))
    if not len(usable):
        raise DataError(skipped[0])
    return usable


def _load_batches(classifier: Classifier, images: ImageFolder) -> Iterator[np.ndarray]:
    """Yield the images as the network sees them, float32 (B, 3, H, W)."""
    plan = plan_evaluation(len(images), _BATCH, 0, 1)
    for batch, _ in build_loader("auto", images, plan, classifier.transform, classifier.device).batches(epoch=0):
        yield batch.contiguous().numpy()


def quantise_graph(graph: bytes, batches: Iterable[np.ndarray]) -> bytes:
    """Return an ONNX graph with 8-bit weights and activations, and the same metadata.

    Args:
        graph: with the input "images".
        batches: float32 (B, 3, H, W), to calibrate with.
    """
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self._batches = iter(batches)

        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(self._batches, None)
            return None if batch is None else {"images": batch}

    metadata = onnx.load_from_string(graph).metadata_props
    with tempfile.TemporaryDirectory() as folder, quiet():
        exact, prepared, quantised = (str(Path(folder, f"{name}.onnx")) for name in ("exact", "prepared", "int8"))
        Path(exact).write_bytes(graph)
        quant_pre_process(exact, prepared, skip_symbolic_shape=True)  # torch has written the shapes
        # Without VNNI, products of full 8-bit weights overflow 16 bits: reduce_range takes 7.
        quantize_static(
            prepared,
            quantised,
            Reader(),
            per_channel=True,
            reduce_range=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
        model = onnx.load(quantised)
    del model.metadata_props[:]
    model.metadata_props.extend(metadata)
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString()


def _ask(classifiers: list[Classifier], images: ImageFolder, has_classes: bool) -> _Answers:
    if has_classes:
        compared = compare(classifiers, images)
        predicted = compared.predicted
        correct = tuple(int(count) for count in compared.is_right.sum(1))
        assert len(correct) == 2
        return _Answers(len(compared.images), int((predicted[0] == predicted[1]).sum()), correct, [*compared.skipped])
    usable, skipped = split_unreadable(images)
    exact, small = (predict(classifier, usable, top=1)[0] for classifier in classifiers)
    alike = sum(first.label == second.label for first, second in zip(exact, small, strict=True))
    return _Answers(len(usable), alike, None, skipped)


def _measure(networks: list[GraphNetwork], crop: int) -> list[float]:
    """Return each graph's median seconds for one image. Rounds are interleaved: a busy machine slows both alike."""
    images = draw_images(1, crop, crop, torch.Generator().manual_seed(0))
    seconds: list[list[float]] = [[] for _ in networks]
    for _ in range(_WARM_UP + _ROUNDS):
        for network, times in zip(networks, seconds, strict=True):
            started = time.perf_counter()
            network(images)
            times.append(time.perf_counter() - started)
    return [statistics.median(times[_WARM_UP:]) for times in seconds]


def _format_table(
    networks: Mapping[str, GraphNetwork], answers: _Answers, seconds: list[float], crop: int
) -> list[str]:
    lines = [f"{'':9}{'size':>10}{'top-1':>10}{'one image':>12}"]
    for number, (name, network) in enumerate(networks.items()):
        top1 = f"{100 * answers.correct[number] / answers.num_images:.2f} %" if answers.correct else "-"
        size, latency = f"{network.num_bytes / 1e6:.1f} MB", f"{1000 * seconds[number]:.1f} ms"
        lines.append(f"{name:9}{size:>10}{top1:>10}{latency:>12}")
    why = "" if answers.correct else "; without class folders there is no accuracy"
    lines.append(f"images: {answers.num_images}, {answers.num_alike} of them with the same likeliest class{why}")
    lines.append(f"one image: median of {_ROUNDS} interleaved rounds at {crop} x {crop} pixels on this processor")
    return lines
