"""The page docs/scaling.md: the model beside the measured step of two ranks, and its figures for published GPUs."""

import json
import math
import statistics
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scaling_model import (
    FEW_IMAGES,
    Bucket,
    Cluster,
    Link,
    Step,
    Work,
    find_needed_bandwidth,
    predict_step,
    split_batch,
)
from scaling_published import (
    DEEPLAB,
    DETECTORS,
    GPU,
    GPUS,
    INFERENCE,
    JPEG_BYTES,
    SOURCES,
    scale_speed,
)

COUNTS = (8, 64, 512)
IMAGENET, ADE20K = 1_281_167, 20_210  # training images
FORWARD = 1 / 3  # of a pass: the backward pass has two products for each of the forward pass
V100 = GPUS[0]
DATA_SPEED = Path(__file__).parents[2] / "docs/data_speed.json"

INTRODUCTION = """# Plan past one machine

Made by `make scaling` (tools/benchmarks/scaling.py): a model of a step, tried against two ranks on this machine, then
computed for 8, 64 and 512 GPUs of published speeds. No GPU was at hand: every figure below "Published speeds" is a
prediction, and [a first run](#before-a-long-run) should check it.

## The model

- A rank computes for the forward pass, the backward pass and the optimiser. On a GPU a published training throughput
  has all three; a third of it is taken for the forward pass.
- Gradients are sent in fp32, in the buckets of DistributedDataParallel (25 MiB, the first 1 MiB, the last gradient's
  first), each once it is complete and the one before it is sent. Each stage has the share of the backward pass that it
  has of the multiply-adds; within a stage gradients appear evenly by their bytes.
- An all-reduce of S bytes over n ranks takes its latency and 2 (n - 1) / n x S / bandwidth, with the slowest link's
  bandwidth. Latency between nodes grows with log2 of the nodes.
- On a GPU the loader works beside the network, and the all-reduce beside the backward pass: a step takes the longer of
  the loader's time and the network's with what is left of the all-reduce. On a CPU the loader takes its time from the
  same cores, and so does an all-reduce, as far as it copies and sums; what it waits for a slow network hides.
"""

TRIALS = """\
The parts in percent of the measured step, of each the fastest round, since other programs only add time. In brackets
the ratios of single rounds. In the last rows the network between the ranks is slow: loopback, limited to 2 Gb/s for
both ways together."""

LATENCIES = """\
H100's throughput is A100's by NVIDIA times the ratio of the two by Lambda. An all-reduce of a few bytes takes
12.5 us inside a node, 46 us between two, and as much more for each further doubling as for the first."""

CHECK = """\
The model beside the published speed-up of one node. NVIDIA's are 13 and 16 % below the model, and Lambda's 1 %. The
README does not explain it; its eight V100 train 208 images/s for each core, its eight A100 130."""

COLUMNS = """\
In mixed precision, each at its recipe's crop. `network needed`: the bandwidth between nodes with which the ranks wait
for gradients for 5 % of the time in which they compute; `latency`: they wait longer with any. `cores for it`: of a
node, so that no GPU waits. Hours: of the recipe's epochs, without evaluations."""

DOWNSTREAM = """\
On 8 V100 in fp32, two images each, all-reduce included. A step of 16 images has none for each of 64 or 512 GPUs.
Cascade R-CNN without masks, ResNeSt-200, ResNeSt-50 in DeepLabV3 and Cityscapes have no published figure. Where it says
`its backbone`, the published step with a ResNet is longer by the time that two images of 800 x 1333 take more in the
ResNeSt; where it says `inference`, it is scaled by the published speeds of inference. 16 GPUs with one image each take
half of a step's time; their all-reduce of 180 to 390 MB between two nodes is 8 to 16 ms and hides behind the backward
pass. The loader and the storage are no limit."""

