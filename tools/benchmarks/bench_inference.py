"""ResNeSt-50's inference on a CPU, side by side: timm's, ours, and the runtimes that our graphs are for.

python tools/benchmarks/bench_inference.py [--batch 1 8 32] [--rounds 5] [--only NAME ...] [--out FILE.json]
python tools/benchmarks/bench_inference.py --accuracy CKPT IMAGES --out FILE.json   (of all graphs, with class folders)
python tools/benchmarks/bench_inference.py --report FILE.json      (the page docs/performance_inference.md)

All competitors have the same weights and images; the rounds are interleaved. --out adds to what the file has, so that a
machine can be measured in parts. --graphs DIR keeps the graphs: a second call finds them.
"""

import argparse
import collections
import copy
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import timm
import torch
from bench import begin_page, clock, describe_machine, measure
from torch import Tensor, nn

from resnest_imagenet import build_model
from resnest_imagenet.compute import keep_freed_memory, place
from resnest_imagenet.inference.quantise import quantise_graph
from resnest_imagenet.models.cost import count_cost
from resnest_imagenet.models.folding import fold_batch_norms
from resnest_imagenet.weights.graphs import GraphForm, draw_images, make_graph, quiet

CPU = torch.device("cpu")
BASE = "timm, channels_last"
BOUND = "the multiplications alone"
SIDE = 2048  # of that product's matrices
PAUSE = 0.03  # seconds before each trial: threads of the runtime before it spin for some milliseconds
Infer = Callable[[Tensor], Tensor]  # images (B, 3, H, W) to logits (B, K)


def make_network() -> nn.Module:
    """Return a ResNeSt-50 of random weights in evaluation mode whose batch norms normalise, as trained ones do."""
    network = build_model("resnest50", zero_gamma=False)
    norms = {name: module for name, module in network.named_modules() if isinstance(module, nn.BatchNorm2d)}
    for name, norm in norms.items():
        norm.momentum = 1
        if name.endswith("bn3"):  # as after training, a block adds less than its shortcut has
            nn.init.constant_(norm.weight, 0.4)
    with torch.no_grad():
        network(draw_images(16, 224, 224, torch.Generator().manual_seed(1)))
    for name, norm in norms.items():
        if name.endswith("conv2.bn1"):  # some of its 16 values per channel are nearly equal
            norm.running_var.fill_(norm.running_var.mean())
    return network.eval()


def make_graphs(network: nn.Module, crop: int, folder: Path) -> dict[str, bytes]:
    """Return the network's graphs of ONNX, exact and of 8-bit integers; those that the folder has are read.

    The integers are calibrated with drawn images.
    """
    files = {name: folder / f"{name}.onnx" for name in ("float32", "int8")}
    if not all(file.exists() for file in files.values()):
        (exact,), _ = make_graph(network, "drawn weights", files["float32"], GraphForm("onnx", crop, True), {})
        batches = (draw_images(8, crop, crop, torch.Generator().manual_seed(seed)).numpy() for seed in range(2, 6))
        folder.mkdir(parents=True, exist_ok=True)
        files["float32"].write_bytes(exact)
        files["int8"].write_bytes(quantise_graph(exact, batches))
    return {name: file.read_bytes() for name, file in files.items()}


def open_onnxruntime(graph: bytes, threads: int) -> Infer:
    """Return a graph in onnxruntime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


def open_openvino(graph: bytes, threads: int) -> Infer:
    """Return a graph in OpenVINO; its exact operations compute in float32 on processors with bfloat16 too."""
    import openvino

    core = openvino.Core()
    options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    compiled = core.compile_model(core.read_model(graph), "CPU", options)
    return lambda images: torch.from_numpy(compiled({"images": images.numpy()})["logits"])


def open_program(network: nn.Module, crop: int) -> Infer:
    """Return the network as torch.export's program."""
    with quiet():
        shapes = ({0: torch.export.Dim("batch")},)
        program = torch.export.export(network, (torch.zeros(2, 3, crop, crop),), dynamic_shapes=shapes)
    return program.module()


def compile_network(network: nn.Module, is_frozen: bool) -> Infer:
    """Return a network that compiles itself for each new size of its input."""
    compiled = torch.compile(network, dynamic=False)

    def infer(images: Tensor) -> Tensor:
        with torch._inductor.config.patch(freezing=is_frozen):
            return compiled(images)

    return infer


