"""A network as a graph that runs without its code: ONNX, or torch.export's program."""

import io
import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from importlib import import_module
from os import PathLike
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim
from torch.fx import GraphModule

from resnest_imagenet.errors import CheckpointError, ConfigError, UserError, name_extra
from resnest_imagenet.files import write_atomically
from resnest_imagenet.models.folding import fold_batch_norms
from resnest_imagenet.weights.card import DescribeInput, DescribeScenes, open_network
from resnest_imagenet.weights.export import choose_file, describe_deeplab, describe_weights, digest
from resnest_imagenet.weights.load import Weights, read_weights
from resnest_imagenet.weights.segmentation import SEGMENTATION, restore_deeplab

SUFFIXES = {"onnx": "onnx", "torch_export": "pt2"}
OPSET = 18  # torch's translations are written for it; any other is converted from it
TOLERANCE = 1e-3  # largest difference between graph and network, as a share of the largest logit

Run = Callable[[Tensor], Tensor]


def export_graph(
    source: Weights | str | PathLike[str],
    describe: DescribeInput,
    out: str | PathLike[str] | None = None,
    *,
    model: str | None = None,
    weights: str = "auto",
    form: str = "onnx",
    sizes: str | None = None,
) -> str:
    """Write a network as a graph, if the graph's logits agree with the network's; return a line about the file.

    The batch norms are folded into the convolutions. An ONNX graph has the input "images" (batch, 3, height, width),
    with any batch, height and width, and the output "logits" (batch, classes). torch.export's program takes only images
    of the crop, and so does an ONNX graph with sizes="crop".

    Args:
        source: a checkpoint, a file of weights, or published weights; or the result of `read_weights` for one.
        describe: returns the network's input, from the weights and the network's name.
        out: the file; None: MODEL.onnx or MODEL.pt2.
        model: name of the network; None if the weights include it.
        weights: "model", "ema" or "auto".
        form: "onnx" or "torch_export".
        sizes: of images: "any" ("onnx" only) or "crop"; None: any if the form can.

    Raises:
        UserError: a user's error, in one line; or the graph's logits differ from the network's.
    """
    require_form(form)
    network, loaded, card = open_network(source, describe, model, weights)
    file = choose_file(loaded.source, out, f"{card.model}.{SUFFIXES[form]}")
    words = describe_weights(loaded, card.model)
    graph_form = GraphForm(form, card.images.crop, choose_any(form, sizes))
    return _write_graph(network, loaded.source, file, graph_form, card.to_metadata(), words)


def export_deeplab_graph(
    source: Weights | str | PathLike[str],
    describe: DescribeScenes,
    out: str | PathLike[str] | None = None,
    *,
    weights: str = "auto",
    crop: int | None = None,
    form: str = "onnx",
    sizes: str | None = None,
) -> str:
    """Write a DeepLabV3 as a graph in the same way; its output is "logits" (batch, classes, height, width).

    The graph does not include the auxiliary head, which only training needs.

    Args:
        source: a checkpoint of a run of segmentation, or the result of `read_weights` for one.
        describe: returns the description for other programs.
        out: the file; None: deeplabv3_MODEL.onnx or .pt2.
        weights: "model", "ema" or "auto".
        crop: side of the images with which the graph is tried, and the only side that it takes if it does not take any;
            None: the recipe's.
        form: "onnx" or "torch_export".
        sizes: of images: "any" ("onnx" only) or "crop"; None: any if the form can.

    Raises:
        UserError: a user's error, in one line; or the graph's logits differ from the network's.
    """
    require_form(form)
    loaded = source if isinstance(source, Weights) else read_weights(source, weights, (SEGMENTATION,))
    network = restore_deeplab(loaded).eval()
    network.auxiliary = None
    assert loaded.training
    side = crop or loaded.training["crop"]
    file = choose_file(loaded.source, out, f"deeplabv3_{loaded.model}.{SUFFIXES[form]}")
    graph_form = GraphForm(form, side, choose_any(form, sizes))
    metadata = describe(loaded, side)
    return _write_graph(network, loaded.source, file, graph_form, metadata, describe_deeplab(loaded))


@dataclass(frozen=True)
class GraphForm:
    """The kind of graph: "onnx" or "torch_export", for images whose sides are the crop, or of any size."""

    name: str
    crop: int
    takes_any: bool

    @property
    def text(self) -> str:
        """Its part of the line about the file."""
        kind = [f"opset {OPSET}"] * (self.name == "onnx") + [f"crop {self.crop}"] * (not self.takes_any)
        return ", ".join(kind)


def choose_any(form: str, sizes: str | None) -> bool:
    """Return whether a graph takes images of any size.

    Args:
        form: "onnx" or "torch_export".
        sizes: the user's choice: "any", "crop" or None.

    Raises:
        ConfigError: the form has no such graph.
    """
    if sizes == "any" and form != "onnx":
        raise ConfigError(f"sizes=any is for format=onnx, not {form}")
    return form == "onnx" and sizes != "crop"


