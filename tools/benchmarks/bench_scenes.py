"""Loaders of scenes side by side: images per second of ours and of torchvision's v2 transforms, on this machine.

python tools/benchmarks/bench_scenes.py DIR [--workers 2] [--rounds 9] [--out FILE.json]

DIR/**/ may hold any photographs; each gets a mask of 150 classes, drawn here, of coarse cells with ragged edges. Both
loaders read the same files and make float batches: flip, long side between 260 and 1040 pixels, crop of 480, ImageNet's
mean and std (the recipe of ADE20K, without its blur). In every round each of them makes a pass over the same scenes, in
turn; the table has the median over the rounds and their range, and of the ratio within a round.
"""

import argparse
import itertools
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from resnest_imagenet.data.folder import find_images
from resnest_imagenet.data.geometry import SceneTransform, scale_long_side
from resnest_imagenet.data.plan import BatchPlan
from resnest_imagenet.data.scene_loader import SceneLoader
from resnest_imagenet.data.scenes import VOID, Scenes, open_scenes
from resnest_imagenet.data.source import ImageSource
from resnest_imagenet.data.transforms import MEAN, STD

BATCH, BATCHES = 16, 16  # in a pass, over the files as often as it takes
EDGE = 2  # batches at either end of a pass that are not timed: as much work is then begun as is left over
TIMED = (BATCHES - 2 * EDGE - 1) * BATCH
CROP, BASE, CLASSES = 480, 520, 150
CPU = torch.device("cpu")

Pass = Callable[[], Iterator[torch.Tensor]]


def write_scenes(photographs: Path, out: Path) -> Scenes:
    """Link photographs into the layout of data=masks, and draw a mask for each."""
    (out / "images/train").mkdir(parents=True)
    (out / "masks/train").mkdir(parents=True)
    (out / "classes.txt").write_text("\n".join(map(str, range(CLASSES))))
    images = find_images([str(photographs)])
    for index in range(len(images)):
        rng = np.random.default_rng(index)
        path = Path(images.name(index))
        (out / f"images/train/{index:05d}{path.suffix}").symlink_to(path)
        width, height = Image.open(path).size
        cells = Image.fromarray(rng.integers(0, CLASSES, (8, 8), dtype=np.uint8)).resize((width, height), 0)
        shifts = np.cumsum(rng.integers(-1, 2, height))
        mask = np.stack([np.roll(row, shift) for row, shift in zip(np.array(cells), shifts, strict=True)])
        Image.fromarray(mask).save(out / f"masks/train/{index:05d}.png")
    return open_scenes("masks", str(out), "train")


class RandomLongSide(v2.Transform):
    """What v2.RandomResize is for the short side."""

    def make_params(self, flat_inputs: list) -> dict:
        height, width = v2.query_size(flat_inputs)
        long_side = int(torch.randint(BASE // 2, 2 * BASE + 1, ()))
        return {"size": list(scale_long_side(height, width, long_side))}

    def transform(self, inpt: object, params: dict) -> object:
        return self._call_kernel(F.resize, inpt, params["size"], antialias=True)


class PlainScenes(torch.utils.data.Dataset):
    """Pillow's images and masks through v2 transforms, as in torchvision's references/segmentation."""

    def __init__(self, scenes: Scenes) -> None:
        self.scenes = scenes
        self.transforms = v2.Compose(
            [
                v2.RandomHorizontalFlip(),
                RandomLongSide(),
                v2.RandomCrop(CROP, pad_if_needed=True, fill={Image.Image: 0, tv_tensors.Mask: VOID}),
                v2.ToImage(),
                v2.ToDtype({tv_tensors.Image: torch.float32, tv_tensors.Mask: torch.int64}, scale=True),
                v2.Normalize([m / 255 for m in MEAN], [s / 255 for s in STD]),
            ]
        )

    def __len__(self) -> int:
        return BATCHES * BATCH

    def __getitem__(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        index = number % len(self.scenes)
        image = Image.open(self.scenes.images.name(index)).convert("RGB")
        mask = tv_tensors.Mask(Image.open(self.scenes.masks.name(index)))
        pixels, labels = self.transforms(image, mask)
        return pixels, labels.squeeze(0)


def plain_torchvision(scenes: Scenes, workers: int) -> Pass:
    """v2 transforms and DataLoader: float tensors leave the workers."""
    loader = torch.utils.data.DataLoader(
        PlainScenes(scenes), BATCH, shuffle=True, num_workers=workers, persistent_workers=workers > 0, drop_last=True
    )
    return lambda: _check(loader)


def ours(scenes: Scenes, workers: int, blur: float) -> Pass:
    """Our loader; each pass is another epoch."""

    def repeat(part: ImageSource) -> ImageSource:
        indices = np.arange(BATCHES * BATCH) % len(part)
        return replace(part, files=part.files[indices], labels=part.labels[indices])

    plan = BatchPlan(BATCHES * BATCH, BATCH, BATCHES, shuffle=True)
    transform = SceneTransform(CROP, BASE, 0, blur=blur)
    repeated = replace(scenes, images=repeat(scenes.images), masks=repeat(scenes.masks))
    loader = SceneLoader(repeated, plan, transform, CPU, workers)
    epochs = itertools.count()
    return lambda: _check(loader.batches(next(epochs)))


def _check(batches: Iterator) -> Iterator[torch.Tensor]:
    for images, masks in batches:
        assert (images.shape, masks.shape) == ((BATCH, 3, CROP, CROP), (BATCH, CROP, CROP))
        assert (images.dtype, masks.dtype) == (torch.float32, torch.int64)
        yield images


def time_pass(run: Pass) -> float:
    """Return the images per second of the middle of a pass; each batch is read once."""
    for number, images in enumerate(run()):
        float(images.sum())
        if number == EDGE:
            start = time.perf_counter()
        if number == BATCHES - EDGE - 1:
            seconds = time.perf_counter() - start
    return TIMED / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    baseline = "torchvision v2"
    with tempfile.TemporaryDirectory() as folder:
        scenes = write_scenes(args.folder, Path(folder))
        runs = {
            baseline: plain_torchvision(scenes, args.workers),
            "ours": ours(scenes, args.workers, blur=0.0),
            "ours, blur 0.5": ours(scenes, args.workers, blur=0.5),
        }
        rates: dict[str, list[float]] = {name: [] for name in runs}
        for round_number in range(args.rounds + 1):
            for name, run in runs.items():
                rate = time_pass(run)
                if round_number > 0:  # the first warms up
                    rates[name].append(round(rate, 2))
    report = {
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores",
        "versions": {name: version(name) for name in ("torch", "torchvision", "pillow")},
        "workers": args.workers,
        "scenes": len(scenes),
        "images_per_second": rates,
        "against_baseline": {
            name: [round(one / other, 3) for one, other in zip(of_one, rates[baseline], strict=True)]
            for name, of_one in rates.items()
        },
    }
    print(f"{report['machine']}, {args.workers} workers each, {args.rounds} rounds of {TIMED} images")
    print(f"{'loader':18} {'images/s':>9} {'range':>13} {'ratio':>6} {'range':>13}")
    for name, of_one in rates.items():
        ratios = report["against_baseline"][name]
        print(
            f"{name:18} {statistics.median(of_one):>9.1f} {min(of_one):>6.1f}-{max(of_one):<6.1f} "
            f"{statistics.median(ratios):>6.2f} {min(ratios):>6.2f}-{max(ratios):<6.2f}"
        )
    if args.out:
        args.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
