"""Loaders of images with objects side by side: images per second of ours and of torchvision's reference transforms.

python tools/benchmarks/bench_instances.py DIR [--workers 2] [--rounds 9] [--rle] [--out FILE.json]

DIR/**/ may hold any photographs; each gets seven objects, drawn here, with polygons of 24 points, or with --rle codes.
All loaders read the same files and make padded float batches of 2: short side one of 640 to 800 pixels, long side at
most 1333, flip, ImageNet's mean and std. torchvision's are RandomShortestSize and RandomHorizontalFlip of
torchvision.transforms.v2 over tv_tensors, as its references/detection has them, with bitmaps of the masks and without
masks; ours have boxes, and polygons or codes. In every round each of them makes a pass over the same images, in turn;
the table has the median over the rounds and their range, and of the ratio within a round.
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
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as codec
from torchvision import tv_tensors
from torchvision.transforms import v2

from resnest_imagenet.data.coco import Instances, open_coco
from resnest_imagenet.data.folder import find_images
from resnest_imagenet.data.instance_geometry import InstanceTransform
from resnest_imagenet.data.instance_loader import InstanceLoader
from resnest_imagenet.data.plan import BatchPlan
from resnest_imagenet.data.transforms import MEAN, STD
from resnest_imagenet.instances import Pixels

BATCH, BATCHES = 2, 32  # in a pass, over the files as often as it takes
EDGE = 4  # batches at either end of a pass that are not timed: as much work is then begun as is left over
TIMED = (BATCHES - 2 * EDGE - 1) * BATCH
SIZES, LONGEST = tuple(range(640, 801)), 1333
OBJECTS, POINTS, CLASSES = 7, 24, 80
CPU = torch.device("cpu")

Pass = Callable[[], Iterator[torch.Tensor]]


def write_instances(photographs: Path, out: Path, rle: bool) -> Path:
    """Link photographs into COCO's layout, as often as a pass takes, and draw objects for each."""
    (out / "train2017").mkdir(parents=True)
    (out / "annotations").mkdir()
    images = find_images([str(photographs)])
    content: dict[str, list] = {"images": [], "annotations": [], "categories": []}
    content["categories"] = [{"id": number + 1, "name": f"class {number}"} for number in range(CLASSES)]
    for number in range(BATCH * BATCHES):
        path = Path(images.name(number % len(images)))
        file = f"{number:05d}{path.suffix}"
        (out / "train2017" / file).symlink_to(path.absolute())
        width, height = Image.open(path).size
        content["images"].append({"id": number + 1, "file_name": file, "height": height, "width": width})
        for drawn in range(OBJECTS):
            rng = np.random.default_rng([number, drawn])
            angles = np.sort(rng.uniform(0, 2 * np.pi, POINTS))
            radii = rng.uniform(0.05, 0.3) * min(height, width) * rng.uniform(0.6, 1, POINTS)
            centre = rng.uniform(0.2, 0.8, 2) * (width, height)
            points = centre + (radii * (np.cos(angles), np.sin(angles))).T
            points = points.clip(0, (width, height)).round(2)
            (left, top), (right, bottom) = points.min(0).tolist(), points.max(0).tolist()
            segmentation: object = [points.ravel().tolist()]
            if rle:
                code = codec.merge(codec.frPyObjects(segmentation, height, width))
                segmentation = {"size": code["size"], "counts": code["counts"].decode()}
            content["annotations"].append(
                {
                    "id": len(content["annotations"]) + 1,
                    "image_id": number + 1,
                    "category_id": int(rng.integers(CLASSES)) + 1,
                    "bbox": [left, top, right - left, bottom - top],
                    "segmentation": segmentation,
                }
            )
    (out / "annotations/instances_train2017.json").write_text(json.dumps(content))
    return out


