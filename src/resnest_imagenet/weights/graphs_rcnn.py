"""A detector as a graph that runs without its code: ONNX, OpenVINO's form, or torch.export's program."""

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim

from resnest_imagenet.errors import ConfigError, UserError
from resnest_imagenet.instances import STRIDE, Detections
from resnest_imagenet.models.folding import fold_batch_norms
from resnest_imagenet.models.rcnn import RCNN
from resnest_imagenet.models.rcnn_graph import RCNNGraph
from resnest_imagenet.weights.card import DescribeObjects
from resnest_imagenet.weights.detection import DETECTION, restore_rcnn
from resnest_imagenet.weights.export_rcnn import describe_rcnn
from resnest_imagenet.weights.graphs import (
    OPSET,
    TOLERANCE,
    GraphForm,
    choose_any,
    choose_graph_file,
    draw_images,
    encode_graph,
    encode_onnx,
    encode_program,
    name_written,
    quiet,
    require_form,
    write_contents,
)
from resnest_imagenet.weights.load import Weights, read_weights
from resnest_imagenet.weights.openvino import load_openvino

LEAST = 3 * STRIDE  # of a side of any size
BOX_TOLERANCE = 1e-4  # of the image's longer side, for the difference of a box's corner
UNMATCHED = 0.01  # largest share of detections: a rounding error may decide about one

RunDetector = Callable[[Tensor, Tensor], Detections]


@dataclass(frozen=True)
class _DetectorForm(GraphForm):
    """The same of a detector, with the names of its outputs."""

    outputs: tuple[str, ...]


