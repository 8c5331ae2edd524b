"""Loaders side by side: images per second of ours, of plain torchvision and of a bare DALI pipeline, on this machine.

python tools/benchmarks/bench_data.py DIR [--workers 2] [--rounds 9] [--epochs 20] [--device cpu] [--out FILE.json]

DIR/<class>/<image> may be any photographs. All loaders make float batches of 224 pixels by random resized crop, flip
and normalisation, with the same number of worker processes or threads. In every round each of them makes a pass over
the same images, in turn; the table has the median over the rounds and their range. The last rows have the whole image
side of recipe=resnest. Then our loaders run for some more epochs, and the memory of the process and its workers is
read.
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

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def, types
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from resnest_imagenet.data.augment import Augmentation
from resnest_imagenet.data.folder import read_image_folder
from resnest_imagenet.data.loader import Loader, build_loader
from resnest_imagenet.data.plan import BatchPlan
from resnest_imagenet.data.transforms import MEAN, STD, TrainTransform

BATCH = 128  # as in recipe=resnest
BATCHES = 19  # in a pass, over the files as often as it takes
EDGE = 3  # batches at either end of a pass that are not timed: as much work is then begun as is left over
TIMED = (BATCHES - 2 * EDGE - 1) * BATCH  # images: of 12 batches, whole turns of 1, 2, 3, 4, 6 or 12 workers
CROP = 224
PLAIN, RECIPE = Augmentation(), Augmentation("resnest", jitter=0.4, lighting=0.1)

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


def ours(name: str, root: Path, workers: int, device: torch.device, augmentation: Augmentation) -> Pass:
    """Our loader; each pass is another epoch."""
    folder = read_image_folder(str(root.parent), root.name, "DIR")
    repeated = np.arange(BATCHES * BATCH) % len(folder)
    folder = replace(folder, files=folder.files[repeated], labels=folder.labels[repeated])
    plan = BatchPlan(BATCHES * BATCH, BATCH, BATCHES, shuffle=True)
    # As Pillow resizes; the recipe does not.
    transform = TrainTransform(CROP, 0, antialias=augmentation == PLAIN, augmentation=augmentation)
    loader: Loader = build_loader(name, folder, plan, transform, device, workers)
    epochs = iter(range(10**6))
    return lambda: (images for images, _ in loader.batches(next(epochs)))


@dataclass(frozen=True)
class Speed:
    """Of one pass."""

    images_per_second: float
    cpu_seconds_per_image: float  # of this process and its threads, not of worker processes


def time_pass(run: Pass) -> Speed:
    """Time the middle of a pass; each batch is read once."""
    for number, images in enumerate(run()):
        float(images.sum())
        if number == EDGE:
            start, cpu = time.perf_counter(), time.process_time()
        if number == BATCHES - EDGE - 1:
            seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    return Speed(TIMED / seconds, cpu / TIMED)


def resident_megabytes() -> float:
    """Return the memory of this process and its children."""
    children = Path("/proc/self/task", str(os.getpid()), "children").read_text().split()
    pages = [int(Path("/proc", pid, "statm").read_text().split()[1]) for pid in ("self", *children)]
    return sum(pages) * os.sysconf("SC_PAGE_SIZE") / 1e6


def measure_memory(name: str, root: Path, workers: int, device: torch.device, epochs: int) -> list[float]:
    """Return the memory after each epoch under recipe=resnest; to be called in a process of its own."""
    run = ours(name, root, workers, device, RECIPE)
    sizes = []
    for _ in range(epochs):
        time_pass(run)
        sizes.append(round(resident_megabytes(), 1))
    return sizes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--epochs", type=int, default=20, help="for the memory")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    root, workers = args.folder.resolve(), args.workers
    device = torch.device("cpu") if args.device == "cpu" else torch.device("cuda", 0)

    baseline = "torchvision, plain"
    runs = {
        baseline: plain_torchvision(root, workers, device),
        "ours, torchvision": ours("torchvision", root, workers, device, PLAIN),
        "DALI, bare": bare_dali(root, workers, device),
        "ours, DALI": ours("dali", root, workers, device, PLAIN),
        "ours, torchvision, recipe=resnest": ours("torchvision", root, workers, device, RECIPE),
        "ours, DALI, recipe=resnest": ours("dali", root, workers, device, RECIPE),
    }
    speeds: dict[str, list[Speed]] = {name: [] for name in runs}
    for round_number in range(args.rounds + 1):
        for name, run in runs.items():
            speed = time_pass(run)
            if round_number > 0:  # the first warms up
                speeds[name].append(speed)

    def ratios(name: str, other: str) -> list[float]:
        pairs = zip(speeds[name], speeds[other], strict=True)
        return [one.images_per_second / two.images_per_second for one, two in pairs]

    packages = ("torch", "torchvision", "nvidia-dali-cuda130", "pillow")
    report = {
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores, {device.type}",
        "python": platform.python_version(),
        "versions": {name: version(name) for name in packages},
        "workers": workers,
        "rounds": args.rounds,
        "loaders": {
            name: {
                "images_per_second": [round(each.images_per_second, 1) for each in of_one],
                "cpu_ms_per_image": round(1e3 * statistics.median(each.cpu_seconds_per_image for each in of_one), 3),
                "against_baseline": [round(ratio, 3) for ratio in ratios(name, baseline)],
            }
            for name, of_one in speeds.items()
        },
        "wrapper_over_bare_dali": [round(ratio, 3) for ratio in ratios("ours, DALI", "DALI, bare")],
    }
    print(f"{report['machine']}, {workers} workers each, {args.rounds} rounds of {TIMED} images")
    print(f"{'loader':36} {'images/s':>9} {'range':>13} {'ratio':>6} {'range':>13}")
    for name, of_one in speeds.items():
        rates, against = [each.images_per_second for each in of_one], ratios(name, baseline)
        print(
            f"{name:36} {statistics.median(rates):>9.0f} {min(rates):>6.0f}-{max(rates):<6.0f} "
            f"{statistics.median(against):>6.2f} {min(against):>6.2f}-{max(against):<6.2f}"
        )
    over_bare = ratios("ours, DALI", "DALI, bare")
    cpu = [report["loaders"][name]["cpu_ms_per_image"] for name in ("ours, DALI", "DALI, bare")]
    print(
        f"ours over bare DALI: {statistics.median(over_bare):.3f} of its speed, {cpu[0] / cpu[1]:.3f} of its CPU time"
    )

    report["resident_megabytes"] = {}
    for name in ("torchvision", "dali"):
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as alone:
            sizes = alone.submit(measure_memory, name, root, workers, device, args.epochs).result()
        report["resident_megabytes"][name] = sizes
        print(f"memory of {name} after epoch 1 and {args.epochs}: {sizes[0]:.0f} and {sizes[-1]:.0f} MB")
    if args.out:
        args.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
