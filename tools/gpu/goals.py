"""The table of all goals on a GPU, in eight minutes: a figure, its goal, and whether it is met.

export PYTHONPATH=src:tools/benchmarks
python tools/gpu/goals.py OUT [--images DIR] [--minutes 8]
python tools/gpu/goals.py OUT --device cpu [--only trials decoder]   (tries the script itself, with tiny sizes)

The parts come in the order of their weight. A part that fails is a line with its error; one that would not fit into
the minutes is a line too. OUT/goals.json has the table after each part. DIR has photographs, DIR/<class>/<image>;
without it the loaders read the demo's images. measure.py tries more commands and options, and takes longer.
"""

import argparse
import json
import os
import statistics
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from measure import COMMANDS, compare_resumed, run, summarise

from resnest_imagenet import build_model
from resnest_imagenet.compute import get_dtype, place
from resnest_imagenet.config import TrainConfig
from resnest_imagenet.data.demo import write_demo_images
from resnest_imagenet.data.demo_objects import write_demo_objects
from resnest_imagenet.data.demo_scenes import write_demo_scenes
from resnest_imagenet.data.folder import read_image_folder
from resnest_imagenet.models.deeplab import build_deeplab
from resnest_imagenet.models.proving import ROUNDS, try_fused


@dataclass(frozen=True)
class Row:
    """A line of the table: a figure, and its goal; is_met is None where it was not measured."""

    name: str
    figure: str
    goal: str
    is_met: bool | None


@dataclass(frozen=True)
class Setting:
    """Where and how large everything is.

    Attributes:
        device: of all measurements.
        out: the folder of data and runs.
        images: photographs, or the demo's images: <root>/<class>/<image>.
        is_tiny: sizes that a CPU computes in seconds; the figures then mean nothing.
    """

    device: torch.device
    out: Path
    images: Path
    is_tiny: bool

    def choose(self, usual: int, tiny: int) -> int:
        """Return a size."""
        return tiny if self.is_tiny else usual

    @property
    def precisions(self) -> tuple[str, ...]:
        """The precisions of the kernels; a CPU emulates fp16."""
        return ("fp32", "bf16") if self.is_tiny else ("fp32", "bf16", "fp16")


def at_least(name: str, value: float, goal: float, unit: str = "") -> Row:
    """Return the row of a figure that should be large."""
    return Row(name, f"{value:.2f}{unit}", f">= {goal:g}{unit}", value >= goal)


def at_most(name: str, value: float, goal: float, unit: str = "") -> Row:
    """Return the row of a figure that should be small."""
    return Row(name, f"{value:.3g}{unit}", f"<= {goal:g}{unit}", value <= goal)


def try_operators(setting: Setting) -> Iterator[Row]:
    """Split attention's kernels: equal to the formula, faster, and a trial of less than a second."""
    from resnest_imagenet.models.rcnn import build_rcnn

    name, batch = ("resnest14_half", 2) if setting.is_tiny else ("resnest50", 64)
    crop, scene, height, width = ((32, 32, 32, 64), (224, 480, 800, 1344))[not setting.is_tiny]
    sizes = {"classes": (batch, crop, crop), "scenes": (2, scene, scene), "objects": (2, height, width)}
    for kind, size in sizes.items():
        if kind == "classes":
            network = build_model(name, 10)
        else:
            network = build_deeplab(name, 10) if kind == "scenes" else build_rcnn(name, 10, norm="bn")
        network = place(network, setting.device).train()
        for precision in setting.precisions:
            title = f"split attention of {name} for {kind}, {precision}"
            arguments = (network, size, setting.device, get_dtype(precision), True)
            finding = try_fused(*arguments)
            is_slow = finding.fault is not None and "slower" in finding.fault
            fault = None if is_slow else finding.fault
            yield Row(f"{title}: against the formula", fault or "equal", "equal", fault is None)
            if finding.ratio is not None:
                yield at_least(f"{title}: {ROUNDS} rounds, formula / operator", finding.ratio, 1, " x")
            yield at_most(f"{title}: a trial with compiled kernels", try_fused(*arguments).seconds, 1, " s")


