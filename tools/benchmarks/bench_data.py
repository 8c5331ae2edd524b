"""Loaders side by side: images per second of ours, of plain torchvision and of a bare DALI pipeline, on this machine.

python tools/benchmarks/bench_data.py DIR [--workers 2] [--rounds 9] [--epochs 20] [--recipes resnest] [--device cpu]
    [--out FILE.json]

DIR/<class>/<image> may be any photographs. All loaders make float batches of 224 pixels by random resized crop, flip
and normalisation, with the same number of worker processes or threads. In every round each of them makes a pass over
the same images, in turn; the table has the median over the rounds and their range. The last rows have the whole image
side of some recipes (with --only-recipes there are no others). Then our loaders run for some more epochs, and the
memory of the process and its workers is read (not with --epochs 0).
"""

import argparse
import itertools
import json
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from hydra import compose, initialize_config_dir
from nvidia.dali import fn, pipeline_def, types
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from resnest_imagenet.commands.launch import check_config, find_conf
from resnest_imagenet.config import TrainConfig
from resnest_imagenet.data.folder import read_image_folder
from resnest_imagenet.data.loader import Loader, build_loader
from resnest_imagenet.data.plan import BatchPlan
from resnest_imagenet.data.transforms import MEAN, STD, TrainTransform
from resnest_imagenet.tasks.classification import build_train_transform

BATCH = 128  # as in recipe=resnest
BATCHES = 19  # in a pass, over the files as often as it takes
EDGE = 3  # batches at either end of a pass that are not timed: as much work is then begun as is left over
TIMED = (BATCHES - 2 * EDGE - 1) * BATCH  # images: of 12 batches, whole turns of 1, 2, 3, 4, 6 or 12 workers
CROP = 224
PLAIN = TrainTransform(CROP, 0, antialias=True)  # as Pillow resizes
PLAIN_TORCHVISION, BARE_DALI, OUR_DALI = "torchvision, plain", "DALI, bare", "ours, DALI"

Pass = Callable[[], Iterator[torch.Tensor]]


def plain_torchvision(root: Path, workers: int, device: torch.device) -> Pass:
    """ImageFolder and DataLoader as in torchvision's references: Pillow decodes, float tensors leave the workers."""
    transform = v2.Compose(
        [
            v2.RandomResizedCrop(CROP),
            v2.RandomHorizontalFlip(),
            v2.PILToTensor(),
            v2.ToDtype(torch.float, scale=True),
            v2.Normalize([m / 255 for m in MEAN], [s / 255 for s in STD]),
        ]
    )
    folder = ImageFolder(str(root), transform)
    folder.samples = list(itertools.islice(itertools.cycle(folder.samples), BATCHES * BATCH))
    loader = torch.utils.data.DataLoader(
        folder,
        BATCH,
        shuffle=True,
        num_workers=workers,
        persistent_workers=True,
        drop_last=True,
        pin_memory=device.type == "cuda",
    )
    return lambda: (images.to(device, non_blocking=True) for images, _ in loader)


@pipeline_def
def _bare_pipeline(files: list[str], decoder: str) -> tuple:
    encoded, labels = fn.readers.file(files=files, random_shuffle=True, prefetch_queue_depth=2)
    images = fn.decoders.image_random_crop(
        encoded, device=decoder, random_area=[0.08, 1.0], random_aspect_ratio=[3 / 4, 4 / 3]
    )
    images = fn.resize(images, size=[CROP, CROP], antialias=True)
    mirror = fn.random.coin_flip()
    images = fn.crop_mirror_normalize(
        images, mirror=mirror, mean=list(MEAN), std=list(STD), dtype=types.FLOAT, output_layout="HWC"
    )
    return images, labels


