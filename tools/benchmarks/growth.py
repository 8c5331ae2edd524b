"""How cost grows: a step against batch, crop and depth; starting, saving, evaluating, a second rank.

python tools/benchmarks/growth.py [--device cpu] [--precision fp32] [--rounds 3] [--out docs/growth.json] [--only start]
python tools/benchmarks/growth.py --report docs/growth.json     (the tables for docs/growth.md; draws growth.png beside)

Times are ratios, measured side by side: rounds are interleaved, a figure is the median. Memory is what a forward pass
keeps for the backward pass.
"""

import argparse
import io
import json
import multiprocessing
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import cast

# First: it decides how OpenMP waits, before torch.
from bench import Round, begin_page, clock, count_kept, describe_machine, format_machine, make_step, measure  # isort: skip

import torch
from hydra import compose, initialize_config_dir

from resnest_imagenet import build_model
from resnest_imagenet.checkpoint import load_checkpoint, save_checkpoint
from resnest_imagenet.commands.launch import check_config, find_conf
from resnest_imagenet.compute import autocast, keep_freed_memory, place
from resnest_imagenet.config import TrainConfig
from resnest_imagenet.data.demo import write_demo_images
from resnest_imagenet.data.folder import read_image_folder
from resnest_imagenet.data.loader import build_loader
from resnest_imagenet.data.plan import plan_evaluation
from resnest_imagenet.data.transforms import EvalTransform
from resnest_imagenet.distributed import join
from resnest_imagenet.evaluation.accuracy import measure_accuracy
from resnest_imagenet.models.cost import count_cost
from resnest_imagenet.models.folding import fold_batch_norms
from resnest_imagenet.training.history import resume_history
from resnest_imagenet.training.state import TrainingState
from resnest_imagenet.training.trackers import open_trackers

CURVES = {
    "batch": [("resnest50", batch, 224) for batch in (2, 4, 8, 16, 32, 64)],
    "crop": [("resnest50", 8, crop) for crop in (128, 160, 192, 224, 256, 320, 416)],
    "depth": [(f"resnest{depth}", 8, 224) for depth in (14, 26, 50, 101, 200, 269)],
}
REFERENCE = "resnest50, 8 images, crop 224"
STEPS = 5005  # of an epoch of ImageNet at a batch of 256
CPU = torch.device("cpu")
TRAIN = [sys.executable, "-m", "resnest_imagenet.commands.train"]

# What bounds each of them: the profile in performance.md and the tables themselves show it.
BOUNDS = {  # what decides each cost
    "batch": "From a few images on, the arithmetic of the convolutions decides: a step costs in proportion to its "
    "images. With fewer images the fixed cost of a step shows: the optimiser, and the start of a thousand operators. "
    "Memory grows with the batch.",
    "crop": "The arithmetic decides again: a multiply-add costs the same at every crop. Memory grows with the pixels.",
    "depth": "The arithmetic decides: deeper networks have more of it, and are as fast per multiply-add.",
    "start": "It takes the imports of torch, torchvision and DALI, DALI's graph, the network and the first step. "
    "torch's compiler and Triton are not imported, though torchvision asks for the first. A folder, a file or a value "
    "that is wrong is refused before torch is imported.",
    "resume": "Python reads the events and TensorBoard's records, one by one; it writes them more slowly.",
    "report": "The imports decide, torch's and matplotlib's; then each event is parsed once, and a chart draws as many "
    "points as it has pixels.",
    "listing": "The system decides: it returns the names one by one, unsorted.",
    "checkpoint": "torch's serialisation, and the disk, to which the file is flushed. Reading verifies its SHA-256.",
    "evaluation": "The network decides: images are decoded meanwhile, by the same two cores.",
    "ranks": "The arithmetic decides: two ranks with a core each do the work of one process with both, and sum the "
    "gradients.",
}


def measure_point(name: str, batch: int, crop: int, device: str, precision: str) -> tuple[float, float]:
    """Return the seconds of a step, and the MiB that it keeps."""
    keep_freed_memory()
    network = place(build_model(name), torch.device(device))
    images = torch.randn(batch, 3, crop, crop, device=device).contiguous(memory_format=torch.channels_last)
    step = make_step(network, images, torch.randint(1000, (batch,), device=device), precision)
    kept = count_kept(network, images, precision)
    return min([step() for _ in range(3)][1:]), kept