ENDING = """## Where each ends, and what to change

- **batch**: fewer than {few} images for each batch norm, which costs accuracy ([Many nodes](cluster.md#how-many-gpus)).
  It is the first limit of every recipe: ResNeSt-50's 8192 images end at 256 GPUs, ResNeSt-101's 4096 at 128, the
  2048 of ResNeSt-200 and 269 at 64, the peers' 256 at 8 and ResNetD's 1024 at 32. Tables 5 to 7 have 16 images and
  synchronise their norms: they end at 16 GPUs of one image. Nothing in the recipe changes that: a larger batch is
  another recipe (the linear rule of the rate holds to about 8192 images). Use more GPUs for other seeds, rows or
  networks beside each other.
- **network**: gradients outlast the backward pass. InfiniBand of these nodes is no limit before the batch is, but a
  slower network can be: compare it with `network needed` (10 Gb/s Ethernet is 1.25 GB/s). To change: a faster network,
  or fewer GPUs with more images each. Accumulation also helps: gradients are sent once for all passes.
- **loader**: the cores of a node load fewer images than its GPUs train; a step is then longer by the ratio of the two.
  To change: `loader=dali` decodes and augments on the GPUs, or keep smaller images ([Data](data.md)).
- **compute**: what is wanted: more GPUs shorten the run in proportion until another limit comes.
- **storage**: the bytes are read in the first epoch; if a node's memory holds the set (ImageNet: 148 GB), later epochs
  read nothing. Shards ([Data](data.md)) make few large reads of them on a network file system.

## Before a long run

`dry_run=true` shows the passes of each step. Then take 200 steps on one node and on all, and read `images_per_s` and
`data_wait` in metrics.jsonl: `data_wait` above 5 % is the loader; the ratio of the two speeds, below what the table
has, is the network.

## Not modelled

- A GPU that is not full: figures of timm and NVIDIA have 128 to 256 images on a GPU. Below some 32 images a step takes
  longer than computed here; the batch ends the plan there anyway.
- Our operators: throughputs are those of timm's ResNeSt, and of its ratio to ResNet-50 on one RTX 3090.
- Stragglers, traffic of others, file systems, evaluation and checkpoints (seconds in an epoch).
- DropBlock, mixup and the agreement on a step, an all-reduce of a few bytes (its latency, once a step).
"""


@dataclass(frozen=True)
class Plan:
    """A recipe on some GPUs.

    Attributes:
        images, passes: of a step on each GPU; 0 if the batch cannot be dealt evenly.
        step: predicted; None without images.
        bandwidth: between nodes, in bytes/s, with which ranks wait for 5 % of their work; 0 on one node.
        per_node: images/s of a node.
        cores: CPU cores that a node needs for them.
        hours: of the whole run.
        ends: what decides.
    """

    images: int
    passes: int
    step: Step | None = None
    bandwidth: float = 0.0
    per_node: float = 0.0
    cores: float = 0.0
    hours: float = 0.0
    ends: str = "batch"


@dataclass(frozen=True)
class Rates:
    """Images/s that a CPU core loads with this project's loaders, by their names in docs/data_speed.json."""

    whole: dict[str, float]  # all of the ResNeSts' augmentation
    plain: dict[str, float]  # crop and flip alone


def read_rates() -> Rates:
    """Return the measured rates."""
    content = json.loads(DATA_SPEED.read_text())
    rates = {
        name.removeprefix("ours, "): statistics.median(loader["images_per_second"]) / content["workers"]
        for name, loader in content["loaders"].items()
        if name.startswith("ours, ")
    }
    whole = {name.partition(",")[0]: rate for name, rate in rates.items() if name.endswith("recipe=resnest")}
    return Rates(whole, {name: rates[name] for name in whole})


def plan_recipe(recipe: dict[str, Any], gpu: GPU, count: int, rate: float) -> Plan:
    """Return the plan of a recipe of classification.

    Args:
        recipe: an entry of the result's "recipes".
        gpu: of all nodes.
        count: GPUs.
        rate: images/s that a core loads.
    """
    images, passes = split_batch(recipe["global_batch"], count, recipe["batch_size"])
    if not images:
        return Plan(0, 0)
    seconds = images / scale_speed(gpu, recipe["network"], recipe["crop"])
    per_node = gpu.cluster.per_node
    load = images * per_node / (gpu.cores * rate)
    work = Work(seconds * FORWARD, seconds * (1 - FORWARD), 0.0, load, passes)
    buckets = [Bucket(**bucket) for bucket in recipe["buckets"]]
    step = predict_step(work, buckets, gpu.cluster, count)
    bandwidth = find_needed_bandwidth(work, buckets, gpu.cluster, count) if count > per_node else 0.0
    speed = images * passes * per_node / step.seconds
    steps = IMAGENET // recipe["global_batch"] * recipe["epochs"]
    wanted = images * passes * per_node / (step.compute + step.exposed)
    ends = "batch" if images * passes < FEW_IMAGES else step.bound
    return Plan(images, passes, step, bandwidth, speed, wanted / rate, steps * step.seconds / 3600, ends)