def bare_dali(root: Path, workers: int, device: torch.device) -> Pass:
    """DALI's own reader and random crop, no plan, no draws of ours: what a script of a few lines does."""
    files = [str(path) for path in root.glob("*/*")]
    files = list(itertools.islice(itertools.cycle(files), BATCHES * BATCH))
    on_gpu = device.type == "cuda"
    pipeline = _bare_pipeline(
        files,
        "mixed" if on_gpu else "cpu",
        batch_size=BATCH,
        num_threads=workers,
        device_id=device.index if on_gpu else None,
        prefetch_queue_depth=2,
    )
    pipeline.build()

    def batches() -> Iterator[torch.Tensor]:
        for _ in range(BATCHES):
            images, _ = pipeline.run()
            yield torch.from_dlpack(images.as_tensor()).permute(0, 3, 1, 2)

    return batches


def ours(name: str, root: Path, workers: int, device: torch.device, transform: TrainTransform) -> Pass:
    """Our loader; each pass is another epoch."""
    folder = read_image_folder(str(root.parent), root.name, "DIR")
    repeated = np.arange(BATCHES * BATCH) % len(folder)
    folder = replace(folder, files=folder.files[repeated], labels=folder.labels[repeated])
    plan = BatchPlan(BATCHES * BATCH, BATCH, BATCHES, shuffle=True)
    loader: Loader = build_loader(name, folder, plan, transform, device, workers)
    epochs = iter(range(10**6))
    return lambda: (images for images, _ in loader.batches(next(epochs)))


def read_transform(recipe: str) -> TrainTransform:
    """Return the transform of a recipe, at the crop of all."""
    with initialize_config_dir(str(find_conf()), version_base="1.3"):
        options = compose("train", [f"recipe={recipe}", f"train.crop={CROP}", "data.root=."])
    return build_train_transform(check_config(options, TrainConfig).train, seed=0)


@dataclass(frozen=True)
class Speed:
    """Of one pass.

    Attributes:
        images_per_second: of the whole.
        cpu_ms_per_image: of this process and its threads, not of worker processes.
        thread_us_per_image: CPU time of the thread that asks for batches, until it gets them.
    """

    images_per_second: float
    cpu_ms_per_image: float
    thread_us_per_image: float


def time_pass(run: Pass) -> Speed:
    """Time the middle of a pass; each batch is read once."""
    batches, asking = run(), 0.0
    for number in range(BATCHES):
        asked = time.thread_time()
        images = next(batches)
        asking += (time.thread_time() - asked) * (EDGE < number < BATCHES - EDGE)
        float(images.sum())
        if number == EDGE:
            start, cpu = time.perf_counter(), time.process_time()
        if number == BATCHES - EDGE - 1:
            seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    for _ in batches:
        raise AssertionError("more batches than in the plan")
    return Speed(TIMED / seconds, 1e3 * cpu / TIMED, 1e6 * asking / TIMED)


def resident_megabytes() -> float:
    """Return the memory of this process and its children."""
    children = Path("/proc/self/task", str(os.getpid()), "children").read_text().split()
    pages = [int(Path("/proc", pid, "statm").read_text().split()[1]) for pid in ("self", *children)]
    return sum(pages) * os.sysconf("SC_PAGE_SIZE") / 1e6


def measure_memory(name: str, root: Path, workers: int, device: torch.device, epochs: int) -> list[float]:
    """Return the memory after each epoch under recipe=resnest; to be called in a process of its own."""
    run = ours(name, root, workers, device, read_transform("resnest"))
    sizes = []
    for _ in range(epochs):
        time_pass(run)
        sizes.append(round(resident_megabytes(), 1))
    return sizes


def list_runs(
    root: Path, workers: int, device: torch.device, recipes: list[str], only_recipes: bool
) -> dict[str, Pass]:
    """Return the passes to compare, by name."""

    def run_ours(name: str, transform: TrainTransform) -> Pass:
        return ours(name, root, workers, device, transform)

    runs: dict[str, Pass] = {}
    if not only_recipes:
        runs[PLAIN_TORCHVISION] = plain_torchvision(root, workers, device)
        runs["ours, torchvision"] = run_ours("torchvision", PLAIN)
        runs[BARE_DALI] = bare_dali(root, workers, device)
        runs[OUR_DALI] = run_ours("dali", PLAIN)
    for recipe in recipes:
        for name, title in (("torchvision", "torchvision"), ("dali", "DALI")):
            runs[f"ours, {title}, recipe={recipe}"] = run_ours(name, read_transform(recipe))
    return runs