class PlainInstances(torch.utils.data.Dataset):
    """Pillow's images, boxes and bitmaps through v2 transforms, as in torchvision's references/detection."""

    def __init__(self, instances: Instances) -> None:
        self.instances = instances
        self.transforms = v2.Compose(
            [
                v2.RandomShortestSize(min_size=SIZES, max_size=LONGEST),
                v2.RandomHorizontalFlip(),
                v2.ToImage(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize([m / 255 for m in MEAN], [s / 255 for s in STD]),
                v2.SanitizeBoundingBoxes(),
                v2.ToPureTensor(),
            ]
        )

    def __len__(self) -> int:
        return len(self.instances)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, dict]:
        image = Image.open(self.instances.images.name(index)).convert("RGB")
        boxes, labels, masks = self.instances.objects(index)
        size = (image.height, image.width)
        target = {
            "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=size),
            "labels": torch.from_numpy(labels),
        }
        if masks is not None:
            codes = [mask if isinstance(mask, dict) else codec.merge(codec.frPyObjects(mask, *size)) for mask in masks]
            target["masks"] = tv_tensors.Mask(np.stack([codec.decode(code) for code in codes]))
        return self.transforms(image, target)


def pad(samples: list) -> tuple[torch.Tensor, list[dict]]:
    """Return a padded batch, as GeneralizedRCNNTransform.batch_images makes it."""
    images, targets = zip(*samples, strict=True)
    height, width = (-(-max(image.shape[side] for image in images) // 32) * 32 for side in (1, 2))
    batch = images[0].new_zeros(len(images), 3, height, width)
    for place, image in zip(batch, images, strict=True):
        place[:, : image.shape[1], : image.shape[2]].copy_(image)
    return batch, list(targets)


def plain_torchvision(instances: Instances, workers: int) -> Pass:
    """v2 transforms and DataLoader: padded float batches leave the workers."""
    loader = torch.utils.data.DataLoader(
        PlainInstances(instances),
        BATCH,
        shuffle=True,
        num_workers=workers,
        persistent_workers=workers > 0,
        collate_fn=pad,
    )
    return lambda: _check(loader)


def ours(instances: Instances, workers: int) -> Pass:
    """Our loader; each pass is another epoch."""
    plan = BatchPlan(len(instances), BATCH, BATCHES, shuffle=True)
    loader = InstanceLoader(instances, plan, InstanceTransform(0, SIZES, LONGEST), CPU, Pixels(), workers)
    epochs = itertools.count()
    return lambda: _check(loader.batches(next(epochs)))


def _check(batches: Iterator) -> Iterator[torch.Tensor]:
    for images, targets in batches:
        assert (images.dtype, len(images), len(targets)) == (torch.float32, BATCH, BATCH)
        assert images.shape[2] % 32 == 0 and images.shape[3] % 32 == 0
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
    parser.add_argument("--rle", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = str(write_instances(args.folder, Path(folder), args.rle))
        boxes, masks = (open_coco(root, "train", masks=wanted) for wanted in (False, True))
        runs = {
            "torchvision, boxes": plain_torchvision(boxes, args.workers),
            "ours, boxes": ours(boxes, args.workers),
            "torchvision, masks": plain_torchvision(masks, args.workers),
            "ours, masks": ours(masks, args.workers),
        }
        rates: dict[str, list[float]] = {name: [] for name in runs}
        for round_number in range(args.rounds + 1):
            for name, run in runs.items():
                rate = time_pass(run)
                if round_number > 0:  # the first warms up
                    rates[name].append(round(rate, 2))
    ratios = {
        what: [
            round(one / other, 3)
            for one, other in zip(rates[f"ours, {what}"], rates[f"torchvision, {what}"], strict=True)
        ]
        for what in ("boxes", "masks")
    }
    report = {
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores",
        "versions": {name: version(name) for name in ("torch", "torchvision", "pillow", "pycocotools")},
        "workers": args.workers,
        "masks": "codes" if args.rle else "polygons",
        "images_per_second": rates,
        "against_torchvision": ratios,
    }
    print(
        f"{report['machine']}, {args.workers} workers each, {args.rounds} rounds of {TIMED} images, {report['masks']}"
    )
    for name, of_one in rates.items():
        print(f"{name:20} {statistics.median(of_one):>7.1f} images/s ({min(of_one):.1f} to {max(of_one):.1f})")
    for what, of_one in ratios.items():
        print(f"ratio, {what:13} {statistics.median(of_one):>7.2f} ({min(of_one):.2f} to {max(of_one):.2f})")
    if args.out:
        args.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