def compare_trials(result: dict[str, Any]) -> list[str]:
    """Return the table of predicted and measured steps of two ranks; parts are percent of the measured step."""
    lines = ["| network, images of a rank, crop | between ranks, GB/s | forward | backward | optimiser | loader "]
    lines[0] += "| all-reduce | of it added | predicted / measured |"
    lines += ["|---|---:|---:|---:|---:|---:|---:|---:|---|"]
    trials = result["trials"]
    # What gloo's all-reduce takes where nothing limits it is work of the cores: copies and sums.
    cores = max(one["link"]["bandwidth"] for trial in trials if not trial["rate"] for one in trial["rounds"])
    for trial in trials:
        work, link, predicted, measured = predict_trial(trial, trial["rounds"], cores)
        parts = (work.forward, work.backward, work.optimiser, work.load, predicted.all_reduce, predicted.exposed)
        shares = " | ".join(f"{100 * part / measured:.0f}" for part in parts)
        rounds = [predict_trial(trial, [one], cores) for one in trial["rounds"]]
        ratios = sorted(step.seconds / seconds for *_, step, seconds in rounds)
        ratio = f"{predicted.seconds / measured:.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        setting = f"{trial['network']}, {trial['images']}, {trial['crop']}"
        lines.append(f"| {setting} | {link.bandwidth / 1e9:.2f} | {shares} | {ratio} |")
    return lines


def predict_trial(
    trial: dict[str, Any], rounds: Sequence[dict[str, Any]], cores: float
) -> tuple[Work, Link, Step, float]:
    """Return the parts of a rank, its link, the step of two ranks that they predict, and a measured step's seconds.

    Whatever else runs on the machine only adds time: of each part and of the step, the fastest of the rounds counts.

    Args:
        trial: an entry of the result's "trials".
        rounds: of the trial.
        cores: bytes/s that an all-reduce sums where no network limits it.
    """
    work = Work(**{part: min(one["work"][part] for one in rounds) for part in rounds[0]["work"]})
    link = Link(min(one["link"]["latency"] for one in rounds), max(one["link"]["bandwidth"] for one in rounds))
    buckets = [Bucket(**bucket) for bucket in trial["buckets"]]
    share = min(1.0, link.bandwidth / cores) if trial["rate"] else 1.0
    step = predict_step(work, buckets, Cluster(2, link, link), 2, cpu_share=share)
    return work, link, step, min(one["step"] for one in rounds)


def list_gpus() -> Iterator[str]:
    """Yield the table of published speeds."""
    numbers = {name: number for number, name in enumerate(SOURCES, 1)}
    yield "| | ResNet-50, images/s | fp32 or TF32 | inside a node, GB/s | between nodes, GB/s | cores | sources |"
    yield "|---|---:|---:|---:|---:|---:|---|"
    for gpu in GPUS:
        links = f"{gpu.cluster.inside.bandwidth / 1e9:.0f} | {gpu.cluster.between.bandwidth / 1e9:.0f}"
        sources = ", ".join(f"[{numbers[name]}]" for name in gpu.sources)
        yield f"| {gpu.name} | {gpu.speed:.0f} | {gpu.speed / gpu.slower:.0f} | {links} | {gpu.cores} | {sources} |"


def describe_loaders(recipe: dict[str, Any], rates: Rates) -> str:
    """Return what a core loads, and the cores that the fastest node needs for a recipe with each loader."""
    gpu = GPUS[-1]
    texts = []
    for name, rate in rates.whole.items():
        cores = plan_recipe(recipe, gpu, 8, rate).cores
        texts.append(f"{rate:.0f} images/s by {name} ({rates.plain[name]:.0f} with crop and flip alone): {cores:.0f}")
    return wrap(
        f"A CPU core of this project's machine ([data_speed.json](data_speed.json)) loads with all of the ResNeSts' "
        f"augmentation {', or '.join(texts)} cores for eight {gpu.name.partition(' ')[0]} with {recipe['network']}, "
        f"of {gpu.cores}. The tables have the faster of the two; what a core of these nodes does is not known."
    )