def _write_graph(
    network: nn.Module, source: str, file: Path, form: GraphForm, metadata: dict[str, str], words: str
) -> str:
    """Write a network as a graph after comparing the two; return a line about the file, with some words."""
    make, load = (_make_onnx, _load_onnx) if form.name == "onnx" else (_make_program, _load_program)
    with quiet(), torch.no_grad():
        content = make(fold_batch_norms(network), form, metadata)
        run = load(content)
    shapes = [(1, form.crop, form.crop), (3, form.crop, form.crop)]
    if form.takes_any:
        shapes.append((2, form.crop + 33, form.crop))
    difference, lowest, highest = compare_logits(network, run, shapes)
    largest = max(-lowest, highest)
    if not largest < float("inf"):
        raise CheckpointError(f"{source}: the logits are not finite")
    if not difference <= TOLERANCE * largest:
        raise UserError(
            f"{file} is not written: its logits (up to {largest:.3g}) differ by {difference:.2g} from torch's"
        )
    with write_atomically(file) as opened:
        opened.write(content)
    return (
        f"wrote {file}: {words}, {form.text}, {len(content) / 1e6:.1f} MB, logits from "
        f"{lowest:.3g} to {highest:.3g} and within {difference:.2g} of the network's, SHA-256 {digest(file)}"
    )


def compare_logits(model: nn.Module, run: Run, shapes: list[tuple[int, int, int]]) -> tuple[float, float, float]:
    """Run a network and its graph on images.

    Args:
        model: the network, in evaluation mode.
        run: its graph.
        shapes: (batch, height, width) of each trial.

    Returns:
        The largest absolute difference of a logit, and the network's lowest and highest logit; NaN if any value is NaN.
    """
    generator = torch.Generator().manual_seed(0)
    figures = []
    for shape in shapes:
        images = draw_images(*shape, generator)
        with torch.no_grad():
            logits = model(images)
            difference = (logits - run(images)).abs().max()
        figures.append(torch.stack((difference, -logits.min(), logits.max())))  # logits of pixels would be too many
    difference, lowest, highest = torch.stack(figures).amax(0).tolist()
    return difference, -lowest, highest


def draw_images(batch: int, height: int, width: int, generator: torch.Generator) -> Tensor:
    """Return normalised images (batch, 3, height, width), as smooth as photographs and in their range."""
    coarse = torch.randn(batch, 3, height // 16, width // 16, generator=generator)
    return F.interpolate(coarse, (height, width), mode="bicubic").clamp(-2, 2.5)


def require_form(form: str) -> None:
    """Raise a ConfigError if a package of a format, "onnx" or "torch_export", is not installed."""
    if form != "onnx":
        return
    try:
        for package in ("onnx", "onnxscript", "onnxruntime"):
            import_module(package)
    except ImportError as error:
        raise ConfigError(f"format=onnx needs {name_extra('onnx')}") from error


def _make_onnx(model: nn.Module, form: GraphForm, metadata: dict[str, str]) -> bytes:
    # For any size, the example has two different sides above 32 pixels: torch would specialise on others.
    sides = (form.crop + 32, form.crop + 64) if form.takes_any else (form.crop, form.crop)
    any_side = {2: Dim("height"), 3: Dim("width")} if form.takes_any else {}
    program = torch.onnx.export(
        model,
        (torch.zeros(2, 3, *sides),),
        dynamo=True,
        verbose=False,
        input_names=["images"],
        output_names=["logits"],
        opset_version=OPSET,
        dynamic_shapes=({0: Dim("batch"), **any_side},),
    )
    assert program is not None
    return encode_onnx(program.model_proto, metadata)


def encode_onnx(graph: Any, metadata: dict[str, str]) -> bytes:
    """Return a checked ONNX model with metadata as a file's content.

    Args:
        graph: of torch.onnx; it is changed.
        metadata: texts by name.
    """
    import onnx

    for node in graph.graph.node:
        node.ClearField("metadata_props")  # lines and paths of our source
    for key, value in metadata.items():
        graph.metadata_props.add(key=key, value=value)
    onnx.checker.check_model(graph, full_check=True)
    return graph.SerializeToString()


def _load_onnx(content: bytes) -> Run:
    import onnxruntime

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


def _make_program(model: nn.Module, form: GraphForm, metadata: dict[str, str]) -> bytes:
    # For one size: in every stage, other sizes would depend on whether the example's is even or odd.
    images = torch.zeros(2, 3, form.crop, form.crop)
    return encode_program(torch.export.export(model, (images,), dynamic_shapes=({0: Dim("batch")},)), metadata)


def encode_program(program: torch.export.ExportedProgram, metadata: dict[str, str]) -> bytes:
    """Return a program with metadata, texts by name, as a file's content; the program is changed."""
    for part in program.graph_module.modules():
        for node in part.graph.nodes if isinstance(part, GraphModule) else ():
            node.meta.pop("stack_trace", None)  # lines and paths of our source
    file = io.BytesIO()
    torch.export.save(program, file, extra_files={"metadata.json": json.dumps(metadata)})
    return file.getvalue()


def _load_program(content: bytes) -> Run:
    return torch.export.load(io.BytesIO(content)).module()


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the exporters' progress and their warnings about their own code; errors are still raised."""
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
