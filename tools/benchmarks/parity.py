"""How far apart the two loaders are: each operation, the crops and whole recipes, in 1/255; writes a Markdown table.

python tools/benchmarks/parity.py DIR [--device cpu] > docs/parity.md

DIR/<class>/<image> may be any photographs. With --device cuda DALI decodes and works there. Exits with 1 where a
difference is above its bound.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def
from PIL import Image

from resnest_imagenet.data.augment import POLICIES, Augmentation, Op
from resnest_imagenet.data.dali_decoding import DECODING
from resnest_imagenet.data.dali_ops import apply_operations as apply_in_dali
from resnest_imagenet.data.folder import read_image_folder
from resnest_imagenet.data.loader import build_loader
from resnest_imagenet.data.pillow_ops import apply_operations as apply_in_pillow
from resnest_imagenet.data.plan import plan_evaluation
from resnest_imagenet.data.torchvision import decode
from resnest_imagenet.data.transforms import STD, ERandomCrop, EvalTransform, TrainTransform

# Values like those of the policies.
VALUES = {
    Op.AUTO_CONTRAST: [0],
    Op.EQUALIZE: [0],
    Op.INVERT: [0],
    Op.POSTERIZE: [1, 2],
    Op.SOLARIZE: [52, 102.4, 154],
    Op.SOLARIZE_ADD: [44],
    Op.BRIGHTNESS: [0.6, 1.4],
    Op.COLOR: [0.1, 0.82, 1.54],
    Op.CONTRAST: [0.6, 0.82, 1.54],
    Op.SHARPNESS: [0.1, 0.82, 1.36],
    Op.ROTATE: [-27, 9, 24],
    Op.SHEAR_X: [-0.12, 0.3],
    Op.SHEAR_Y: [-0.12, 0.3],
    Op.SHEAR_X_BICUBIC: [-0.15, 0.12],
    Op.SHEAR_Y_BICUBIC: [-0.15, 0.12],
    Op.TRANSLATE_X: [-40, 12],
    Op.TRANSLATE_Y: [-40, 12],
    Op.TRANSLATE_X_REL: [-0.136, 0.136],
    Op.TRANSLATE_Y_REL: [-0.136, 0.136],
    Op.CUTOUT: [16],
}
PLACES = ((0.5, 0.5), (0.021, 0.973))  # of a cutout


# Of mean and 99th percentile, on photographs: of an operation, and of what the loaders deliver.
OPERATION_BOUND = (0.1, 1.0)
LOADER_BOUND = (0.25, 2.01)


@dataclass(frozen=True)
class Difference:
    """Of two sets of images, in 1/255."""

    mean: float
    p99: float
    largest: float

    @classmethod
    def between(cls, pairs: list[tuple[np.ndarray, np.ndarray]]) -> "Difference":
        """Summarise the absolute differences of all pixels of all pairs."""
        apart = np.concatenate([np.abs(one.astype(np.float32) - other).ravel() for one, other in pairs])
        return cls(float(apart.mean()), float(np.percentile(apart, 99)), float(apart.max()))

    def is_within(self, bound: tuple[float, float]) -> bool:
        """Say whether mean and 99th percentile are."""
        return self.mean <= bound[0] and self.p99 <= bound[1]


def compare_decoding(paths: list[Path], device: str) -> Difference:
    """Decode files by DALI and as the torchvision loader does."""

    @pipeline_def(batch_size=1, num_threads=2, device_id=None if device == "cpu" else 0)
    def pipeline() -> object:
        encoded, _ = fn.readers.file(files=[str(path) for path in paths])
        return fn.decoders.image(encoded, device="cpu" if device == "cpu" else "mixed", **DECODING)

    built = pipeline()
    built.build()
    theirs = (decode(path.read_bytes()).permute(1, 2, 0).numpy() for path in paths)
    return Difference.between([(np.array(built.run()[0].as_cpu().at(0)), image) for image in theirs])


def compare_operation(images: list[np.ndarray], op: Op, device: str = "cpu") -> Difference:
    """Apply one operation, at all its values, to images (H, W, 3) by DALI and by Pillow."""
    cases = [(op, value, *place) for value in VALUES[op] for place in (PLACES if op == Op.CUTOUT else PLACES[:1])]
    operations = [np.array([case], dtype=np.float32) for case in cases]

    device_id = None if device == "cpu" else 0

    @pipeline_def(batch_size=len(images), num_threads=2, device_id=device_id, enable_conditionals=True)
    def pipeline() -> tuple:
        pictures, *drawn = fn.external_source(
            lambda: (images, *([each] * len(images) for each in operations)),
            num_outputs=1 + len(operations),
            layout=["HWC"] + [""] * len(operations),
        )
        if device_id is not None:
            pictures = pictures.gpu()
        return tuple(apply_in_dali(pictures, each, [[op]]) for each in drawn)

    built = pipeline()
    built.build()
    pairs = []
    for operation, output in zip(operations, built.run(), strict=True):
        on_cpu = output.as_cpu()
        for number, image in enumerate(images):
            theirs = np.asarray(apply_in_pillow(Image.fromarray(image), operation))
            pairs.append((np.array(on_cpu.at(number)), theirs))
    return Difference.between(pairs)


def compare_loaders(root: Path, transform: TrainTransform | EvalTransform, device: str) -> Difference:
    """Compare what both loaders make of all images of a folder."""
    folder = read_image_folder(str(root.parent), root.name, "DIR")

    where = torch.device("cpu") if device == "cpu" else torch.device("cuda", 0)

    def batches(name: str) -> Iterator[torch.Tensor]:
        plan = plan_evaluation(len(folder), 16, 0, 1)
        for images, _ in build_loader(name, folder, plan, transform, where, 1).batches(0):
            yield images.cpu() * torch.tensor(STD).view(1, 3, 1, 1)

    return Difference.between(
        [(a.numpy(), b.numpy()) for a, b in zip(batches("dali"), batches("torchvision"), strict=True)]
    )


TRANSFORMS: dict[str, TrainTransform | EvalTransform] = {
    "evaluation, `protocol=paper`, 224": EvalTransform(224),
    "evaluation, `protocol=ecentercrop`, 320": EvalTransform(320, "crop_resize", None, "bicubic"),
    "random resized crop 224": TrainTransform(224, 0),
    "random resized crop 224, antialiased": TrainTransform(224, 0, antialias=True),
    "ERandomCrop 224, antialiased": TrainTransform(224, 0, ERandomCrop(224), antialias=True),
    "ERandomCrop 320, bicubic": TrainTransform(320, 0, ERandomCrop(320), antialias=True, interpolation="bicubic"),
    "colour jitter, lighting": TrainTransform(224, 0, augmentation=Augmentation(jitter=0.4, lighting=0.1)),
    **{f"policy {name}": TrainTransform(224, 0, augmentation=Augmentation(name)) for name in POLICIES},
    "`recipe=resnest`": TrainTransform(224, 0, augmentation=Augmentation("resnest", 0.4, 0.1)),
    "`recipe=resnest_torch`": TrainTransform(
        224, 0, ERandomCrop(224), antialias=True, augmentation=Augmentation("resnest_torch", 0.4, 0.1)
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    args = parser.parse_args()
    root = args.folder.resolve()
    paths = sorted(path for path in root.glob("*/*") if path.suffix.lower() in (".jpeg", ".jpg"))
    images = [np.array(Image.open(path).convert("RGB")) for path in paths[:: max(1, len(paths) // 40)]]
    print(
        "# The two loaders, compared\n\n"
        f"Absolute differences between DALI ({version('nvidia-dali-cuda130')}, --device {args.device}) and Pillow "
        f"({version('pillow')}) or torchvision\n({version('torchvision')}), in 1/255, over all pixels and channels. "
        f"Operations on {len(images)} photographs, the rest on {len(paths)}. Made by\n`tools/benchmarks/parity.py`, "
        f"which fails where an operation's mean is above {OPERATION_BOUND[0]} or its 99th percentile above "
        f"{OPERATION_BOUND[1]:g}, "
        f"or the\nloaders' above {LOADER_BOUND[0]} or {LOADER_BOUND[1]:.0f}; decoding must be equal. The few large "
        "differences are at ties between two pixels\n(geometry) and overshoots (resizing, see "
        "[Exactness](exactness.md)). Equalize differs by up to 1 + 65025 / pixels: by more on tiny images.\n"
    )
    is_within = True
    print("| operation | values | mean | 99th percentile | maximum |\n|---|---|---:|---:|---:|")
    d = compare_decoding(paths, args.device)
    print(f"| decode | | {d.mean:.4f} | {d.p99:.0f} | {d.largest:.0f} |", flush=True)
    is_within &= d.largest == 0 or args.device != "cpu"
    for op, values in VALUES.items():
        d = compare_operation(images, op, args.device)
        is_within &= d.is_within(OPERATION_BOUND)
        shown = ", ".join(f"{value:g}" for value in values) if any(values) else ""
        print(f"| {op.name.lower()} | {shown} | {d.mean:.4f} | {d.p99:.0f} | {d.largest:.0f} |", flush=True)
    print("\n| loaders | mean | 99th percentile | maximum |\n|---|---:|---:|---:|")
    for name, transform in TRANSFORMS.items():
        d = compare_loaders(root, transform, args.device)
        is_within &= d.is_within(LOADER_BOUND)
        print(f"| {name} | {d.mean:.3f} | {d.p99:.2f} | {d.largest:.1f} |", flush=True)
    sys.exit(not is_within)


if __name__ == "__main__":
    main()
