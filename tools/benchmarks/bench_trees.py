"""The DALI loader of two source trees on the same photographs, side by side: images/s and CPU time for each image.

python tools/benchmarks/bench_trees.py IMAGES BEFORE AFTER [--rounds 9] [--workers 2]

BEFORE and AFTER are the src folders of checkouts. Each tree is served by a process of its own; passes alternate.
Prints, for an evaluation, a light training recipe and recipe=resnest, the median of both and of the ratio within a
round.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

BATCH, BATCHES, EDGE = 64, 16, 2  # of a pass; at its edges the clock does not run


def serve(images: str, workers: int) -> None:
    """Make a pass for each line read, the name of a transform, and print images/s and CPU ms for each image."""
    from dataclasses import replace

    import numpy as np
    import torch

    from resnest_imagenet.data.augment import Augmentation
    from resnest_imagenet.data.folder import read_image_folder
    from resnest_imagenet.data.loader import build_loader
    from resnest_imagenet.data.plan import BatchPlan
    from resnest_imagenet.data.transforms import EvalTransform, TrainTransform

    source = read_image_folder(str(Path(images).parent), Path(images).name, "images")
    rows = np.arange(BATCH * BATCHES) % len(source)
    source = replace(source, files=source.files[rows], labels=source.labels[rows])
    transforms: dict[str, EvalTransform | TrainTransform] = {
        "evaluation": EvalTransform(224),
        "light": TrainTransform(224, 0),
        "resnest": TrainTransform(224, 0, augmentation=Augmentation("resnest", 0.4, 0.1)),
    }
    loaders = {
        name: build_loader(
            "dali",
            source,
            BatchPlan(BATCH * BATCHES, BATCH, BATCHES, shuffle=isinstance(transform, TrainTransform)),
            transform,
            torch.device("cpu"),
            workers,
        )
        for name, transform in transforms.items()
    }
    print("ready", flush=True)
    for epoch, line in enumerate(sys.stdin):
        clocks = []
        for batch, (pixels, _) in enumerate(loaders[line.strip()].batches(epoch)):
            float(pixels.sum())
            if batch in (EDGE, BATCHES - EDGE - 1):
                clocks.append((time.perf_counter(), time.process_time()))
        (started, cpu_started), (ended, cpu_ended) = clocks
        count = BATCH * (BATCHES - 2 * EDGE - 1)
        print(count / (ended - started), 1000 * (cpu_ended - cpu_started) / count, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", help="DIR/<class>/<image>")
    parser.add_argument("before", nargs="?")
    parser.add_argument("after", nargs="?")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    if args.before is None:
        serve(args.images, args.workers)
        return
    servers = []
    for tree in (args.before, args.after):
        environment = {**os.environ, "PYTHONPATH": str(Path(tree).resolve()), "OMP_WAIT_POLICY": "PASSIVE"}
        command = [sys.executable, __file__, args.images, "--workers", str(args.workers)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        servers.append(subprocess.Popen(command, env=environment, **pipes))
        assert servers[-1].stdout.readline() == "ready\n"
    print(f"{'pass':<12}{'images/s':>16}{'ratio':>8}{'CPU ms':>16}{'ratio':>8}")
    for name in ("evaluation", "light", "resnest"):
        rounds = []
        for number in range(args.rounds + 1):
            figures: dict[int, tuple[float, ...]] = {}
            for which in (0, 1) if number % 2 else (1, 0):
                servers[which].stdin.write(name + "\n")
                servers[which].stdin.flush()
                figures[which] = tuple(map(float, servers[which].stdout.readline().split()))
            rounds.append((figures[0], figures[1]))
        columns = ""
        for place, form in ((0, ".0f"), (1, ".2f")):
            pairs = [(before[place], after[place]) for before, after in rounds[1:]]  # the first warms up
            medians = [format(statistics.median(values), form) for values in zip(*pairs, strict=True)]
            ratio = statistics.median(after / before for before, after in pairs)
            columns += f"{' -> '.join(medians):>16}{ratio:>8.3f}"
        print(f"{name:<12}{columns}", flush=True)
    for server in servers:
        server.stdin.close()
        server.wait()


if __name__ == "__main__":
    main()