def open_competitors(network: nn.Module, args: argparse.Namespace, folder: Path) -> dict[str, Infer]:
    """Return what is compared, compiled or not; all take images of either memory format."""
    theirs = timm.create_model("resnest50d").eval()
    theirs.load_state_dict(network.state_dict())
    theirs_last, ours = place(copy.deepcopy(theirs), CPU), place(fold_batch_norms(network), CPU)
    formula = build_model("resnest50", split_attention="reference").eval()
    formula.load_state_dict(network.state_dict())
    formula = place(fold_batch_norms(formula), CPU)
    exact, threads = partial(make_graphs, network, args.crop, folder), args.threads
    makers: dict[str, Callable[[], Infer]] = {
        BASE: lambda: theirs_last,
        "timm, NCHW": lambda: theirs,
        "ours (resnest-predict)": lambda: ours,
        "ours, torch.export": lambda: open_program(formula, args.crop),
        "ours, onnxruntime": lambda: open_onnxruntime(exact()["float32"], threads),
        "ours, OpenVINO": lambda: open_openvino(exact()["float32"], threads),
        "ours, onnxruntime, int8": lambda: open_onnxruntime(exact()["int8"], threads),
        "ours, OpenVINO, int8": lambda: open_openvino(exact()["int8"], threads),
    }
    if args.compile:
        makers = {
            BASE: lambda: theirs_last,
            "ours (resnest-predict)": lambda: ours,
            "timm, channels_last, compiled": lambda: compile_network(theirs_last, is_frozen=False),
            "timm, channels_last, compiled and frozen": lambda: compile_network(theirs_last, is_frozen=True),
            "ours, compiled and frozen": lambda: compile_network(formula, is_frozen=True),
        }
    names = [BASE, *(name for name in makers if name != BASE and (not args.only or name in args.only))]
    return {name: makers[name]() for name in names}


def bench_batch(competitors: dict[str, Infer], batch: int, crop: int, rounds: int) -> dict:
    """Return the seconds of each round, and the largest difference of a logit from timm's, over the largest logit."""
    images = draw_images(batch, crop, crop, torch.Generator().manual_seed(7))
    views = {True: images.contiguous(memory_format=torch.channels_last), False: images}
    runs: dict[str, Callable[[], float]] = {}
    differences: dict[str, float] = {}
    expected = competitors[BASE](images)
    for name, infer in competitors.items():
        view = views["runtime" not in name and "OpenVINO" not in name and "NCHW" not in name]
        differences[name] = float((infer(view) - expected).abs().max() / expected.abs().max())

        def run(infer: Infer = infer, view: Tensor = view) -> float:
            time.sleep(PAUSE)
            with clock(CPU) as seconds:
                infer(view)
            return seconds[0]

        runs[name] = run
    flops = 2 * batch * count_cost("resnest50", crop)[1]
    left, right = torch.randn(2, SIDE, SIDE)
    runs[BOUND] = lambda: flops / (2 * SIDE**3) * _time_product(left, right)
    kind = ", compiled" if any("compiled" in name for name in competitors) else ""
    title = f"Batch {batch}{kind}"
    return {"title": title, "batch": batch, "seconds": measure(runs, rounds), "differences": differences}


def _time_product(left: Tensor, right: Tensor) -> float:
    time.sleep(PAUSE)
    with clock(CPU) as seconds:
        torch.mm(left, right)
    return seconds[0]