def measure_curves(rounds: int, device: str, precision: str) -> dict[str, dict]:
    """Return by configuration: seconds of a step, MiB kept, multiply-adds of an image and images."""
    steps: dict[str, Round] = {}
    result: dict[str, dict] = {}
    # A process for each: what one has left of its memory is none of the next one's.
    processes = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"), max_tasks_per_child=1)
    for name, batch, crop in {setting for settings in CURVES.values() for setting in settings}:
        point: dict = {"multiply_adds": count_cost(name, crop)[1], "images": batch}

        def step(setting: tuple = (name, batch, crop), point: dict = point) -> float:
            seconds, point["kept"] = processes.submit(measure_point, *setting, device, precision).result()
            return seconds

        key = f"{name}, {batch} images, crop {crop}"
        steps[key], result[key] = step, point
    with processes:
        for key, seconds in measure(steps, rounds, warm_up=0).items():
            result[key]["seconds"] = seconds
    return result


def run_timed(*command: str, until: str | None = None, exit_code: int = 0, **environment: str) -> float:
    """Return the seconds of a process that ends so, or until a line of it begins so; it is ended then."""
    with clock(CPU) as seconds:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, **environment})
        assert process.stdout
        found = any(until is not None and line.startswith(until) for line in process.stdout)
    if found:
        process.kill()
    assert process.wait() == exit_code or found, command
    return seconds[0]


def measure_start(folder: Path, rounds: int) -> dict[str, list[float]]:
    """From nothing to the end of the first step, against the import of torch alone."""
    small = [
        "train.batch_size=8",
        "train.global_batch=8",
        "log.every_steps=1",
        "device=cpu",
        f"data.root={folder}/data",
    ]

    def start() -> float:
        with tempfile.TemporaryDirectory() as run:
            return run_timed(*TRAIN, *small, f"run_dir={run}", until="epoch 1/270, step 1/")

    python = (sys.executable, "-c")
    save_checkpoint(build_model("resnest50").state_dict(), folder / "resnest50.safetensors")
    image = next((folder / "data/val").rglob("*.JPEG"))
    predict = (sys.executable, "-m", "resnest_imagenet.commands.predict", "model=resnest50", "device=cpu")
    predict += (f"ckpt={folder}/resnest50.safetensors", f"images={image}")
    parts: dict[str, Round] = {
        "import torch": lambda: run_timed(*python, "import torch"),
        "resnest-train --help: the configuration composed": lambda: run_timed(*TRAIN, "--help"),
        "resnest-train data.root=/gone: refused": lambda: run_timed(*TRAIN, "data.root=/gone", exit_code=3),
        "the trainer imported": lambda: run_timed(*python, "import resnest_imagenet.training.train"),
        "resnest-predict, one image": lambda: run_timed(*predict),
        "resnest-train, to the end of the first step": start,
    }
    return measure(parts, rounds)