def compare_decoding(setting: Setting) -> Iterator[Row]:
    """DALI's decoder on the device against the CPU's."""
    from resnest_imagenet.data.dali_decoding import DECODER_BOUND, compare_decoders, decode_by_dali, find_jpegs

    jpegs = find_jpegs(read_image_folder(str(setting.images.parent), setting.images.name, "DIR"))
    goal = f"mean {DECODER_BOUND[0]:g}, 99th percentile {DECODER_BOUND[1]:g}"
    if setting.is_tiny:  # there is no other decoder
        decode_by_dali(jpegs, "cpu", setting.device)
        yield Row(f"DALI's decoder, {len(jpegs)} images", "the CPU's", goal, None)
        return
    fault = compare_decoders(jpegs, setting.device)
    yield Row(f"DALI's decoder on the GPU, {len(jpegs)} images", fault or "within the bounds", goal, fault is None)


def compare_steps(setting: Setting) -> Iterator[Row]:
    """A training step and its memory against timm's better format."""
    from bench import bench_step, measure

    batch, crop = setting.choose(128, 2), setting.choose(224, 32)
    for precision, goal in (("bf16", 1.55), ("fp32", 1.25)):
        rounds, kept = bench_step(batch, crop, precision, setting.device, compiles=False)
        seconds = measure(rounds, setting.choose(7, 1), setting.choose(3, 1))
        ratio = min(find_ratio(seconds, name) for name in ("timm, NCHW", "timm, channels_last"))
        title = f"training step of resnest50, batch {batch}, {precision}"
        speed = batch / statistics.median(seconds["ours"])
        yield Row(f"{title}: images/s", f"{speed:.0f}", "-", None)
        yield at_least(f"{title}: timm's better format / ours", ratio, goal, " x")
        yield at_most(f"{title}: peak memory over timm's", kept["ours"] / kept["timm, channels_last"], 0.75, " x")
        yield at_least(f"{title}: plain formula / ours", find_ratio(seconds, "plain formula"), 1.25, " x")


def compare_downstream(setting: Setting) -> Iterator[Row]:
    """A training step of segmentation and of detection against torchvision's."""
    import bench_detection
    import bench_segmentation
    from bench import measure

    crop, size = setting.choose(480, 64), setting.choose(800, 128)
    networks = ["ours", *bench_segmentation.OTHERS]
    rounds, kept = bench_segmentation.bench_step(2, crop, networks, setting.device)
    title = f"training step of DeepLabV3, batch 2, crop {crop}, fp32"
    yield from _compare_with_torchvision(title, measure(rounds, setting.choose(7, 1)), kept)
    del rounds
    rounds, kept = bench_detection.bench_step(2, size, setting.device)
    title = f"training step of Faster R-CNN, batch 2, {size} x {size}, fp32"
    yield from _compare_with_torchvision(title, measure(rounds, setting.choose(7, 1)), kept)


def _compare_with_torchvision(title: str, seconds: dict[str, list[float]], kept: dict[str, float]) -> Iterator[Row]:
    others = [name for name in seconds if name != "ours"]
    ratio = min(find_ratio(seconds, name) for name in others)
    yield at_least(f"{title}: torchvision's better format / ours", ratio, 1.10, " x")
    yield at_most(f"{title}: kept activations over torchvision's", kept["ours"] / min(kept[n] for n in others), 1, " x")


def compare_compiled(setting: Setting) -> Iterator[Row]:
    """Compiled training and inference in bf16 against timm's."""
    from bench import bench_inference, measure

    yield _compare_compiled_steps(setting, "bf16", 1.15)
    batch, crop, count = setting.choose(128, 2), setting.choose(224, 32), setting.choose(7, 1)
    rounds = bench_inference(batch, crop, "bf16", setting.device, compiles=True)
    pair = {name: rounds[name] for name in ("ours, compiled and frozen", "timm, channels_last")}
    ratio = find_ratio(measure(pair, count, 2), "timm, channels_last", "ours, compiled and frozen")
    yield at_least(f"compiled inference of resnest50, batch {batch}, bf16: timm / ours", ratio, 1.9, " x")


def compare_compiled_fp32(setting: Setting) -> Iterator[Row]:
    """Compiled training in fp32 against timm's."""
    yield _compare_compiled_steps(setting, "fp32", 1.10)