def profile_graph(graph: bytes, batch: int, crop: int) -> dict[str, float]:
    """Return the shares of operators in onnxruntime's time on one thread, in percent, of the fastest of three runs."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.enable_profiling = 1, True
    with tempfile.TemporaryDirectory() as folder:
        options.profile_file_prefix = f"{folder}/profile"
        session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        for _ in range(3):
            session.run(None, {"images": draw_images(batch, crop, crop, torch.Generator()).numpy()})
        events = json.loads(Path(session.end_profiling()).read_text())
    times: dict[tuple[str, str], float] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            node = (event["args"]["op_name"], event["name"])
            times[node] = min(times.get(node, float("inf")), event["dur"])
    totals: collections.Counter[str] = collections.Counter()
    for (operator, _), duration in times.items():
        totals[operator] += duration
    return {name: round(100 * time / totals.total(), 1) for name, time in totals.most_common(10)}


class Graph(nn.Module):
    """An opened graph in the place of a network."""

    def __init__(self, infer: Infer) -> None:
        super().__init__()
        self._infer = infer
        self._place = nn.Parameter(torch.zeros(()), requires_grad=False)  # its device is the network's

    def forward(self, images: Tensor) -> Tensor:
        """Map images (B, 3, H, W) to logits (B, K)."""
        return self._infer(images.contiguous())


def measure_accuracy(ckpt: str, images: str, threads: int) -> dict:
    """Return how many images of class folders the network and its graphs predict correctly, in percent."""
    from dataclasses import replace

    from resnest_imagenet.inference.classifier import open_classifier
    from resnest_imagenet.inference.compare import compare
    from resnest_imagenet.inference.images import list_classified_images
    from resnest_imagenet.inference.quantise import export_int8

    classifier, listed = open_classifier(ckpt, device="cpu"), list_classified_images(images)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "int8.onnx")
        print(export_int8(ckpt, images, file)[0], flush=True)
        small = file.read_bytes()
        form = GraphForm("onnx", classifier.transform.crop, True)
        (exact,), _ = make_graph(classifier.module, ckpt, file, form, {})
    graphs = {
        "ours (resnest-predict)": classifier.module,
        "ours, onnxruntime": Graph(open_onnxruntime(exact, threads)),
        "ours, OpenVINO": Graph(open_openvino(exact, threads)),
        "ours, onnxruntime, int8": Graph(open_onnxruntime(small, threads)),
        "ours, OpenVINO, int8": Graph(open_openvino(small, threads)),
    }
    compared = compare([replace(classifier, module=module) for module in graphs.values()], listed)
    top1 = (100 * compared.is_right.mean(1)).round(2).tolist()
    alike = (100 * (compared.predicted == compared.predicted[0]).mean(1)).round(2).tolist()
    data = "/".join(Path(images).parts[-2:])
    title = f"{classifier.name} at crop {form.crop}, {len(compared.images):,} images of {data}"
    return {
        "title": title,
        "top1": dict(zip(graphs, top1, strict=True)),
        "alike": dict(zip(graphs, alike, strict=True)),
    }


def report(result: dict) -> str:
    """Return docs/performance_inference.md."""
    text = [
        "Made by `make bench-inference` (tools/benchmarks/bench_inference.py): logits of ResNeSt-50 on a CPU, the same",
        "weights and images, interleaved rounds in one process. A ratio is the time of timm's network in channels_last",
        "over the competitor's, above 1 the competitor is faster: the median of the rounds, and their range. The",
        "difference is the largest one of a logit from timm's, as a share of the largest logit. int8: weights and",
        "activations are 8-bit integers, calibrated with drawn images; these weights are random, the accuracy of a",
        "trained network is below. The last row shows what float32 leaves to gain without another algorithm: all",
        f"multiplications at the speed of torch.mm for two matrices of {SIDE} x {SIDE}, and nothing else.",
    ]
    lines = begin_page("Speed of inference, side by side", text, result["machine"])
    for part in result["parts"]:
        lines += _report_batch(part)
    if result.get("profile"):
        lines += ["## Where onnxruntime's time goes", "", "In percent of a batch of 8, on one thread:", ""]
        for name, shares in result["profile"].items():
            lines.append(f"- {name}: " + ", ".join(f"{operator} {share}" for operator, share in shares.items()))
        lines.append("")
    for accuracy in result.get("accuracy", []):
        lines += [f"## Accuracy of the graphs: {accuracy['title']}", ""]
        lines += ["| | top-1, % | same class as the network, % |", "|---|---:|---:|"]
        lines += [f"| {name} | {top1:.2f} | {accuracy['alike'][name]:.2f} |" for name, top1 in accuracy["top1"].items()]
        lines.append("")
    return "\n".join(lines)


def _report_batch(part: dict) -> list[str]:
    base = part["seconds"][BASE]
    lines = [f"## {part['title']}", "", f"| | faster than {BASE} by | rounds | ms an image | difference |"]
    lines.append("|---|---:|---:|---:|---:|")
    for name, seconds in part["seconds"].items():
        ratios = sorted(other / mine for other, mine in zip(base, seconds, strict=True))
        row = [f"{statistics.median(ratios):.2f}", f"{ratios[0]:.2f} to {ratios[-1]:.2f}"]
        row.append(f"{1000 * statistics.median(seconds) / part['batch']:.1f}")
        row.append(f"{part['differences'][name]:.1e}" if name in part["differences"] else "")
        lines.append(f"| {name} | {' | '.join(row)} |")
    return [*lines, ""]


def run(args: argparse.Namespace, result: dict, save: Callable[[], None]) -> None:
    """Measure what the arguments ask for, into the result, which is saved after each part."""
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    result["machine"] = describe_machine(CPU)
    if args.accuracy:
        measured = measure_accuracy(*args.accuracy, args.threads)
        others = [part for part in result.get("accuracy", []) if part["title"] != measured["title"]]
        result["accuracy"] = [*others, measured]
        return
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        network, graphs = make_network(), args.graphs or Path(folder)
        competitors = open_competitors(network, args, graphs)
        for batch in args.batch:
            part = bench_batch(competitors, batch, args.crop, args.rounds)
            others = [other for other in result.get("parts", []) if other["title"] != part["title"]]
            result["parts"] = sorted([*others, part], key=lambda part: ("compiled" in part["title"], part["batch"]))
            save()
        if args.profile:
            contents = make_graphs(network, args.crop, graphs)
            result["profile"] = {name: profile_graph(graph, 8, args.crop) for name, graph in contents.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--crop", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument(
        "--only", nargs="+", default=[], help="names of competitors; timm's in channels_last is always one"
    )
    parser.add_argument("--compile", action="store_true", help="compare the compiled ones, minutes for each batch")
    parser.add_argument("--profile", action="store_true", help="list onnxruntime's operators too")
    parser.add_argument(
        "--accuracy", nargs=2, metavar=("CKPT", "IMAGES"), help="of the graphs, in place of their speed"
    )
    parser.add_argument("--graphs", type=Path, help="a folder that keeps the graphs")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--report", type=Path)
    args = parser.parse_args()
    if args.report:
        print(report(json.loads(args.report.read_text())), end="")
        return
    result = json.loads(args.out.read_text()) if args.out and args.out.exists() else {"parts": []}

    def save() -> None:
        if args.out:
            args.out.write_text(json.dumps(result, indent=1) + "\n")

    run(args, result, save)
    save()
    print(report(result))


if __name__ == "__main__":
    main()
