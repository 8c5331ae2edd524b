"""A step on many ranks, predicted from its parts: tried with two ranks here, then computed for published GPUs.

python tools/benchmarks/scaling.py [--steps 8] [--out docs/scaling.json]      (two ranks of one thread, by torchrun)
python tools/benchmarks/scaling.py --report docs/scaling.json                 (the page docs/scaling.md)

The parts are measured while both ranks work, so that they share the machine as in a step: the passes of one rank, its
optimiser, its loader alone, and gloo's all-reduce alone. Then the trainer itself takes the steps.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import scaling_page
from scaling_model import Cluster, Link, Stage, Work, predict_step

SETTINGS = (  # network, images per rank, crop
    ("resnest50", 2, 128),
    ("resnest50", 8, 128),
    ("resnest101", 2, 128),
    ("resnest50", 2, 224),
)
SIZES = (4, 1 << 20, 25 << 20)  # bytes: a message's latency, DistributedDataParallel's first bucket and the others


@dataclass(frozen=True)
class Trial:
    """What was measured with two ranks, in seconds.

    Attributes:
        network, images, crop: the setting; images per rank.
        work: the parts of one rank.
        stages: of the network.
        steps: each step of the trainer.
    """

    network: str
    images: int
    crop: int
    work: Work
    stages: list[Stage]
    steps: list[float]


def measure_all_reduce(rounds: int) -> Link:
    """Return the latency and the bandwidth of an all-reduce between the ranks of this process' group."""
    import torch
    import torch.distributed as dist

    seconds = {}
    for size in SIZES:
        values = torch.ones(max(1, size // 4))
        seconds[size] = measure_together(lambda values=values: dist.all_reduce(values), rounds)
    latency, largest = seconds[SIZES[0]], SIZES[-1]
    return Link(latency, largest / (seconds[largest] - latency))  # 2 (n - 1) / n is 1 for two ranks


def measure_together(work: Callable[[], object], rounds: int) -> float:
    """Return the median seconds of a work that all ranks begin together; the slowest rank counts."""
    import torch
    import torch.distributed as dist

    measured = []
    for number in range(rounds + 1):
        dist.barrier()
        started = time.perf_counter()
        work()
        seconds = torch.tensor([time.perf_counter() - started])
        dist.all_reduce(seconds, dist.ReduceOp.MAX)
        measured += [float(seconds)] if number else []  # the first one allocates
    return statistics.median(measured)


def measure_passes(name: str, images: int, crop: int, rounds: int) -> tuple[float, float, float]:
    """Return the seconds of a rank's forward pass, backward pass and optimiser."""
    import torch
    import torch.nn.functional as F

    from resnest_imagenet import build_model
    from resnest_imagenet.compute import keep_freed_memory, place

    keep_freed_memory()
    network = place(build_model(name, 10), torch.device("cpu")).train()
    optimizer = torch.optim.SGD(network.parameters(), 1e-4, 0.9, nesterov=True, weight_decay=1e-4, fused=True)
    pixels = torch.randn(images, 3, crop, crop).contiguous(memory_format=torch.channels_last)
    labels = torch.zeros(images, dtype=torch.int64)
    losses: list[torch.Tensor] = []
    forward = measure_together(lambda: losses.append(F.cross_entropy(network(pixels), labels)), rounds)
    backward = measure_together(lambda: losses.pop().backward(), rounds)
    return forward, backward, measure_together(optimizer.step, rounds)


def measure_loader(options: list[str], rounds: int) -> float:
    """Return the seconds in which a rank's loader makes a batch, without a network beside it."""
    from resnest_imagenet.distributed import Ranks, launched_as
    from resnest_imagenet.training.train import prepare

    task, plan, device = prepare(compose_run(options))
    placed = launched_as()
    ranks = Ranks(placed.rank, placed.world_size, placed.local_rank, device, None)
    loader = task.build_loader(task.plan_batches(plan.steps_per_epoch * ranks.world_size, ranks), ranks)
    batches = loader.batches(0, 0)
    next(batches)
    return measure_together(lambda: next(batches), rounds)


def compose_run(options: list[str]):  # noqa: ANN201  TrainConfig imports torch
    """Return the configuration of a run of the trainer."""
    from hydra import compose, initialize_config_dir

    from resnest_imagenet.commands.launch import check_config, find_conf
    from resnest_imagenet.config import TrainConfig

    with initialize_config_dir(str(find_conf()), version_base="1.3"):
        return check_config(compose("train", options), TrainConfig)


def measure_rank(folder: Path, settings: list[tuple[str, int, int]], steps: int) -> None:
    """Measure all settings on this rank; the first rank writes the result to the folder."""
    import torch
    from bench import describe_machine

    from resnest_imagenet import distributed
    from resnest_imagenet.training.train import train

    device, links, trials = torch.device("cpu"), [], []
    for name, images, crop in settings:
        run = folder / f"{name}-{images}-{crop}"
        options = ["recipe=demo", f"model={name}", f"data.root={folder}/data", "device=cpu", f"run_dir={run}"]
        options += [f"train.batch_size={images}", f"train.crop={crop}", "loader.workers=1", "eval.crop=32"]
        options += ["train.epochs=null", f"train.steps={steps + 2}", "train.warmup_epochs=0"]
        options += ["log.every_steps=1", "log.trackers=[]", "log.pictures=false", "checkpoint.every_steps=1000"]
        with distributed.join(device):
            links.append(measure_all_reduce(steps))
            passes = measure_passes(name, images, crop, max(3, steps // 2))
            load = measure_loader(options, steps)
        train(compose_run(options))
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        speeds = [line["images_per_s"] for line in lines if line["event"] == "train"]
        trial = Trial(name, images, crop, Work(*passes, load), [], [2 * images / speed for speed in speeds[2:]])
        trials.append({**asdict(trial), "stages": count_stages(name, crop)})
    if distributed.launched_as().rank == 0:
        result = {"machine": describe_machine(device), "links": [asdict(link) for link in links], "trials": trials}
        (folder / "result.json").write_text(json.dumps(result, indent=1) + "\n")


def count_stages(name: str, crop: int) -> list[dict[str, float]]:
    """Return the bytes of the gradients of each stage of a network and its multiply-adds, as `Stage` has them."""
    from resnest_imagenet.models import cost

    return [asdict(Stage(4 * stage.parameters, stage.multiply_adds)) for stage in cost.count_stages(name, crop, 10)]


def measure(settings: list[tuple[str, int, int]], steps: int) -> dict:
    """Return the result of two ranks under torchrun, a thread each."""
    from resnest_imagenet.data.demo import write_demo_images

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_demo_images(folder / "data", 0, train_per_class=32, val_per_class=1)
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        work = [__file__, "--rank", name, "--steps", str(steps), "--settings", json.dumps(settings)]
        subprocess.run([*launcher, *work], check=True)
        return json.loads((folder / "result.json").read_text())


def predict_trial(trial: dict, links: list[dict]) -> float:
    """Return the predicted seconds of a step of two ranks on the cores of this machine."""
    link = Link(*(statistics.median(entry[key] for entry in links) for key in ("latency", "bandwidth")))
    stages = [Stage(**stage) for stage in trial["stages"]]
    return predict_step(Work(**trial["work"]), stages, Cluster(2, link, link), 2, shares_cores=True).seconds


def main() -> None:
    """Measure, or print the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8, help="of the trainer in each setting")
    parser.add_argument("--settings", type=json.loads, default=SETTINGS, help='[["resnest50", 2, 128]]')
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rank", type=Path, help=argparse.SUPPRESS)  # this process is a rank, and this its folder
    parser.add_argument("--report", type=Path)
    args = parser.parse_args()
    if args.report:
        print(scaling_page.write_page(json.loads(args.report.read_text())), end="")
    elif args.rank:
        measure_rank(args.rank, args.settings, args.steps)
    else:
        result = measure(args.settings, args.steps)
        for trial in result["trials"]:
            predicted, measured = predict_trial(trial, result["links"]), statistics.median(trial["steps"])
            setting = f"{trial['network']}, {trial['images']} images, crop {trial['crop']}"
            print(f"{setting:<40} predicted {predicted:.3f} s, measured {measured:.3f} s: {predicted / measured:.2f}")
        if args.out:
            args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
