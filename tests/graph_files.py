"""Graphs in files, opened by the programs that they are for."""

import torch


def open_openvino(path):
    """Return a function from inputs, by name, to outputs, by name; and the graph's metadata."""
    import openvino

    core = openvino.Core()
    model = core.read_model(path)  # NAME.bin is found beside it
    compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

    def compute(**inputs):
        outputs = compiled({name: value.numpy() for name, value in inputs.items()})
        return {port.any_name: torch.from_numpy(value.copy()) for port, value in outputs.items()}

    return compute, model.get_rt_info(["framework"]).value


def make_graphs_once(monkeypatch, module, made):
    """Let a module of the exports make each ONNX graph of one network only once: it takes seconds."""
    make = module._make_onnx

    def make_once(network, form, metadata):
        key = (form.crop, form.takes_any)
        if key not in made:
            made[key] = make(network, form, metadata)
        return made[key]

    monkeypatch.setattr(module, "_make_onnx", make_once)
