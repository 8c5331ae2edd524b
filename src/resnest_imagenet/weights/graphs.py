"""A network as a graph that runs without its code: ONNX, OpenVINO's form, or torch.export's program."""

import io
import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import partial
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
from resnest_imagenet.files import naming_storage_errors, write_atomically
from resnest_imagenet.models.folding import fold_batch_norms
from resnest_imagenet.weights.card import DescribeInput, DescribeScenes, open_network
from resnest_imagenet.weights.export import (
    choose_file,
    describe_deeplab,
    describe_weights,
    digest,
    require_other,
)
from resnest_imagenet.weights.load import Weights, read_weights
from resnest_imagenet.weights.openvino import encode_openvino, load_openvino
from resnest_imagenet.weights.segmentation import SEGMENTATION, restore_deeplab

SUFFIXES = {"onnx": "onnx", "openvino": "xml", "torch_export": "pt2"}
OPSET = 18  # torch's translations are written for it; any other is converted from it
TOLERANCE = 1e-3  # largest difference between graph and network, as a share of the largest logit

# What each form is made with.
_PACKAGES = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "openvino": ("onnx", "onnxscript", "openvino")}
_ANY = ("onnx", "openvino")  # forms whose graphs may take images of any size

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

    The batch norms are folded into the convolutions. A graph of ONNX or OpenVINO has the input "images" (batch, 3,
    height, width), with any batch, height and width, and the output "logits" (batch, classes). torch.export's program
    takes only images of the crop, and so do the others with sizes="crop".

    Args:
        source: a checkpoint, a file of weights, or published weights; or the result of `read_weights` for one.
        describe: returns the network's input, from the weights and the network's name.
        out: the file; None: MODEL.onnx, MODEL.xml (with MODEL.bin beside it) or MODEL.pt2.
        model: name of the network; None if the weights include it.
        weights: "model", "ema" or "auto".
        form: "onnx", "openvino" or "torch_export".
        sizes: of images: "any" (not "torch_export") or "crop"; None: any if the form can.

    Raises:
        UserError: a user's error, in one line; or the graph's logits differ from the network's.
    """
    require_form(form)
    network, loaded, card = open_network(source, describe, model, weights)
    file = choose_graph_file(loaded.source, out, card.model, form)
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
        out: the file; None: deeplabv3_MODEL.onnx, .xml or .pt2.
        weights: "model", "ema" or "auto".
        crop: side of the images with which the graph is tried, and the only side that it takes if it does not take any;
            None: the recipe's.
        form: "onnx", "openvino" or "torch_export".
        sizes: of images: "any" (not "torch_export") or "crop"; None: any if the form can.

    Raises:
        UserError: a user's error, in one line; or the graph's logits differ from the network's.
    """
    require_form(form)
    loaded = source if isinstance(source, Weights) else read_weights(source, weights, (SEGMENTATION,))
    network = restore_deeplab(loaded).eval()
    network.auxiliary = None
    assert loaded.training
    side = crop or loaded.training["crop"]
    file = choose_graph_file(loaded.source, out, f"deeplabv3_{loaded.model}", form)
    graph_form = GraphForm(form, side, choose_any(form, sizes))
    metadata = describe(loaded, side)
    return _write_graph(network, loaded.source, file, graph_form, metadata, describe_deeplab(loaded))


@dataclass(frozen=True)
class GraphForm:
    """The kind of graph: a name of `SUFFIXES`, for images whose sides are the crop, or of any size."""

    name: str
    crop: int
    takes_any: bool

    @property
    def text(self) -> str:
        """Its part of the line about the file."""
        kind = {"onnx": [f"opset {OPSET}"], "openvino": ["OpenVINO IR"]}.get(self.name, [])
        return ", ".join(kind + [f"crop {self.crop}"] * (not self.takes_any))


def choose_any(form: str, sizes: str | None) -> bool:
    """Return whether a graph takes images of any size.

    Args:
        form: a name of `SUFFIXES`.
        sizes: the user's choice: "any", "crop" or None.

    Raises:
        ConfigError: the form has no such graph.
    """
    if sizes == "any" and form not in _ANY:
        raise ConfigError(f"sizes=any is for format=onnx or openvino, not {form}")
    return form in _ANY and sizes != "crop"


