"""A graph in OpenVINO's form: a file of operations, NAME.xml, and one of weights, NAME.bin."""

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor


def encode_openvino(graph: bytes) -> tuple[bytes, bytes]:
    """Return an ONNX graph as the contents of NAME.xml and NAME.bin.

    Weights stay float32. The metadata of the ONNX graph becomes the section "framework" of OpenVINO's rt_info.
    """
    import openvino

    # Not `openvino.convert_model`, which may send statistics to its makers.
    model = openvino.Core().read_model(graph)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "graph.xml")
        openvino.save_model(model, file, compress_to_fp16=False)
        return file.read_bytes(), file.with_suffix(".bin").read_bytes()


def load_openvino(xml: bytes, weights: bytes) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    """Return a function that runs a graph on the CPU, in float32: from inputs to outputs, by name."""
    import openvino

    core = openvino.Core()
    # On processors with bfloat16 it would round by default.
    compiled = core.compile_model(core.read_model(xml, weights), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

    def run(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        outputs = compiled({name: value.numpy() for name, value in inputs.items()})
        return {port.any_name: torch.from_numpy(value.copy()) for port, value in outputs.items()}

    return run
