"""How far a linear classifier on pixels gets on a folder of images: what the demo's accuracy is worth.

python tools/linear_baseline.py data/demo
"""

import sys

import numpy as np
import torch
from PIL import Image

from resnest_imagenet.data.folder import ImageFolder, read_image_folder
from resnest_imagenet.data.transforms import EvalTransform

SIZE = 64


def read_pixels(folder: ImageFolder) -> tuple[torch.Tensor, torch.Tensor]:
    """Return centre crops as float32 (N, 3 * SIZE * SIZE) in -1..1, and labels (N,)."""
    transform = EvalTransform(SIZE)
    rows = []
    for index in range(len(folder)):
        image = Image.open(folder.path(index).decode()).convert("RGB")
        height, width = transform.resized(image.height, image.width)
        top, left, h, w = transform.window(height, width)
        crop = image.resize((width, height), Image.Resampling.BILINEAR).crop((left, top, left + w, top + h))
        rows.append(np.asarray(crop, dtype=np.float32).ravel() / 127.5 - 1)
    return torch.from_numpy(np.stack(rows)), torch.from_numpy(folder.labels)


def main() -> None:
    train, val = (read_image_folder(sys.argv[1], part, part) for part in ("train", "val"))
    pixels, labels = read_pixels(train)
    val_pixels, val_labels = read_pixels(val)
    print(f"{'weight decay':>12} {'train %':>8} {'val %':>8}")
    for weight_decay in (1e-4, 1e-2, 1e0, 1e2):
        torch.manual_seed(0)
        model = torch.nn.Linear(pixels.shape[1], len(train.classes))
        optimizer = torch.optim.LBFGS(model.parameters(), max_iter=200, line_search_fn="strong_wolfe")

        def closure(model=model, optimizer=optimizer, weight_decay=weight_decay) -> torch.Tensor:  # noqa: ANN001
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(pixels), labels)
            loss = loss + weight_decay * model.weight.square().sum() / 2
            loss.backward()
            return loss

        optimizer.step(closure)
        with torch.no_grad():
            scores = [
                (model(x).argmax(1) == y).float().mean().item() for x, y in ((pixels, labels), (val_pixels, val_labels))
            ]
        print(f"{weight_decay:>12g} {100 * scores[0]:>8.1f} {100 * scores[1]:>8.1f}")


if __name__ == "__main__":
    main()
