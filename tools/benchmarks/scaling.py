"""A step on many ranks, predicted from its parts: tried with two ranks here, then computed for published GPUs.

python tools/benchmarks/scaling.py [--rounds 3] [--steps 3] [--out docs/scaling.json]   (two ranks under torchrun)
python tools/benchmarks/scaling.py --report docs/scaling.json                           (the page docs/scaling.md)

A rank has one thread. Both ranks work while a part is measured, so that they share the machine as in a step. The parts:
the passes and the optimiser of a rank that sends nothing, its loader alone, gloo's all-reduce alone. Then the trainer
takes some steps. Rounds over all settings are interleaved. Some settings slow down loopback, in a network namespace of
their own (unshare, ip and tc, as root).
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import scaling_page
from PIL import Image
from scaling_model import Link, Stage, Work, fill_buckets
from scaling_published import TIMM

if TYPE_CHECKING:
    from resnest_imagenet.config import TrainConfig
    from resnest_imagenet.distributed import Ranks

SETTINGS = (  # network, images per rank, crop, Mbit/s of the network between the ranks (0: loopback's own)
    ("resnest50", 2, 128, 0),
    ("resnest50", 6, 128, 0),
    ("resnest101", 2, 128, 0),
    ("resnest14", 16, 64, 0),
    ("resnest50", 2, 128, 2000),
    ("resnest50", 2, 224, 2000),
)
MESSAGE, BUCKET = 4, 25 << 20  # bytes of an all-reduce: those that show its latency, and its bandwidth
RECIPE = ("recipe=demo", "train.policy=resnest", "train.jitter=0.4", "train.lighting=0.1")  # a costly loader
QUIET = ("log.every_steps=1", "log.trackers=[]", "log.pictures=false", "eval.crop=32")


def measure_once(work: Callable[[], object]) -> float:
    """Return the seconds of a work that all ranks begin together; the slowest rank counts."""
    import torch
    import torch.distributed as dist

    dist.barrier()
    started = time.perf_counter()
    work()
    seconds = torch.tensor([time.perf_counter() - started])
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    return float(seconds)


def measure_median(work: Callable[[], object], count: int) -> float:
    """Return the median seconds of some calls of a work, after a first one that allocates."""
    return statistics.median([measure_once(work) for _ in range(count + 1)][1:])


def measure_link(count: int) -> Link:
    """Return the latency and the bandwidth of an all-reduce between the two ranks of this process' group."""
    import torch
    import torch.distributed as dist

    few, many = torch.ones(MESSAGE // 4), torch.ones(BUCKET // 4)
    latency = measure_median(lambda: dist.all_reduce(few), 4 * count)
    return Link(latency, BUCKET / (measure_median(lambda: dist.all_reduce(many), count) - latency))


def measure_work(config: "TrainConfig", ranks: "Ranks", count: int) -> Work:
    """Return the parts of a step of a rank: all that the trainer does, but no gradient is sent.

    The backward pass fills DistributedDataParallel's buckets, as in the trainer.
    """
    from torch.distributed.algorithms.ddp_comm_hooks.debugging_hooks import noop_hook
    from torch.nn.parallel import DistributedDataParallel

    from resnest_imagenet.randomness import Draws
    from resnest_imagenet.training.health import Health
    from resnest_imagenet.training.losses import TOTAL, divide_loss
    from resnest_imagenet.training.optimizer import take_step
    from resnest_imagenet.training.state import TrainingState
    from resnest_imagenet.training.train import prepare

    task, plan, device = prepare(config)
    batches = task.build_loader(task.plan_batches(plan.steps_per_epoch * ranks.world_size, ranks), ranks).batches(0, 0)
    load = measure_median(lambda: next(batches), 4 * count)
    batch = next(batches)
    state = TrainingState(task.build_model(True, device), config.train, task.head)
    network = DistributedDataParallel(state.model.train(), gradient_as_bucket_view=True)
    network.register_comm_hook(None, noop_hook)
    losses: dict[str, Any] = {}
    with Health(state, config.train) as health:

        def end_step() -> None:
            state.losses.add(losses)
            take_step(state.optimizer, 1e-4, health.judge(1e-4, False, ranks))
            list(health.read_verdicts())
            health.start_step()

        def take_parts() -> tuple[float, float, float]:
            forward = measure_once(lambda: losses.update(divide_loss(task.loss(network, batch, Draws(0, 0, 0)), 1)))
            return forward, measure_once(losses[TOTAL].backward), measure_once(end_step)

        parts = zip(*[take_parts() for _ in range(count + 1)][1:], strict=True)
        return Work(*map(statistics.median, parts), load=load)


def limit_network(rate: int) -> None:
    """Limit loopback of this process' network namespace, both ways together."""
    words = ["tc", "qdisc", "replace", "dev", "lo", "root"]
    limited = ["tbf", "rate", f"{rate}mbit", "burst", "2mb", "latency", "50ms"]
    subprocess.run([*words, *(limited if rate else ["pfifo", "limit", "10000"])], check=True)


def compose_run(data: Path, run: Path, setting: tuple[str, int, int], steps: int) -> "TrainConfig":
    """Return the configuration of a run of the trainer."""
    from hydra import compose, initialize_config_dir

    from resnest_imagenet.commands.launch import check_config, find_conf
    from resnest_imagenet.config import TrainConfig

    name, images, crop = setting
    options = [*RECIPE, f"model={name}", f"data.root={data}", f"run_dir={run}"]
    options += [f"train.batch_size={images}", f"train.crop={crop}", "device=cpu", "loader.workers=1", *QUIET]
    options += ["train.epochs=null", f"train.steps={steps}", "train.warmup_epochs=0"]
    with initialize_config_dir(str(find_conf()), version_base="1.3"):
        return check_config(compose("train", options), TrainConfig)


def take_steps(config: "TrainConfig") -> float:
    """Return the median seconds of a step of the trainer, without its first."""
    from resnest_imagenet.training.train import train

    train(config)
    events = [json.loads(line) for line in (Path(config.run_dir) / "metrics.jsonl").read_text().splitlines()]
    speeds = [event["images_per_s"] for event in events if event["event"] == "train"]
    return statistics.median(2 * config.train.batch_size / speed for speed in speeds[1:])


def measure_rank(folder: Path, settings: list[tuple[str, int, int, int]], rounds: int, steps: int) -> None:
    """Measure all settings on this rank; the first rank writes the result to the folder."""
    import torch
    from bench import describe_machine

    from resnest_imagenet import distributed

    device = torch.device("cpu")
    is_main, is_limited = distributed.launched_as().rank == 0, any(rate for *_, rate in settings)
    trials: list[dict[str, Any]] = []
    for name, images, crop, rate in settings:
        setting = {"network": name, "images": images, "crop": crop, "rate": rate}
        trials.append({**setting, "buckets": list_buckets(name, crop, 10), "rounds": []})
    for number in range(rounds):
        for trial, (*setting, rate) in zip(trials, settings, strict=True):
            run = folder / "-".join(map(str, (*setting, rate, number)))
            config = compose_run(folder / "data", run, (*setting,), steps + 1)
            with distributed.join(device) as ranks:
                if is_main and is_limited:
                    limit_network(rate)
                distributed.barrier(ranks)
                link, work = measure_link(steps), measure_work(config, ranks, steps)
            trial["rounds"].append({"link": asdict(link), "work": asdict(work), "step": take_steps(config)})
    if is_main:
        result = {"machine": describe_machine(device), "trials": trials}
        (folder / "result.json").write_text(json.dumps(result, indent=1) + "\n")


def list_buckets(name: str, crop: int, num_classes: int) -> list[dict[str, float]]:
    """Return the buckets of a network, as `Bucket` has them."""
    import torch

    from resnest_imagenet import build_model
    from resnest_imagenet.models.cost import count_stages

    with torch.device("meta"):
        sizes = iter([parameter.nbytes for parameter in build_model(name, num_classes).parameters()])
    stages = []
    for stage in count_stages(name, crop, num_classes):
        own: list[int] = []
        while sum(own) < 4 * stage.parameters:
            own.append(next(sizes))
        stages.append(Stage(own, stage.multiply_adds))
    return [asdict(bucket) for bucket in fill_buckets(stages)]


def read_recipes() -> list[dict[str, Any]]:
    """Return what the plan needs of the recipes of Table 3, and of ResNeSt-200 and 269."""
    from hydra import compose, initialize_config_dir

    from resnest_imagenet.commands.launch import find_conf

    recipes = []
    for name in TIMM:
        with initialize_config_dir(str(find_conf()), version_base="1.3"):
            config = compose("train", [f"+experiment={name}", "data.root=/imagenet"])
        options = {key: config.train[key] for key in ("recipe", "epochs", "global_batch", "batch_size", "crop")}
        recipes.append({"network": name, **options, "buckets": list_buckets(name, options["crop"], 1000)})
    return recipes


def measure(settings: list[tuple[str, int, int, int]], rounds: int, steps: int) -> dict[str, Any]:
    """Return the result of two ranks under torchrun, a thread each."""
    from resnest_imagenet.data.demo import write_demo_images

    with tempfile.TemporaryDirectory() as name:
        write_demo_images(Path(name) / "data", 0, train_per_class=64, val_per_class=1)
        for path in (Path(name) / "data").rglob("*.JPEG"):
            with Image.open(path) as image:
                image.resize((500, 375)).save(path, quality=90)  # as large as ImageNet's
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__]
        command += ["--rank", name, "--rounds", str(rounds), "--steps", str(steps), "--settings", json.dumps(settings)]
        if any(rate for *_, rate in settings):
            command = ["unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh", *command]
        subprocess.run(command, check=True)
        return json.loads((Path(name) / "result.json").read_text())


def main() -> None:
    """Measure, or print the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3, help="of the trainer in a round")
    parser.add_argument("--settings", type=json.loads, default=SETTINGS, help='[["resnest50", 2, 128, 0]]')
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rank", type=Path, help=argparse.SUPPRESS)  # this process is a rank, and this its folder
    parser.add_argument("--report", type=Path)
    args = parser.parse_args()
    if args.report:
        print(scaling_page.write_page(json.loads(args.report.read_text())), end="")
    elif args.rank:
        measure_rank(args.rank, args.settings, args.rounds, args.steps)
    else:
        result = {**measure(args.settings, args.rounds, args.steps), "recipes": read_recipes()}
        print("\n".join(scaling_page.compare_trials(result)))
        if args.out:
            args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