def write_long_log(path: Path, seed: int = 0) -> None:
    """Write the metrics.jsonl of a run of 270 epochs of 5005 steps, a line each 50; noise, as of a training."""
    noise = random.Random(seed)
    steps = range(50, 270 * STEPS, 50)
    values = {"loss": (2.0, 0.1), "lr": (0.1, 0.01), "images_per_s": (1234.0, 30.0), "data_wait": (0.02, 0.01)}
    with path.open("w") as file:
        for step in steps:
            figures = {name: noise.gauss(*moments) for name, moments in values.items()}
            place = {"epoch": step // STEPS + 1, "step": step}
            file.write(json.dumps({"event": "train", **place, **figures, "time": 1e9 + step}) + "\n")


def measure_report(folder: Path, rounds: int) -> dict[str, list[float]]:
    """A page of 20 long runs, against the import of torch alone; the CPU's seconds."""
    evaluation = {"event": "eval", "metric": "top1", "top1": 75.0, "count": 50000, "crop": 224, "protocol": "centre"}
    for number in range(20):
        run = folder / f"run{number:02}"
        run.mkdir()
        write_long_log(run / "metrics.jsonl", number)
        with (run / "metrics.jsonl").open("a") as file:
            for epoch in range(1, 271):
                file.write(json.dumps({**evaluation, "epoch": epoch, "step": epoch * STEPS, "time": 2e9}) + "\n")
        options = {"model": {"name": "resnest50", "num_classes": 1000}, "train": {"recipe": "resnest", "epochs": 270}}
        (run / "config.yaml").write_text(json.dumps(options))
    page = folder / "page.html"
    python = [sys.executable, "-c"]
    command = [sys.executable, "-m", "resnest_imagenet.commands.report", f"runs=[{folder}/run*]", f"out={page}"]
    command += ["latency=false", "device=cpu"]
    _, peak = run_counted(command)
    name = f"resnest-report of 20 runs of 27,000 events ({page.stat().st_size / 1e6:.1f} MB page, peak {peak:.0f} MB)"
    return measure(
        {
            "import torch": lambda: run_counted([*python, "import torch"])[0],
            "resnest-report's imports": lambda: run_counted([*python, "import resnest_imagenet.reports.report"])[0],
            name: lambda: run_counted(command)[0],
        },
        rounds,
        warm_up=0,
    )


# A process counts the memory of the one that started it as its own: this one is small.
COUNT = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, check=True)
usage = resource.getrusage(resource.RUSAGE_CHILDREN)
print(usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1000)
"""


def run_counted(command: list[str]) -> tuple[float, float]:
    """Return the CPU's seconds and the largest resident memory, in MB, of a process."""
    seconds, peak = subprocess.check_output([sys.executable, "-c", COUNT, *command], text=True).split()
    return float(seconds), float(peak)


def measure_listing(folder: Path, rounds: int) -> dict[str, list[float]]:
    """A set of 100 classes with 1,300 files each, against reading the names alone."""
    from torchvision.datasets import ImageFolder

    root = folder / "listed"
    for number in range(100):
        (root / f"n{number:08}").mkdir(parents=True)
        for image in range(1300):
            (root / f"n{number:08}/n{number:08}_{image * 7919 % 100000}.JPEG").touch()

    def read_names() -> None:
        for name in os.listdir(root):
            os.listdir(root / name)

    works: dict[str, Callable[[], object]] = {
        "the names of 130,000 files": read_names,
        "read_image_folder": lambda: read_image_folder(str(folder), "listed", "data.train_dir"),
        "torchvision's ImageFolder": lambda: ImageFolder(str(root)),
    }
    return measure({name: time_work(work) for name, work in works.items()}, rounds)


def time_work(work: Callable[[], object]) -> Round:
    """Return a round that does the work and returns its seconds."""

    def run() -> float:
        with clock(CPU) as seconds:
            work()
        return seconds[0]

    return run


def measure_resume(folder: Path, rounds: int) -> dict[str, list[float]]:
    """The log of a run of 270 epochs of 5005 steps, a line each 50, opened to resume in the last epoch."""
    with initialize_config_dir(str(find_conf()), version_base="1.3"):
        config = check_config(compose("train", [f"data.root={folder}/data"]), TrainConfig)
    (folder / "config.yaml").touch()
    path = folder / "metrics.jsonl"
    state = cast(TrainingState, SimpleNamespace(step=269 * STEPS + 2500, epoch=269, best=75.0))
    write_long_log(path)

    def resume(is_new: bool) -> float:
        if is_new:
            shutil.rmtree(folder / "tensorboard", ignore_errors=True)
        with clock(CPU) as seconds:
            history = resume_history(path, "top1", state)
            (tracker,) = open_trackers(folder, config, "top1", state.step, history)
        assert tracker.is_new == is_new
        tracker.close(None)
        return seconds[0]

    return measure(
        {
            "import torch": lambda: run_timed(sys.executable, "-c", "import torch"),
            "27,000 events; TensorBoard's files written from scratch": lambda: resume(True),
            "27,000 events; TensorBoard's files cut": lambda: resume(False),
        },
        rounds,
    )