def _write_graph(
    network: nn.Module, source: str, file: Path, form: GraphForm, metadata: dict[str, str], words: str
) -> str:
    """Write a network as a graph after comparing the two; return a line about the file, with some words."""
    contents, agreement = make_graph(network, source, file, form, metadata)
    return f"wrote {name_written(file, form)}: {words}, {form.text}, {write_contents(file, contents, agreement)}"


def make_graph(
    network: nn.Module, source: str, file: Path, form: GraphForm, metadata: dict[str, str]
) -> tuple[tuple[bytes, ...], str]:
    """Make a graph and compare it with its network.

    Args:
        network: in evaluation mode.
        source: of its weights, for messages.
        file: that will be written, for messages.
        form: of the graph.
        metadata: texts by name.

    Returns:
        The contents of its files, as `write_contents` takes them, and their agreement in words.

    Raises:
        UserError: the network's logits are not finite, or the graph's differ from them.
    """
    with quiet(), torch.no_grad():
        graph = (fold_batch_norms(network), form, metadata)
        contents = encode_graph(form, partial(_make_onnx, *graph), partial(_make_program, *graph))
        run = load_graph(contents, form)
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
    return contents, f"logits from {lowest:.3g} to {highest:.3g} and within {difference:.2g} of the network's"


def choose_graph_file(source: str, out: str | PathLike[str] | None, name: str, form: str) -> Path:
    """Return the file to write, see `choose_file`; for OpenVINO, NAME.bin beside it must not be the source either."""
    file = choose_file(source, out, f"{name}.{SUFFIXES[form]}")
    if form == "openvino":
        require_other(source, out or file, file.with_suffix(".bin"))
    return file


def name_written(file: Path, form: GraphForm) -> str:
    """Return the files of a graph in words: OpenVINO's weights are in a second file, NAME.bin."""
    return f"{file} and {file.with_suffix('.bin').name}" if form.name == "openvino" else str(file)


def write_contents(file: Path, contents: tuple[bytes, ...], agreement: str) -> str:
    """Write a graph's files; return their size, agreement and checksums in words.

    Args:
        file: of the graph.
        contents: of that file and, for OpenVINO, of its weights.
        agreement: of the graph and its network, in words.
    """
    paths = [file, file.with_suffix(".bin")][: len(contents)]
    if len(paths) > 1:  # without the graph nothing reads the weights, so old and new are never mixed
        with naming_storage_errors(file):
            file.unlink(missing_ok=True)
    for path, content in reversed([*zip(paths, contents, strict=True)]):
        with write_atomically(path) as opened:
            opened.write(content)
    digests = " and ".join(digest(path) for path in paths)
    return f"{sum(map(len, contents)) / 1e6:.1f} MB, {agreement}, SHA-256 {digests}"


def encode_graph(
    form: GraphForm, make_onnx: Callable[[], bytes], make_program: Callable[[], bytes]
) -> tuple[bytes, ...]:
    """Return the contents of a graph's files, as `write_contents` takes them; OpenVINO's are made from the ONNX."""
    if form.name == "torch_export":
        return (make_program(),)
    graph = make_onnx()
    return encode_openvino(graph) if form.name == "openvino" else (graph,)


def load_graph(contents: tuple[bytes, ...], form: GraphForm) -> Run:
    """Return a function that runs a graph on the CPU: from images (B, 3, H, W) to logits.

    Args:
        contents: of its files, see `write_contents`.
        form: of the graph.
    """
    if form.name == "openvino":
        run = load_openvino(*contents)
        return lambda images: run({"images": images})["logits"]
    return _load_onnx(*contents) if form.name == "onnx" else _load_program(*contents)


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


def require_form(form: str, option: str | None = None) -> None:
    """Raise a ConfigError if a package of a format, such as "onnx", is not installed.

    Args:
        form: whose packages are needed.
        option: that needs them; None: the format itself.
    """
    try:
        for package in _PACKAGES.get(form, ()):
            import_module(package)
    except ImportError as error:
        raise ConfigError(f"{option or f'format={form}'} needs {name_extra(form)}") from error


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