def _compare_compiled_steps(setting: Setting, precision: str, goal: float) -> Row:
    from bench import bench_step, measure

    batch, theirs = setting.choose(128, 2), "timm, channels_last, compiled"
    rounds, _ = bench_step(batch, setting.choose(224, 32), precision, setting.device, compiles=True)
    pair = {name: rounds[name] for name in ("ours, compiled", theirs)}
    ratio = find_ratio(measure(pair, setting.choose(7, 1), 2), theirs, "ours, compiled")
    return at_least(f"compiled training step of resnest50, batch {batch}, {precision}: timm / ours", ratio, goal, " x")


def time_loaders(setting: Setting) -> Iterator[Row]:
    """The loaders beside a bare DALI pipeline."""
    import bench_data

    if setting.is_tiny:
        bench_data.BATCH, bench_data.BATCHES, bench_data.TIMED = 8, 8, 8
    workers = len(os.sched_getaffinity(0))
    root, device = setting.images, setting.device
    runs = {
        "bare": bench_data.bare_dali(root, workers, device),
        "ours": bench_data.ours("dali", root, workers, device, bench_data.PLAIN),
        "recipe": bench_data.ours("dali", root, workers, device, bench_data.RECIPE),
    }
    speeds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(setting.choose(4, 2)):
        for name, run_pass in runs.items():
            speed = bench_data.time_pass(run_pass).images_per_second
            speeds[name] += [speed] if number else []
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    yield at_least("DALI loader over a bare DALI pipeline, random crops", medians["ours"] / medians["bare"], 0.95, " x")
    yield at_least(f"DALI loader, recipe=resnest, {workers} threads: images/s", medians["recipe"], 300)


def resume_runs(setting: Setting) -> Iterator[Row]:
    """The demos of all tasks: runs that were stopped and resumed end with the same bits."""
    tiny = ("train.crop=32", "train.batch_size=16") if setting.is_tiny else ()
    common = (f"device={setting.device.type}", "train.deterministic=true", "train.precision=bf16")
    for experiment, root in (("demo", "demo"), ("demo_segmentation", "scenes"), ("demo_detection", "objects")):
        options = (f"data.root={setting.out / root}", *common, *(tiny if experiment == "demo" else ()))
        row = compare_resumed(setting.out / f"resumed-{experiment}", *options, experiment=experiment)
        yield at_most(f"{experiment}, bf16, stopped and resumed: largest difference", float(row["difference"]), 0)
        summary = summarise(setting.out / f"resumed-{experiment}/whole")
        metric = next(iter(summary))
        yield Row(f"{experiment}, bf16, 3 epochs: {metric}", f"{summary[metric]:.2f} %", "-", None)
        yield at_most(f"{experiment}, bf16: share of time that waits for data", summary["data_wait"], 0.05)


def count_waits(setting: Setting) -> Iterator[Row]:
    """Steps in which the host waits for the device, by torch's own check."""
    from resnest_imagenet.training.train import train

    config = compose_demo(setting, f"run_dir={setting.out / 'waits'}", "log.every_steps=1000", "train.epochs=2")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if setting.device.type == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
        try:
            state = train(config)
        finally:
            if setting.device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
    places = Counter(f"{Path(w.filename).name}:{w.lineno}" for w in caught if "synchronizing" in str(w.message))
    # The verdict on the step before is read at each step: by then the GPU has it.
    shown = ", ".join(f"{place} {count}" for place, count in places.most_common(5))
    waits = sum(places.values()) / state.step
    yield at_most(f"host waits in a step, of {state.step} steps ({shown or 'none'})", waits, 1.5)


def run_nccl(setting: Setting) -> Iterator[Row]:
    """One rank under torchrun, fp16 with accumulation."""
    options = ("+experiment=demo", f"data.root={setting.out / 'demo'}", f"device={setting.device.type}")
    options += (f"run_dir={setting.out / 'nccl'}", "train.epochs=1", "train.warmup_epochs=0")
    precision = "bf16" if setting.is_tiny else "fp16"
    options += (f"train.precision={precision}", "train.batch_size=16", "train.global_batch=32")
    options += ("train.crop=32",) if setting.is_tiny else ()
    code, seconds, tail = run(f"{COMMANDS}.train", *options, torchrun=True)
    reasons = [line for line in tail.splitlines() if "error" in line.lower()] or [tail]
    figure = f"exit {code} after {seconds:.0f} s" + (f": {reasons[-1].strip()}" if code else "")
    yield Row(f"demo under torchrun, {precision}, accumulated", figure, "exit 0", code == 0)


