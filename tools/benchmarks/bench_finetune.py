"""The accuracy of recipe=finetune beside recipe=demo, on a few images of each class.

python tools/benchmarks/bench_finetune.py PICTURES --start best.pt --model resnest14_half [--per-class 25 100]

PICTURES has train/CLASS/FILE and val/CLASS/FILE. For each number of images and each seed, so many images of each class
are drawn from train/; every recipe trains on the same ones, with its own number of epochs, and is evaluated once, after
its last epoch. Runs that have finished are not repeated: the same command resumes. Prints a table in Markdown.
"""

import argparse
import contextlib
import io
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

# The rows of the table: a name, and the options of resnest-train.
ROWS = {
    "demo, from scratch": ("recipe=demo",),
    "demo, from the start": ("recipe=demo", "train.init_from={start}"),
    "finetune, from the start": ("recipe=finetune", "train.init_from={start}"),
}


def link_images(pictures: Path, out: Path, per_class: int, val_per_class: int, seed: int) -> None:
    """Link the images of a draw into `out`: `per_class` of each class of train/, and the same of val/ for all draws."""
    for part, count, draw in (("train", per_class, seed), ("val", val_per_class, 0)):
        for folder in sorted(path for path in (pictures / part).iterdir() if path.is_dir()):
            files = sorted(path for path in folder.iterdir() if path.is_file())
            place = out / part / folder.name
            place.mkdir(parents=True, exist_ok=True)
            for file in random.Random(f"{draw} {folder.name}").sample(files, min(count, len(files))):
                with contextlib.suppress(FileExistsError):  # of an earlier recipe or run
                    (place / file.name).symlink_to(file.resolve())


def train_one(options: Sequence[str]) -> tuple[float, float]:
    """Train with options of resnest-train; return the accuracy of the last evaluation in percent, and the seconds."""
    from hydra import compose, initialize_config_dir

    from resnest_imagenet.commands.launch import check_config, find_conf
    from resnest_imagenet.config import TrainConfig
    from resnest_imagenet.training.train import train

    with initialize_config_dir(str(find_conf()), version_base="1.3"):
        config = check_config(compose("train", list(options)), TrainConfig)
    started = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        train(config)
    events = map(json.loads, Path(config.run_dir, "metrics.jsonl").read_text().splitlines())
    return [event["top1"] for event in events if event["event"] == "eval"][-1], time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", type=Path)
    parser.add_argument("--start", required=True, help="weights to start from, as train.init_from takes them")
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--crop", type=int, default=64)
    parser.add_argument("--per-class", type=int, nargs="+", default=[25, 100])
    parser.add_argument("--val-per-class", type=int, default=100)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rows", nargs="+", default=list(ROWS), help=f"some of {', '.join(ROWS)}; or NAME:OPTIONS")
    parser.add_argument("--work", type=Path, default=Path("runs/bench_finetune"))
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    table = [f"| images of each class | {' | '.join(args.rows)} |", "|---" * (1 + len(args.rows)) + "|"]
    for per_class in args.per_class:
        cells = []
        for row in args.rows:
            name, _, words = row.partition(":")
            options = [word.format(start=args.start) for word in (words.split() or ROWS[name])]
            results = []
            for seed in args.seeds:
                data = args.work / f"images-{per_class}-{seed}"
                link_images(args.pictures, data, per_class, args.val_per_class, seed)
                run = args.work / f"{name.replace(', ', '-').replace(' ', '-')}-{per_class}-{seed}"
                common = [f"model={args.model}", f"data.root={data}", f"run_dir={run}", f"seed={seed}"]
                common += [f"train.crop={args.crop}", "eval.every_epochs=1000", "log.trackers=[]"]
                common += [f"loader.workers={args.workers}"]
                top1, seconds = train_one([*common, *options])
                results.append(top1)
                print(f"{per_class} {name} seed {seed}: {top1:.2f} %, {seconds:.0f} s", file=sys.stderr, flush=True)
            each = ", ".join(f"{top1:.1f}" for top1 in results)
            cells.append(f"**{statistics.mean(results):.1f}** ({each})")
        table.append(f"| {per_class} | {' | '.join(cells)} |")
    print("\n".join(table))


if __name__ == "__main__":
    main()