def export_rcnn_graph(
    source: Weights | str | PathLike[str],
    describe: DescribeObjects,
    out: str | PathLike[str] | None = None,
    *,
    weights: str = "auto",
    protocol: Mapping[str, Any] | None = None,
    crop: int | None = None,
    form: str = "onnx",
    sizes: str | None = None,
) -> str:
    """Write a detector as a graph, if both find the same objects; return a line about the file.

    The inputs of the graph are "images" (1, 3, height, width), padded, and "size", int64 (2,), height and width without
    the padding. Its outputs are "boxes" (n, 4), "scores" (n,), "labels" (n,) and, of a detector with masks, "masks"
    (n, 28, 28): see `RCNNGraph`. The batch norms are folded into the convolutions.

    Args:
        source: a checkpoint of a run of detection, or what `read_weights` has made of it.
        describe: returns the metadata that another program needs to use the network.
        out: the file; None: rcnn_MODEL.onnx, .xml or .pt2.
        weights: "model", "ema" or "auto".
        protocol: changes to its run's min_score, nms and detections, which are part of the graph, and to short_side and
            longest, which are the size of the trial images.
        crop: side of the images with sizes="crop", a multiple of 32; None: large enough for `longest`.
        form: "onnx", "openvino" or "torch_export".
        sizes: of images: "any" (not "torch_export"; multiples of 32 from 96 on) or "crop"; None: "any" if possible.

    Raises:
        UserError: for errors that a user can cause, as one line; or the graph's detections are not the network's.
    """
    require_form(form)
    takes_any = choose_any(form, sizes)
    loaded = source if isinstance(source, Weights) else read_weights(source, weights, (DETECTION,))
    network = restore_rcnn(loaded, protocol).eval().requires_grad_(False)
    assert loaded.run
    shown = {**loaded.run["protocol"], **(protocol or {})}
    side = crop or _round_up(shown["longest"])
    if side % STRIDE:
        raise ConfigError(f"crop={side}: the sides of a detector's images are multiples of {STRIDE}")
    file = choose_graph_file(loaded.source, out, f"rcnn_{loaded.model}", form)
    outputs = ("boxes", "scores", "labels", *(["masks"] if "masks" in network.loss_names else []))
    graph_form = _DetectorForm(form, side, takes_any, outputs)
    trials = [(side, side, side, side), (side, side, side - side // 4, side)]
    if graph_form.takes_any:
        short, longest = max(_round_up(shown["short_side"]), LEAST), max(_round_up(shown["longest"]), LEAST)
        trials = [(short, longest, short, longest), (longest, short, longest - 9, short - 5)]
    card = describe(loaded) | ({} if graph_form.takes_any else {"crop": str(side)})
    return _write_graph(network, file, graph_form, card, trials, describe_rcnn(loaded))


def _round_up(side: int) -> int:
    return -(-side // STRIDE) * STRIDE


def _write_graph(
    network: RCNN,
    file: Path,
    form: _DetectorForm,
    metadata: dict[str, str],
    trials: list[tuple[int, int, int, int]],
    words: str,
) -> str:
    """Write a detector as a graph that has been run beside it; return a line about the file, with some words."""
    folded = fold_batch_norms(network)
    assert isinstance(folded, RCNN)
    with quiet(), torch.no_grad():
        graph = (RCNNGraph(folded).eval(), form, metadata)
        contents = encode_graph(form, partial(_make_onnx, *graph), partial(_make_program, *graph))
        run = _load_graph(contents, form)
    agreement = compare_detections(network, run, trials)
    if agreement.unmatched > UNMATCHED * agreement.total:
        raise UserError(
            f"{file} is not written: {agreement.unmatched} of its and torch's {agreement.total} detections in drawn "
            "images are not the same: use format=safetensors or hub"
        )
    return f"wrote {name_written(file, form)}: {words}, {form.text}, {write_contents(file, contents, agreement.text)}"


def _load_graph(contents: tuple[bytes, ...], form: _DetectorForm) -> RunDetector:
    if form.name == "openvino":
        return _load_openvino(contents, form)
    return _load_onnx(contents[0], form) if form.name == "onnx" else _load_program(contents[0])


@dataclass(frozen=True)
class Agreement:
    """The agreement of a network and its graph.

    Attributes:
        total: number of detections of both together.
        unmatched: number of them that only one of the two has.
        box, score, mask: largest differences of matching detections, in pixels and in probabilities.
    """

    total: int
    unmatched: int
    box: float
    score: float
    mask: float

    @property
    def text(self) -> str:
        """In words."""
        if not self.total:
            return "which like the network finds nothing in drawn images: try it on images of yours"
        return (
            f"of {self.total} detections by it and by the network in drawn images {self.unmatched} are of one alone, "
            f"the others within {self.box:.2g} pixels and a score of {self.score:.2g}"
        )


def compare_detections(network: RCNN, run: RunDetector, trials: list[tuple[int, int, int, int]]) -> Agreement:
    """Run a network and its graph on images.

    Detections match if they have the same class, and boxes, scores and masks differ by less than the tolerances.

    Args:
        network: in evaluation mode.
        run: its graph.
        trials: (height, width) of each image with and without padding.
    """
    generator = torch.Generator().manual_seed(0)
    total = unmatched = 0
    largest = torch.zeros(3)
    for height, width, *size in trials:
        images = draw_images(1, height, width, generator)
        images[:, :, size[0] :] = 0
        images[..., size[1] :] = 0
        with torch.no_grad():
            (expected,) = network(images, [(size[0], size[1])])
            detections = run(images, torch.tensor(size))
        differences = match_detections(expected, detections, BOX_TOLERANCE * max(size))
        total += len(expected) + len(detections)
        unmatched += len(expected) + len(detections) - 2 * len(differences)
        largest = torch.cat((largest[None], differences)).amax(0)
    return Agreement(total, unmatched, *largest.tolist())


def match_detections(first: Detections, second: Detections, box_tolerance: float) -> Tensor:
    """Return the differences of matching detections in box, score and mask, float32 (n, 3).

    Args:
        first: of one image.
        second: of the same.
        box_tolerance: in pixels.
    """
    free = torch.ones(len(second), dtype=torch.bool)
    rows = []
    for row in range(len(first)):
        values = torch.stack(
            (
                (second.boxes - first.boxes[row]).abs().amax(1),
                (second.scores - first.scores[row]).abs(),
                torch.zeros(len(second))
                if first.masks is None or second.masks is None
                else (second.masks - first.masks[row]).abs().amax((1, 2)),
            ),
            dim=1,
        )
        is_same = free & (second.labels == first.labels[row])
        is_same &= (values <= torch.tensor([box_tolerance, TOLERANCE, 10 * TOLERANCE])).all(1)
        if is_same.any():
            place = int(is_same.nonzero()[0])
            free[place] = False
            rows.append(values[place])
    return torch.stack(rows) if rows else torch.zeros(0, 3)


def _make_onnx(graph: RCNNGraph, form: _DetectorForm, metadata: dict[str, str]) -> bytes:
    # For any size, trace sides that differ from the least one and from each other: exporters specialise such values.
    sides = (4 * STRIDE, 5 * STRIDE) if form.takes_any else (form.crop, form.crop)
    any_side = ({2: STRIDE * Dim("rows", min=3), 3: STRIDE * Dim("columns", min=3)}, None) if form.takes_any else None
    program = torch.onnx.export(
        graph,
        (torch.zeros(1, 3, *sides), torch.tensor(sides)),
        dynamo=True,
        verbose=False,
        input_names=["images", "size"],
        output_names=list(form.outputs),
        opset_version=OPSET,
        dynamic_shapes=any_side,
    )
    assert program is not None
    model = program.model_proto
    for port in model.graph.output:
        port.type.tensor_type.shape.dim[0].dim_param = "detections"
    return encode_onnx(model, metadata)


def _load_onnx(content: bytes, form: _DetectorForm) -> RunDetector:
    import onnxruntime

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])

    def run(images: Tensor, size: Tensor) -> Detections:
        outputs = session.run(list(form.outputs), {"images": images.numpy(), "size": size.numpy()})
        return Detections(*map(torch.from_numpy, outputs))

    return run


def _load_openvino(contents: tuple[bytes, ...], form: _DetectorForm) -> RunDetector:
    graph = load_openvino(*contents)

    def run(images: Tensor, size: Tensor) -> Detections:
        outputs = graph({"images": images, "size": size})
        return Detections(*(outputs[name] for name in form.outputs))

    return run


def _make_program(graph: RCNNGraph, form: _DetectorForm, metadata: dict[str, str]) -> bytes:
    sides = (form.crop, form.crop)
    return encode_program(torch.export.export(graph, (torch.zeros(1, 3, *sides), torch.tensor(sides))), metadata)


def _load_program(content: bytes) -> RunDetector:
    module = torch.export.load(io.BytesIO(content)).module()
    return lambda images, size: Detections(*module(images, size))