def compose_demo(setting: Setting, *options: str) -> TrainConfig:
    """Return the configuration of the demo's run."""
    from hydra import compose, initialize_config_dir

    from resnest_imagenet.commands.launch import check_config, find_conf

    places = (f"data.root={setting.out / 'demo'}", f"device={setting.device.type}", "log.trackers=[]")
    tiny = ("train.crop=32", "train.batch_size=16") if setting.is_tiny else ()
    with initialize_config_dir(str(find_conf()), version_base="1.3"):
        return check_config(compose("train", ["+experiment=demo", *places, *tiny, *options]), TrainConfig)


def find_ratio(seconds: dict[str, list[float]], other: str, ours: str = "ours") -> float:
    """Return another's time over ours: the median of the interleaved rounds."""
    return statistics.median(a / b for a, b in zip(seconds[other], seconds[ours], strict=True))


# By name: the function, and the seconds for which a GPU needs to be left.
PARTS: dict[str, tuple[Callable[[Setting], Iterator[Row]], int]] = {
    "trials": (try_operators, 60),
    "decoder": (compare_decoding, 10),
    "steps": (compare_steps, 45),
    "resumption": (resume_runs, 120),
    "downstream": (compare_downstream, 40),
    "waits": (count_waits, 15),
    "loaders": (time_loaders, 40),
    "nccl": (run_nccl, 25),
    "compiled": (compare_compiled, 90),
    "compiled-fp32": (compare_compiled_fp32, 60),
}


def prepare(setting: Setting) -> None:
    """Draw the demos' data that is not there yet."""
    if not (setting.out / "demo").exists():
        write_demo_images(setting.out / "demo", 0, setting.choose(200, 8), setting.choose(40, 4))
        write_demo_scenes(setting.out / "scenes", 0, setting.choose(200, 8), setting.choose(50, 3))
        write_demo_objects(setting.out / "objects", 0, setting.choose(200, 8), setting.choose(50, 3))


def measure_parts(setting: Setting, names: list[str], deadline: float) -> list[Row]:
    """Measure, print and write the rows of the parts that fit before the deadline."""
    rows: list[Row] = []
    for name in names:
        part, needed = PARTS[name]
        before = len(rows)
        if time.monotonic() + (0 if setting.is_tiny else needed) > deadline:
            rows.append(Row(name, "not measured: out of minutes", "-", None))
        else:
            try:
                rows += part(setting)
            except Exception as error:  # the other parts are still worth their minutes
                text = (str(error).strip() or type(error).__name__).splitlines()[0]
                rows.append(Row(name, f"{type(error).__name__}: {text}", "-", False))
        for row in rows[before:]:
            print(format_row(row), flush=True)
        (setting.out / "goals.json").write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")
        if setting.device.type == "cuda":
            torch.cuda.empty_cache()
    return rows


def format_row(row: Row) -> str:
    """Return a line of the table."""
    verdict = {True: "met", False: "MISSED", None: ""}[row.is_met]
    return f"{row.name:<78} {row.figure:>20}  {row.goal:<12} {verdict}".rstrip()


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--images", type=Path)
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    args = parser.parse_args()
    started, out = time.monotonic(), args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda", 0) if args.device == "cuda" else torch.device("cpu")
    images = args.images.resolve() if args.images else out / "demo/train"
    setting = Setting(device, out, images, is_tiny=device.type == "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU, tiny sizes: the figures mean nothing"
    print(f"{name}, torch {torch.__version__}, Python {sys.version.split()[0]}", flush=True)
    prepare(setting)
    rows = measure_parts(setting, args.only, started + 60 * args.minutes)
    counts = Counter(row.is_met for row in rows)
    minutes = (time.monotonic() - started) / 60
    print(
        f"{counts[True]} met, {counts[False]} missed, {counts[None]} without a goal or not measured, {minutes:.1f} min"
    )


if __name__ == "__main__":
    main()
