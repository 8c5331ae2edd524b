"""A network as a graph that runs without its code: ONNX, or torch.export's program."""

import io
import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from importlib import import_module
from os import PathLike

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim
from torch.fx import GraphModule

from resnest_imagenet.errors import CheckpointError, ConfigError, UserError
from resnest_imagenet.files import replacing
from resnest_imagenet.models.folding import fold_batch_norms
from resnest_imagenet.weights.card import DescribeInput, open_network
from resnest_imagenet.weights.export import choose_file, describe_weights, digest

OPSET = 18  # what torch's translations are written in; any other is converted from it
TOLERANCE = 1e-3  # of the largest logit, for the difference between the graph and the network

Run = Callable[[Tensor], Tensor]


def export_graph(
    source: str | PathLike[str],
    describe: DescribeInput,
    out: str | PathLike[str] | None = None,
    *,
    model: str | None = None,
    weights: str = "auto",
    form: str = "onnx",
) -> str:
    """Write a network as a graph, unless it computes something else; return a line about the file.

    The batch norms are folded into the convolutions. Of ONNX the input is "images" (batch, 3, height, width), all but
    the 3 of any size, and the output "logits" (batch, classes); torch.export's program is for images of the crop.

    Args:
        source: a checkpoint, a file of weights, or published weights.
        describe: returns the input of weights and their network's name.
        out: the file; None: MODEL.onnx or MODEL.pt2.
        model: name of the network; None where the weights tell.
        weights: "model", "ema" or "auto".
        form: "onnx" or "torch_export".

    Raises:
        UserError: for what a user can cause, as one line; or the graph's logits are not the network's.
    """
    is_onnx = form == "onnx"
    if is_onnx:
        _require_onnx()
    network, loaded, card = open_network(source, describe, model, weights)
    crop = card.images.crop
    file = choose_file(source, out, f"{card.model}.{'onnx' if is_onnx else 'pt2'}")
    make, load = (_make_onnx, _load_onnx) if is_onnx else (_make_program, _load_program)
    with _quiet(), torch.no_grad():
        content = make(fold_batch_norms(network), crop, card.to_metadata())
        run = load(content)
    shapes = [(1, crop, crop), (3, crop, crop)]
    if is_onnx:
        shapes.append((2, crop + 33, crop))
    difference, lowest, highest = compare_logits(network, run, shapes)
    largest = max(-lowest, highest)
    if not largest < float("inf"):
        raise CheckpointError(f"{source}: the logits are not finite")
    if not difference <= TOLERANCE * largest:
        raise UserError(f"{file} is not written: its logits differ by {difference:.2g} of {largest:.3g} from torch's")
    with replacing(file) as opened:
        opened.write(content)
    kind = f"opset {OPSET}" if is_onnx else f"crop {crop}"
    return (
        f"wrote {file}: {describe_weights(loaded, card.model)}, {kind}, {len(content) / 1e6:.1f} MB, logits from "
        f"{lowest:.3g} to {highest:.3g} and within {difference:.2g} of the network's, SHA-256 {digest(file)}"
    )


def compare_logits(model: nn.Module, run: Run, shapes: list[tuple[int, int, int]]) -> tuple[float, float, float]:
    """Run a network and its graph on images.

    Args:
        model: the network, in evaluation mode.
        run: its graph.
        shapes: (batch, height, width) of each trial.

    Returns:
        The largest absolute difference of a logit, and the network's lowest and highest logit; NaN if any is.
    """
    generator = torch.Generator().manual_seed(0)
    of_network, of_graph = [], []
    for shape in shapes:
        images = draw_images(*shape, generator)
        with torch.no_grad():
            of_network.append(model(images))
            of_graph.append(run(images))
    network, graph = torch.cat(of_network), torch.cat(of_graph)
    return (network - graph).abs().max().item(), network.min().item(), network.max().item()


def draw_images(batch: int, height: int, width: int, generator: torch.Generator) -> Tensor:
    """Return normalised images (batch, 3, height, width), as smooth as photographs and of their range."""
    coarse = torch.randn(batch, 3, height // 16, width // 16, generator=generator)
    return F.interpolate(coarse, (height, width), mode="bicubic").clamp(-2, 2.5)


def _require_onnx() -> None:
    try:
        for package in ("onnx", "onnxscript", "onnxruntime"):
            import_module(package)
    except ImportError as error:
        raise ConfigError("format=onnx needs the extra [onnx] of resnest-imagenet") from error


def _make_onnx(model: nn.Module, crop: int, metadata: dict[str, str]) -> bytes:
    import onnx

    program = torch.onnx.export(
        model,
        (torch.zeros(2, 3, crop + 32, crop + 64),),  # equal sides, or of 32 pixels, are taken for special
        dynamo=True,
        verbose=False,
        input_names=["images"],
        output_names=["logits"],
        opset_version=OPSET,
        dynamic_shapes=({0: Dim("batch"), 2: Dim("height"), 3: Dim("width")},),
    )
    assert program is not None
    graph = program.model_proto
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


def _make_program(model: nn.Module, crop: int, metadata: dict[str, str]) -> bytes:
    # Of one size: other sizes would depend on the example's being even or odd, in every stage.
    program = torch.export.export(model, (torch.zeros(2, 3, crop, crop),), dynamic_shapes=({0: Dim("batch")},))
    for part in program.graph_module.modules():
        for node in part.graph.nodes if isinstance(part, GraphModule) else ():
            node.meta.pop("stack_trace", None)  # lines and paths of our source
    file = io.BytesIO()
    torch.export.save(program, file, extra_files={"metadata.json": json.dumps(metadata)})
    return file.getvalue()


def _load_program(content: bytes) -> Run:
    return torch.export.load(io.BytesIO(content)).module()


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep back the exporters' progress and warnings of their own parts; what fails is raised."""
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