def measure_checkpoint(folder: Path, rounds: int) -> dict[str, list[float]]:
    """Weights and momentum of ResNeSt-101, against the same bytes written and flushed, and read."""
    weights = build_model("resnest101").state_dict()
    content = {"model": weights, "momentum": {name: torch.randn_like(w.float()) for name, w in weights.items()}}
    buffer = io.BytesIO()
    torch.save(content, buffer)
    path, raw = folder / "checkpoint.pt", folder / "raw"

    def write() -> None:
        with raw.open("wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())

    works = {
        f"{len(buffer.getbuffer()) / 1e6:.0f} MB written and flushed": write,
        "saved": lambda: save_checkpoint(content, path),
        "read back as bytes": raw.read_bytes,
        "loaded and verified": lambda: load_checkpoint(path),
    }
    return measure({name: time_work(work) for name, work in works.items()}, rounds)


def measure_evaluation(folder: Path, rounds: int) -> dict[str, list[float]]:
    """1,000 images through the loader and ResNeSt-50 at 224, against the network alone."""
    keep_freed_memory()
    network = place(fold_batch_norms(build_model("resnest50")), CPU)
    source = read_image_folder(folder / "data", "val", "data.val_dir")
    plan = plan_evaluation(len(source), 50, 0, 1)
    loader = build_loader("dali", source, plan, EvalTransform(224), CPU, 2)
    images = torch.randn(50, 3, 224, 224).contiguous(memory_format=torch.channels_last)

    def whole() -> float:
        with clock(CPU) as seconds, join(CPU) as ranks:
            measure_accuracy(network, loader, ranks)
        return seconds[0]

    def alone() -> float:
        with clock(CPU) as seconds, torch.inference_mode(), autocast(CPU, "fp32"):
            for _ in range(plan.num_batches):
                network(images)
        return seconds[0]

    return measure({"the network alone": alone, f"evaluation of {len(source)} images": whole}, rounds, warm_up=0)


def measure_ranks(folder: Path, rounds: int) -> dict[str, list[float]]:
    """One process with two cores and two ranks with one each: seconds of a step of 16 images in the real loop."""
    options = [
        "train.crop=224",
        "train.global_batch=16",
        "train.epochs=1",
        "train.warmup_epochs=0",
        "log.every_steps=1",
    ]
    options += [f"data.root={folder}/data", "device=cpu", "loader.workers=1", "eval.crop=32", "recipe=demo"]

    def train(ranks: int) -> float:
        with tempfile.TemporaryDirectory() as run:
            command = TRAIN if ranks == 1 else [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
            command = command + (TRAIN[1:] if ranks == 2 else [])
            run_timed(
                *command, *options, f"train.batch_size={16 // ranks}", f"run_dir={run}", OMP_NUM_THREADS=f"{2 // ranks}"
            )
            lines = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
        return statistics.median(16 / line["images_per_s"] for line in lines[2:] if "images_per_s" in line)

    return measure({"one process, two threads": lambda: train(1), "two ranks": lambda: train(2)}, rounds, warm_up=0)


def ratios(seconds: dict[str, list[float]], base: str) -> dict[str, float]:
    """Return each one's time over that of `base`: the median of the rounds."""
    return {
        name: statistics.median(a / b for a, b in zip(values, seconds[base], strict=True))
        for name, values in seconds.items()
    }


def draw(result: dict, path: Path) -> None:
    """Draw the curves: speed and memory, and the speed per multiply-add."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    points = result["curves"]
    figure, axes = pyplot.subplots(1, len(CURVES), figsize=(13, 3.6), layout="constrained")
    for axis, (title, settings) in zip(axes, CURVES.items(), strict=True):
        keys = [f"{name}, {batch} images, crop {crop}" for name, batch, crop in settings]
        x = [
            batch if title == "batch" else crop if title == "crop" else int(name[7:]) for name, batch, crop in settings
        ]
        speed = [_speed(points, key) for key in keys]
        work = [
            s * points[key]["multiply_adds"] / points[REFERENCE]["multiply_adds"]
            for s, key in zip(speed, keys, strict=True)
        ]
        axis.plot(x, speed, "o-", label="images/s, relative")
        axis.plot(x, work, "s--", label="multiply-adds/s, relative")
        axis.set(xlabel=title, xscale="linear" if title == "crop" else "log", ylim=0, xticks=x, xticklabels=x)
        axis.minorticks_off()
        memory = axis.twinx()
        memory.plot(x, [points[key]["kept"] / 1024 for key in keys], "^:", color="gray", label="kept, GiB")
        memory.set_ylim(0)
    lines = axes[0].get_legend_handles_labels()[0] + memory.get_legend_handles_labels()[0]
    figure.legend(handles=lines, loc="outside upper center", ncols=3, frameon=False)
    figure.savefig(path, dpi=110)


def _speed(points: dict, key: str) -> float:
    """Return images per second relative to the reference."""
    pairs = zip(points[REFERENCE]["seconds"], points[key]["seconds"], strict=True)
    images = points[key]["images"] / points[REFERENCE]["images"]
    return statistics.median(reference / mine for reference, mine in pairs) * images


def report(result: dict) -> str:
    """Return docs/growth.md."""
    points = result["curves"]
    text = ["Made by `tools/benchmarks/growth.py`. Times are ratios, medians of interleaved rounds."]
    lines = [
        *begin_page("How cost grows", text, result["machine"], f", {result['precision']}"),
        "![speed and memory against batch, crop, depth](growth.png)",
        "",
    ]
    lines += [f"A training step; speeds are relative to {REFERENCE}."]
    for title, settings in CURVES.items():
        lines += ["", f"## {title.capitalize()}", "", BOUNDS[title], ""]
        lines += [
            "| network | images | crop | images/s | multiply-adds/s | kept, MiB |",
            "|---|---:|---:|---:|---:|---:|",
        ]
        for name, batch, crop in settings:
            key = f"{name}, {batch} images, crop {crop}"
            speed, point = _speed(points, key), points[key]
            work = speed * point["multiply_adds"] / points[REFERENCE]["multiply_adds"]
            lines.append(f"| {name} | {batch} | {crop} | {speed:.2f} | {work:.2f} | {point['kept']:.0f} |")
    for title in ("start", "resume", "report", "listing", "checkpoint", "evaluation", "ranks"):
        seconds, other = result[title], result["machines"].get(title, result["machine"])
        lines += ["", f"## {title.capitalize()}", "", BOUNDS[title], ""]
        lines += [] if other == result["machine"] else [f"{format_machine(other)}.", ""]
        lines += ["| | time |", "|---|---:|"]
        lines += [f"| {name} | {value:.2f} |" for name, value in ratios(seconds, next(iter(seconds))).items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", nargs="+", help="parts to measure again; --out keeps its others")
    parser.add_argument("--report", type=Path)
    args = parser.parse_args()
    if args.report:
        result = json.loads(args.report.read_text())
        draw(result, args.report.with_suffix(".png"))
        print(report(result), end="")
        return
    kept = json.loads(args.out.read_text()) if args.only and args.out and args.out.exists() else {}
    machine = describe_machine(torch.device(args.device))
    result = {"machine": machine, "precision": args.precision, "machines": {}, **kept}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_demo_images(folder / "data", 0, train_per_class=16, val_per_class=100)
        for part, work in (
            ("start", lambda: measure_start(folder, args.rounds)),
            ("resume", lambda: measure_resume(folder, args.rounds)),
            ("report", lambda: measure_report(folder, args.rounds)),
            ("listing", lambda: measure_listing(folder, args.rounds)),
            ("checkpoint", lambda: measure_checkpoint(folder, args.rounds)),
            ("ranks", lambda: measure_ranks(folder, args.rounds)),
            ("evaluation", lambda: measure_evaluation(folder, args.rounds)),
            ("curves", lambda: measure_curves(args.rounds, args.device, args.precision)),
        ):
            if args.only and part not in args.only:
                continue
            result[part] = work()
            result["machines"][part] = machine
            print(part, "measured", flush=True)
            if args.out:
                args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
