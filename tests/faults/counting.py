"""Numbers that must not depend on how many take part: counts, parameters, random draws."""

import json
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from faults.harness import LOADERS, RICH, Claims, Command, Place, Trainer, encode, get_server, newest, require
from resnest_imagenet.checkpoint import load_checkpoint
from resnest_imagenet.data.augment import Augmentation
from resnest_imagenet.data.folder import read_image_folder
from resnest_imagenet.data.loader import build_loader
from resnest_imagenet.data.plan import BatchPlan
from resnest_imagenet.data.source import ImageSource
from resnest_imagenet.data.transforms import RandomResizedCrop, TrainTransform
from resnest_imagenet.models.zoo import build_model


def count_exactly(place: Place) -> dict[str, Any]:
    """1, 2 and 3 ranks count the same; 2 train as 1 that accumulates does; no two samples are drawn alike."""
    claims = Claims()
    settings = list(zip(LOADERS, ("fp32", "bf16"), strict=True))
    trained = [_compare_with_accumulation(place, claims, *setting) for setting in settings]
    correct = {loader: _count_with_ranks(place, claims, loader, trained[0]) for loader, _ in settings}
    copies = _make_copies(place, 128)
    with ProcessPoolExecutor(1, get_server()) as pool:
        for loader, _ in settings:
            for held, claim in pool.submit(_compare_streams, copies, loader).result():
                claims.add(held, claim)
    claims.require()
    return {"images": 103, "correct": str(correct), "equal_trainings": len(trained), "claims": claims.number}


def _compare_with_accumulation(place: Place, claims: Claims, loader: str, precision: str) -> Path:
    """Train twice, and return a checkpoint."""
    runs = [place.new_run() for _ in range(2)]
    options = (*RICH, f"loader={loader}", f"train.precision={precision}")  # batch 8, global batch 16
    trainers = [Trainer(place, run, *options, ranks=ranks) for ranks, run in enumerate(runs, 1)]
    for trainer in trainers:
        require(set(trainer.wait()) == {0}, f"{len(trainer.processes)} ranks train:\n{trainer.output}")
    contents = [load_checkpoint(newest(run)) for run in runs]
    require([content["step"] for content in contents] == [12, 12], "12 steps each")
    one, two = (content["model"] for content in contents)
    names = [name for name, _ in build_model("resnest14_half", 10).named_parameters()]
    differing = [name for name in names if not torch.equal(one[name], two[name])]
    claims.add(not differing, f"{loader}, {precision}: 2 ranks end with other parameters: {differing}")
    return newest(runs[0])


def _count_with_ranks(place: Place, claims: Claims, loader: str, checkpoint: Path) -> list[int]:
    """Evaluate on the 103 images, and return the numbers of right answers at each crop."""
    outs = {ranks: place.folder / f"{loader}-{ranks}.json" for ranks in (1, 2, 3)}
    options = (f"ckpt={checkpoint}", f"data.root={place.data}", "data.val_dir=train", "crop=[32,48]", "batch_size=16")
    options += (f"loader={loader}", "loader.workers=1", "device=cpu")
    commands = [Command(place, "evaluate", *options, f"out={outs[ranks]}", ranks=ranks) for ranks in outs]
    for command in commands:
        require(set(command.wait()) == {0}, f"{len(command.processes)} ranks evaluate:\n{command.output}")
    results = {ranks: json.loads(out.read_text())["results"] for ranks, out in outs.items()}
    names = ("correct1", "correct5", "count")
    counts = {ranks: [[each[name] for name in names] for each in crops] for ranks, crops in results.items()}
    claims.add(all(each == counts[1] for each in counts.values()), f"{loader}: other counts with other ranks: {counts}")
    claims.add(all(0 < one < five < count == 103 for one, five, count in counts[1]), f"{loader}: {counts[1]} of 103")
    return [one for one, _, _ in counts[1]]


def _compare_streams(copies: Path, loader: str) -> list[tuple[bool, str]]:
    """Crop copies of one image on 2 ranks with 2 workers each, in a process of its own; return claims.

    Numbers from a continuum are not equal by accident: places and sizes of crops on an image of noise, and on whole
    images the strengths of jitter and lighting.
    """
    multiprocessing.set_start_method("fork", force=True)
    images = read_image_folder(str(copies), "train", "data.train_dir")
    claims = []
    whole, looks = RandomResizedCrop(min_area=1, max_aspect=1), Augmentation(jitter=0.4, lighting=0.1)
    transforms = {
        "crops": TrainTransform(32, seed=1),
        "looks": TrainTransform(32, 1, whole, augmentation=looks, flip=0),
        "all": TrainTransform(32, 1, augmentation=replace(looks, policy="resnest")),
    }
    for name, transform in transforms.items():
        seen = set()
        for epoch in range(2):
            load = partial(_load, loader, images, transform, epoch)
            shares = [load(rank, world_size=2, workers=2) for rank in range(2)]
            alone = load(0, world_size=1, workers=0)
            same = all(torch.equal(batch, shares[n % 2][n // 2]) for n, batch in enumerate(alone))
            claims.append((same, f"{loader}, {name}: ranks and workers change what a sample gets"))
            seen |= {crop.numpy().tobytes() for crop in torch.cat(shares[0] + shares[1])}
        is_each = len(seen) == 2 * len(images)
        claims.append((is_each, f"{loader}, {name}: {len(seen)} different crops of {2 * len(images)}"))
    return claims


def _make_copies(place: Place, number: int) -> Path:
    folder = place.folder / "copies/train/a"
    folder.mkdir(parents=True)
    (folder / "0.png").write_bytes(encode("PNG", (300, 300)))
    for copy in range(1, number):
        os.link(folder / "0.png", folder / f"{copy}.png")
    return place.folder / "copies"


def _load(
    loader: str, images: ImageSource, transform: TrainTransform, epoch: int, rank: int, world_size: int, workers: int
) -> list[torch.Tensor]:
    plan = BatchPlan(len(images), 8, len(images) // 8, rank, world_size, shuffle=True, seed=1)
    return [
        pixels
        for pixels, _ in build_loader(loader, images, plan, transform, torch.device("cpu"), workers).batches(epoch)
    ]
