"""Random crops from JPEGs decoded at half their size (libjpeg's DCT scaling, by Pillow): what that saves and changes.

python tools/benchmarks/bench_scaled_decoding.py DIR [--epochs 2]

DIR/<class>/<image> may be any photographs. Only crops of at least twice the output's size can come from an image of
half the size. Times are of CPU, of decoding and resizing.
"""

import argparse
import io
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from resnest_imagenet.data.decoding import decode
from resnest_imagenet.data.transforms import TrainTransform, Window

CROP = 224


def crop_whole(encoded: bytes, window: Window, antialias: bool) -> np.ndarray:
    """Decode and crop as the torchvision loader does: uint8 (crop, crop, 3)."""
    crop = F.resized_crop(decode(encoded), *window, [CROP] * 2, InterpolationMode.BILINEAR, antialias=antialias)
    return crop.permute(1, 2, 0).numpy()


def crop_half(encoded: bytes, window: Window, antialias: bool) -> np.ndarray:
    """Decode at half the size, and crop the same part of the picture."""
    image = Image.open(io.BytesIO(encoded))
    width, height = image.size
    image.draft("RGB", (width // 2, height // 2))
    image = image.convert("RGB")
    top, left, h, w = window
    x, y = image.width / width, image.height / height
    if antialias:
        box = (left * x, top * y, (left + w) * x, (top + h) * y)
        return np.asarray(image.resize((CROP, CROP), Image.Resampling.BILINEAR, box))
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    half = [round(top * y), round(left * x), round(h * y), round(w * x)]
    crop = F.resized_crop(pixels, *half, [CROP] * 2, InterpolationMode.BILINEAR, antialias=False)
    return crop.permute(1, 2, 0).numpy()


def compare(images: list[bytes], epochs: int, antialias: bool) -> str:
    """Return a row of the table."""
    transform = TrainTransform(CROP, 0, antialias=antialias)
    before = after = 0.0
    apart = []
    for epoch in range(epochs):
        _, draws = transform.draw_crops(epoch, range(len(images)))
        for encoded, draw in zip(images, draws.tolist(), strict=True):
            width, height = Image.open(io.BytesIO(encoded)).size
            window = transform.cropping.window(height, width, draw)
            times = [time.process_time()]
            whole = crop_whole(encoded, window, antialias)
            times.append(time.process_time())
            before += times[1] - times[0]
            if min(window[2:]) < 2 * CROP:
                after += times[1] - times[0]
                continue
            half = crop_half(encoded, window, antialias)
            after += time.process_time() - times[1]
            apart.append(np.abs(whole.astype(np.int16) - half).ravel())
    difference = np.concatenate(apart)
    share = len(apart) / (epochs * len(images))
    mean, high = difference.mean(), np.percentile(difference, 99)
    return f"| {antialias} | {share:.1%} | {before / after:.3f} | {mean:.2f} | {high:.0f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--epochs", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(1)
    images = [path.read_bytes() for path in sorted(args.folder.glob("*/*"))]
    print("| antialias | crops that allow it | speed-up over all crops | mean difference, of 255 | 99th percentile |")
    print("|---|---:|---:|---:|---:|")
    for antialias in (True, False):
        print(compare(images, args.epochs, antialias), flush=True)


if __name__ == "__main__":
    main()