def measure_speeds(runs: dict[str, Pass], rounds: int) -> dict[str, list[Speed]]:
    """Time all passes in turn, in rounds after a first that warms up."""
    speeds: dict[str, list[Speed]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            speed = time_pass(run)
            if number > 0:
                speeds[name].append(speed)
    return speeds


def divide(speeds: dict[str, list[Speed]], name: str, other: str) -> list[float]:
    """Return by round how many times as many images per second as another loader one has."""
    pairs = zip(speeds[name], speeds[other], strict=True)
    return [round(mine.images_per_second / its.images_per_second, 3) for mine, its in pairs]


def describe(speeds: dict[str, list[Speed]]) -> dict[str, Any]:
    """Return the report's part about speeds; ratios are to the first loader."""
    baseline = next(iter(speeds))
    loaders = {
        name: {
            "images_per_second": [round(speed.images_per_second, 1) for speed in of_loader],
            "cpu_ms_per_image": round(statistics.median(speed.cpu_ms_per_image for speed in of_loader), 3),
            "thread_us_per_image": round(statistics.median(speed.thread_us_per_image for speed in of_loader), 1),
            "against_first": divide(speeds, name, baseline),
        }
        for name, of_loader in speeds.items()
    }
    over_bare = divide(speeds, OUR_DALI, BARE_DALI) if BARE_DALI in speeds else None
    return {"loaders": loaders, "wrapper_over_bare_dali": over_bare}


def show(report: dict[str, Any]) -> None:
    """Print a report's speeds as a table."""
    print(f"{report['machine']}, {report['workers']} workers each, {report['rounds']} rounds of {TIMED} images")
    print(f"{'loader':40} {'images/s':>9} {'range':>13} {'ratio':>6} {'range':>13} {'CPU ms':>7} {'thread us':>9}")
    for name, row in report["loaders"].items():
        rates, ratios = row["images_per_second"], row["against_first"]
        print(
            f"{name:40} {statistics.median(rates):>9.0f} {min(rates):>6.0f}-{max(rates):<6.0f} "
            f"{statistics.median(ratios):>6.2f} {min(ratios):>6.2f}-{max(ratios):<6.2f} "
            f"{row['cpu_ms_per_image']:>7.2f} {row['thread_us_per_image']:>9.1f}"
        )


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--epochs", type=int, default=20, help="for the memory")
    parser.add_argument("--recipes", nargs="*", default=["resnest"])
    parser.add_argument("--only-recipes", action="store_true")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def main() -> None:
    args = read_arguments()
    root, workers = args.folder.resolve(), args.workers
    device = torch.device("cpu") if args.device == "cpu" else torch.device("cuda", 0)
    packages = ("torch", "torchvision", "nvidia-dali-cuda130", "pillow")
    report = {
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores, {device.type}",
        "python": platform.python_version(),
        "versions": {name: version(name) for name in packages},
        "workers": workers,
        "rounds": args.rounds,
        **describe(measure_speeds(list_runs(root, workers, device, args.recipes, args.only_recipes), args.rounds)),
        "resident_megabytes": {},
    }
    show(report)
    for name in ("torchvision", "dali") if args.epochs else ():
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as alone:
            sizes = alone.submit(measure_memory, name, root, workers, device, args.epochs).result()
        report["resident_megabytes"][name] = sizes
        print(f"memory of {name} after epoch 1 and {args.epochs}: {sizes[0]:.0f} and {sizes[-1]:.0f} MB")
    if args.out:
        args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