def wrap(text: str, indent: str = "") -> str:
    """Return a paragraph in lines of a page."""
    return textwrap.fill(text, 120, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def list_recipes(recipes: Sequence[dict[str, Any]], gpu: GPU, counts: Sequence[int], rate: float) -> Iterator[str]:
    """Yield the table of some recipes on some numbers of a GPU."""
    yield (
        "| network, crop | GPUs | images x passes | compute, ms | all-reduce, ms | of it waited for | step, ms "
        "| network needed, GB/s | a node loads, images/s | cores for it | all nodes read, GB/s | hours | ends at |"
    )
    yield "|---|" + "---:|" * 11 + "---|"
    for recipe in recipes:
        for count in counts:
            plan = plan_recipe(recipe, gpu, count, rate)
            name = f"| {recipe['network']}, {recipe['crop']} | {count} |"
            if plan.step is None:
                yield f"{name} {recipe['global_batch']} images" + " |" * 10 + f" {plan.ends} |"
                continue
            step, nodes = plan.step, count // gpu.cluster.per_node
            times = " | ".join(f"{1e3 * t:.1f}" for t in (step.compute, step.all_reduce, step.exposed, step.seconds))
            needed = f"{plan.bandwidth / 1e9:.1f}" if plan.bandwidth else ""
            needed = "latency" if plan.bandwidth == math.inf else needed
            read = plan.per_node * nodes * JPEG_BYTES["imagenet"] / 1e9
            yield (
                f"{name} {plan.images} x {plan.passes} | {times} | {needed} | {plan.per_node:.0f} | {plan.cores:.0f} "
                f"| {read:.1f} | {plan.hours:.1f} | {plan.ends} |"
            )


def list_downstream() -> Iterator[str]:
    """Yield the table of detection and segmentation on eight V100, in fp32."""
    yield "| row | step of 16 images, s | from | images/s | MB/s from storage | hours |"
    yield "|---|---:|---|---:|---:|---:|"
    for (name, network), seconds in DETECTORS.items():
        yield _show_downstream(f"{name} {network}", seconds, "published", 90_000, JPEG_BYTES["coco"])
        other = network.replace("resnet", "resnest")
        derived = seconds + 2 * (_count_seconds(other) - _count_seconds(network))
        yield _show_downstream(f"{name} {other}", derived, "its backbone", 90_000, JPEG_BYTES["coco"])
    published = DEEPLAB[0] * 480 * 480 / DEEPLAB[1]  # a step at the recipe's crop, with ResNet-101
    for network, speed in INFERENCE.items():
        seconds = published * INFERENCE["resnet101"] / speed
        source = "published, by pixels" if network == "resnet101" else "by inference"
        yield _show_downstream(f"DeepLabV3 {network}", seconds, source, ADE20K // 16 * 120, JPEG_BYTES["ade20k"])


def _count_seconds(network: str) -> float:
    """Return the seconds of a backbone's passes for an image of 800 x 1333 on a V100 in fp32."""
    pixels = 800 * 1333 / 224**2
    return pixels * V100.slower / scale_speed(V100, network, 224)


def _show_downstream(row: str, seconds: float, source: str, steps: int, image: float) -> str:
    speed = 16 / seconds
    hours = steps * seconds / 3600
    return f"| {row} | {seconds:.2f} | {source} | {speed:.0f} | {speed * image / 1e6:.0f} | {hours:.1f} |"


def check_published(buckets: Sequence[Bucket]) -> Iterator[str]:
    """Yield the model's speed-up of ResNet-50 from one GPU to eight beside the published one."""
    published = {"V100 (DGX-1)": 8322 / 1200, "A100 (DGX A100)": 16621 / 2470, "H100 (DGX H100)": 22088 / 2791}
    yield "| eight GPUs over one, ResNet-50 | model | published |"
    yield "|---|---:|---:|"
    for gpu in GPUS:
        seconds = 256 / gpu.speed
        step = predict_step(Work(seconds * FORWARD, seconds * (1 - FORWARD), 0, 0), buckets, gpu.cluster, 8)
        yield f"| {gpu.name} | {8 * seconds / step.seconds:.2f} | {published[gpu.name]:.2f} |"


def write_page(result: dict[str, Any]) -> str:
    """Return docs/scaling.md."""
    rates, recipes = read_rates(), result["recipes"]
    whole, plain = max(rates.whole.values()), max(rates.plain.values())
    ours = [recipe for recipe in recipes if recipe["network"].startswith("resnest")]
    peers = [recipe for recipe in recipes if recipe not in ours]
    resnet50 = [Bucket(**bucket) for bucket in peers[0]["buckets"]]
    machine = ", ".join(f"{key} {value}" for key, value in result["machine"].items())
    lines = [
        *(INTRODUCTION, "## Two ranks on this machine", ""),
        TRIALS,
        *("", f"{machine}; each rank has one thread.", "", *compare_trials(result), "", "## Published speeds", ""),
        *(
            *list_gpus(),
            "",
            LATENCIES,
            "",
            describe_loaders(ours[0], rates),
            "",
            CHECK,
            "",
            *check_published(resnet50),
            "",
        ),
        *("## Table 3: the ResNeSts", "", COLUMNS),
    ]
    for gpu in GPUS:
        lines += ["", f"### {gpu.name}", "", *list_recipes(ours, gpu, COUNTS, whole)]
    lines += ["", "## Table 3: the peers", "", "On 8 H100, in mixed precision.", ""]
    missing = "There is no published figure for SKNet-101 and for the networks called fast."
    lines += [*list_recipes(peers, GPUS[-1], COUNTS, plain), "", missing]
    lines += ["", "## Tables 5, 6 and 7", "", DOWNSTREAM, "", *list_downstream()]
    lines += ["", ENDING.format(few=FEW_IMAGES), "## Sources", ""]
    lines += [wrap(f"{number}. {text}.", "   ") for number, text in enumerate(SOURCES.values(), 1)]
    return "\n".join(lines) + "\n"
