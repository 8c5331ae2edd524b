"""A detector as a graph that runs without its code: ONNX, or torch.export's program."""

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim

from resnest_imagenet.errors import ConfigError, UserError
from resnest_imagenet.files import write_atomically
from resnest_imagenet.instances import STRIDE, Detections
from resnest_imagenet.models.folding import fold_batch_norms
from resnest_imagenet.models.rcnn import RCNN
from resnest_imagenet.models.rcnn_graph import RCNNGraph
from resnest_imagenet.weights.card import DescribeObjects
from resnest_imagenet.weights.detection import DETECTION, restore_rcnn
from resnest_imagenet.weights.export import choose_file, digest
from resnest_imagenet.weights.export_rcnn import describe_rcnn
from resnest_imagenet.weights.graphs import (
    OPSET,
    SUFFIXES,
    TOLERANCE,
    GraphForm,
    choose_any,
    draw_images,
    encode_onnx,
    encode_program,
    quiet,
    require_form,
)
from resnest_imagenet.weights.load import Weights, read_weights

LEAST = 3 * STRIDE  # of a side of any size
BOX_TOLERANCE = 1e-4  # of the image's longer side, for the difference of a box's corner
UNMATCHED = 0.01  # of the detections at most: where a number decides, its last digit may

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
    """Write a detector as a graph, unless it finds something else; return a line about the file.

    Its inputs are "images" (1, 3, height, width), padded, and "size", int64 (2,), height and width without the padding;
    its outputs "boxes" (n, 4), "scores" (n,), "labels" (n,), and "masks" (n, 28, 28) where there are any: see
    `RCNNGraph`. The batch norms are folded into the convolutions.

    Args:
        source: a checkpoint of a run of detection, or what `read_weights` has made of it.
        describe: returns what another program needs to use the network.
        out: the file; None: rcnn_MODEL.onnx or .pt2.
        weights: "model", "ema" or "auto".
        protocol: what is not its run's of min_score, nms and detections, which are part of the graph, and of
            short_side and longest, the size of the images that it is tried with.
        crop: side of the images where not any are taken, a multiple of 32; None: as much as `longest` needs.
        form: "onnx" or "torch_export".
        sizes: of images: "any" (of "onnx" only; multiples of 32 from 96 on) or "crop"; None: any where there can be.

    Raises:
        UserError: for what a user can cause, as one line; or the graph's detections are not the network's.
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
    file = choose_file(loaded.source, out, f"rcnn_{loaded.model}.{SUFFIXES[form]}")
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
    make, load = (_make_onnx, _load_onnx) if form.name == "onnx" else (_make_program, _load_program)
    folded = fold_batch_norms(network)
    assert isinstance(folded, RCNN)
    with quiet(), torch.no_grad():
        content = make(RCNNGraph(folded).eval(), form, metadata)
        run = load(content, form)
    agreement = compare_detections(network, run, trials)
    if agreement.unmatched > UNMATCHED * agreement.total:
        raise UserError(
            f"{file} is not written: {agreement.unmatched} of its and torch's {agreement.total} detections in drawn "
            "images are not the same: use format=safetensors or hub"
        )
    with write_atomically(file) as opened:
        opened.write(content)
    return f"wrote {file}: {words}, {form.text}, {len(content) / 1e6:.1f} MB, {agreement.text}, SHA-256 {digest(file)}"


@dataclass(frozen=True)
class Agreement:
    """How a network and its graph agree.

    Attributes:
        total: detections of both, together.
        unmatched: those of them that the other does not have.
        box, score, mask: largest differences of those that both have: in pixels, and of probabilities.
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

    Detections are the same where their classes are, and boxes, scores and masks differ by less than the tolerances.

    Args:
        network: in evaluation mode.
        run: its graph.
        trials: (height, width) of each image, and without its padding.
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
    """Return the differences of the detections that both have, float32 (n, 3): of box, score and mask.

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
    # Of any size: other sides than the least and than each other, which are taken for special.
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


def _make_program(graph: RCNNGraph, form: _DetectorForm, metadata: dict[str, str]) -> bytes:
    sides = (form.crop, form.crop)
    return encode_program(torch.export.export(graph, (torch.zeros(1, 3, *sides), torch.tensor(sides))), metadata)


def _load_program(content: bytes, form: _DetectorForm) -> RunDetector:
    module = torch.export.load(io.BytesIO(content)).module()
    return lambda images, size: Detections(*module(images, size))
