"""What no CPU can show: training on CUDA by the real commands, and the step against timm's.

python tools/gpu/measure.py OUT [--images DIR] [--device cuda]      (--device cpu tries the script itself)

Writes the demo images to OUT, then runs resnest-train on them for each loader, precision and compilation, one rank
under torchrun (NCCL), runs that are stopped and resumed, resnest-eval for each loader and of odd images, segmentation,
detection, and of tools/benchmarks bench.py and, on photographs, parity.py and bench_data.py. Prints a table last and
writes OUT/gpu.json.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from PIL import Image

REPOSITORY = Path(__file__).parents[2]
COMMANDS = "resnest_imagenet.commands"
FIRST = "dali-fp32/checkpoints/best.pt"  # the network of the first run
ODD_KINDS = (  # and modes, as Pillow calls them
    *(("PNG", mode) for mode in ("RGB", "P", "LA", "1")),
    *(("JPEG", mode) for mode in ("CMYK", "L")),
    *((kind, "RGB") for kind in ("WEBP", "TIFF", "BMP")),
)


def run(module: str, *arguments: str, torchrun: bool = False) -> tuple[int, float, str]:
    """Run a module of ours; return its exit code, seconds and the end of its output."""
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node=1", "-m"] if torchrun else []
    started = time.perf_counter()
    result = subprocess.run(
        [sys.executable, "-m", *launcher, module, *arguments],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY / "src"), "OMP_WAIT_POLICY": "PASSIVE"},
        capture_output=True,
        check=False,
        text=True,
    )
    return result.returncode, time.perf_counter() - started, (result.stdout + result.stderr)[-2000:]


def summarise(run_dir: Path) -> dict[str, float]:
    """Read a run's last accuracy and its speed and data wait, without the first report (start-up)."""
    events = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    train = [e for e in events if e["event"] == "train"][1:]
    return {
        **[{e["metric"]: e[e["metric"]]} for e in events if e["event"] == "eval"][-1],
        "images_per_s": max(e["images_per_s"] for e in train),
        "data_wait": sorted(e["data_wait"] for e in train)[len(train) // 2],
    }


def compare_resumed(out: Path, *options: str, experiment: str = "demo") -> dict[str, object]:
    """Stop a run in the middle of its second epoch and resume it; say whether it ends as one that was left alone."""
    runs = [out / "whole", out / "stopped"]
    command = [sys.executable, "-m", f"{COMMANDS}.train", f"+experiment={experiment}", "train.epochs=3", *options]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY / "src"), "OMP_WAIT_POLICY": "PASSIVE"}
    resume = [*command, f"run_dir={runs[1]}"]
    with subprocess.Popen([*command, f"run_dir={runs[0]}"], env=environment, stdout=subprocess.DEVNULL) as whole_run:
        try:
            with subprocess.Popen(resume, env=environment, stdout=subprocess.PIPE, text=True) as stopped:
                assert stopped.stdout
                for line in stopped.stdout:
                    if line.startswith("epoch 2/3"):
                        stopped.terminate()
            subprocess.run(resume, env=environment, check=True, stdout=subprocess.DEVNULL)
        except BaseException:
            whole_run.terminate()
            raise
    if whole_run.returncode:
        raise RuntimeError(f"{runs[0]}: exit {whole_run.returncode}")
    whole, resumed = (
        torch.load(max((run / "checkpoints").glob("step-*.pt")), map_location="cpu", weights_only=True)["model"]
        for run in runs
    )
    largest = max(float((whole[name] - resumed[name]).abs().max()) for name in whole)
    return {
        "case": f"{experiment}, stopped and resumed: {' '.join(options[2:])}",
        "exit": stopped.returncode,
        "difference": largest,
    }


def train_downstream(out: Path, device: str, task: str, figure: str, protocols: tuple[str, ...]) -> list[dict]:
    """Train and evaluate the demo of another task, from the first run's network."""
    data = out / task
    run(f"{COMMANDS}.data", "demo", f"task={task}", f"out={data}")
    common = (f"data.root={data}", f"device={device}")
    start = (f"+experiment=demo_{task}", *common, f"train.init_from={out / FIRST}")
    rows = []
    for precision, torchrun in (("fp32", False), ("bf16", False), ("bf16", True)):
        run_dir = out / f"{task}-{precision}{'-torchrun' * torchrun}"
        options = (f"run_dir={run_dir}", f"train.precision={precision}")
        code, seconds, tail = run(f"{COMMANDS}.train", *start, *options, torchrun=torchrun)
        row = {"case": run_dir.name, "exit": code, "seconds": seconds}
        rows.append(row | (summarise(run_dir) if code == 0 else {"output": tail}))
        print(rows[-1], flush=True)
    for protocol in protocols:
        result = out / f"{task}-{protocol}.json"
        checkpoint = f"ckpt={out / f'{task}-fp32/checkpoints/best.pt'}"
        code, seconds, tail = run(f"{COMMANDS}.evaluate", checkpoint, *common, f"protocol={protocol}", f"out={result}")
        value = json.loads(result.read_text())["results"][0][figure] if code == 0 else tail
        rows.append({"case": f"eval of {task}, {protocol}", "exit": code, "seconds": seconds, figure: value})
        print(rows[-1], flush=True)
    for fixed in ("false", "true"):
        options = (*common, f"train.deterministic={fixed}")
        rows.append(compare_resumed(out / f"{task}-resumed-{fixed}", *options, experiment=f"demo_{task}"))
        print(rows[-1], flush=True)
    return rows


def look(out: Path, device: str) -> list[dict]:
    """Run the commands that look at the first run's network."""
    images = next((out / "demo/val").iterdir())
    common = (f"ckpt={out / FIRST}", f"images={images}", "crop=56", "precision=bf16")
    rows = []
    for command, options in (
        ("predict", (*common, f"out={out / 'predicted.csv'}")),
        ("explain", (*common, f"out={out / 'explained'}")),
        ("info", ("models=[resnet50,resnest50,resnest50_fast_2s1x64d]", "batch_size=128", "precision=bf16")),
        ("report", (f"runs={out / 'dali-fp32'}", f"out={out / 'report.html'}")),
    ):
        code, seconds, tail = run(f"{COMMANDS}.{command}", *options, f"device={device}")
        rows.append({"case": command, "exit": code, "seconds": seconds, "output": tail})
        print(rows[-1], flush=True)
    return rows


def evaluate_odd(out: Path, data: Path, checkpoint: Path, device: str) -> list[dict]:
    """Evaluate images that are no plain JPEGs, then with one that is no image: DALI decodes the former in several ways.

    The loaders agree on the accuracy (exit 0), and name the latter (exit 3).
    """
    folder = out / "odd"
    shutil.copytree(data / "val", folder / "val")
    files = sorted(folder.glob("val/*/*"))
    for number, file in enumerate(files):
        with Image.open(file) as image:
            kind, mode = ODD_KINDS[number % len(ODD_KINDS)]
            image.convert(mode).save(file, kind)
    rows = []
    for what in ("odd images", "a web page"):
        if what == "a web page":
            files[0].write_text("<html>not found</html>")
        for loader in ("dali", "torchvision"):
            result = out / "odd.json"
            options = (f"ckpt={checkpoint}", f"data.root={folder}", f"loader={loader}", f"device={device}")
            code, seconds, tail = run(f"{COMMANDS}.evaluate", *options, "batch_size=64", f"out={result}")
            top1 = json.loads(result.read_text())["results"][0]["top1"] if code == 0 else tail
            rows.append({"case": f"eval of {what}, {loader}", "exit": code, "seconds": seconds, "top1": top1})
            print(rows[-1], flush=True)
    return rows


def print_table(rows: list[dict]) -> None:
    print(f"{'case':<60}{'exit':>5}{'result':>16}{'images/s':>10}{'data wait':>10}")
    for row in rows:
        speed, wait = row.get("images_per_s"), row.get("data_wait")
        columns = f"{speed:>10.0f}{wait:>10.1%}" if speed is not None else ""
        value = next((row[name] for name in ("top1", "miou", "difference") if name in row), "-")
        print(f"{row['case']:<60}{row['exit']:>5}{value!s:>16}{columns}")


def list_cases(device: str) -> list[tuple[str, str, list[str], bool]]:
    """Return the runs of the demo: loader, precision, options, and whether under torchrun (NCCL)."""
    accumulate = ["train.batch_size=16", "train.global_batch=32"]
    compiled = ["train.compile=true"]
    augmented = ["train.policy=resnest", "train.jitter=0.4", "train.lighting=0.1", "train.cutmix_alpha=1.0"]
    cases: list[tuple[str, str, list[str], bool]] = [
        *((loader, precision, [], False) for loader in ("dali", "torchvision") for precision in ("fp32", "bf16")),
        ("dali", "fp16", accumulate, False),
        ("dali", "bf16", compiled, False),
        ("dali", "bf16", ["train.crop=112", "train.dropblock=0.1", *compiled], False),
        *((loader, "bf16", augmented, False) for loader in ("dali", "torchvision")),
        ("dali", "bf16", [], True),
        ("dali", "fp16", compiled + accumulate, True),
    ]
    # A CPU emulates fp16: minutes a step.
    return [case for case in cases if device != "cpu" or case[1] != "fp16"]


def train_cases(out: Path, data: Path, device: str, epochs: int) -> list[dict]:
    """Train the demo in every case."""
    rows = []
    for loader, precision, overrides, torchrun in list_cases(device):
        name = " ".join([loader, precision, *overrides, *["torchrun"] * torchrun]).replace("train.", "")
        run_dir = out / name.replace(" ", "-").replace("=", "-")
        code, seconds, tail = run(
            f"{COMMANDS}.train",
            *("+experiment=demo", f"data.root={data}", f"run_dir={run_dir}", f"device={device}"),
            *(f"loader={loader}", f"train.precision={precision}", f"train.epochs={epochs}", *overrides),
            torchrun=torchrun,
        )
        row = {"case": name, "exit": code, "seconds": seconds}
        rows.append(row | (summarise(run_dir) if code == 0 else {"output": tail}))
        print(rows[-1], flush=True)
    return rows


def resume_demo(out: Path, data: Path, device: str) -> list[dict]:
    """Compare runs that were stopped and resumed with whole ones; a difference of 0 is bit for bit."""
    rows = []
    for precision, fixed in (("fp32", "false"), ("fp32", "true"), ("bf16", "true")):
        options = (f"data.root={data}", f"device={device}", f"train.precision={precision}", "loader=dali")
        rows.append(compare_resumed(out / f"resumed-{precision}-{fixed}", *options, f"train.deterministic={fixed}"))
        print(rows[-1], flush=True)
    return rows


def evaluate_demo(out: Path, data: Path, device: str) -> list[dict]:
    """Evaluate the first run's network through each loader."""
    rows = []
    for loader in ("dali", "torchvision"):
        result = out / f"eval-{loader}.json"
        code, seconds, tail = run(
            f"{COMMANDS}.evaluate",
            *(f"ckpt={out / FIRST}", f"data.root={data}", "crop=[56,64]", f"loader={loader}"),
            *(f"device={device}", f"out={result}"),
        )
        tops = [r["top1"] for r in json.loads(result.read_text())["results"]] if code == 0 else tail
        rows.append({"case": f"eval {loader}", "exit": code, "seconds": seconds, "top1": tops})
        print(rows[-1], flush=True)
    return rows


def run_benchmarks(out: Path, device: str, images: Path | None) -> None:
    """Run bench.py, and on photographs parity.py and bench_data.py: what DALI makes of them, and how fast."""
    tools, environment = REPOSITORY / "tools/benchmarks", {**os.environ, "PYTHONPATH": str(REPOSITORY / "src")}
    size = "--batch 128 --rounds 20 --compile" if device == "cuda" else "--batch 2 --crop 64 --rounds 1"
    options = [*size.split(), "--device", device, "--precision", "bf16", "--out", str(out / "bench.json")]
    subprocess.run([sys.executable, str(tools / "bench.py"), *options], env=environment, check=False)
    cores = str(len(os.sched_getaffinity(0)))
    loaders = ["--device", device, "--workers", cores, "--out", str(out / "bench_data.json")]
    for tool, options in (("parity", ["--device", device]), ("bench_data", loaders)) if images else ():
        with (out / f"{tool}.txt").open("w") as log:
            command = [sys.executable, str(tools / f"{tool}.py"), str(images), *options]
            subprocess.run(command, env=environment, stdout=log, stderr=subprocess.STDOUT, check=False)
        print((out / f"{tool}.txt").read_text())


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--images", type=Path, help="photographs, DIR/<class>/<image>: for parity.py and bench_data.py")
    args = parser.parse_args()
    out, device = args.out.resolve(), args.device
    out.mkdir(parents=True, exist_ok=True)
    data = out / "demo"
    run(f"{COMMANDS}.data", "demo", f"out={data}")
    rows = [
        *train_cases(out, data, device, args.epochs),
        *resume_demo(out, data, device),
        *evaluate_demo(out, data, device),
        *evaluate_odd(out, data, out / FIRST, device),
        *look(out, device),
        *train_downstream(out, device, "segmentation", "miou", ("whole", "published")),
        *train_downstream(out, device, "detection", "box_ap", ("coco",)),
    ]
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    machine = {"device": name, "torch": torch.__version__, "python": sys.version.split()[0]}
    (out / "gpu.json").write_text(json.dumps({"machine": machine, "rows": rows}, indent=2) + "\n")
    run_benchmarks(out, device, args.images)
    print(machine)
    print_table(rows)


if __name__ == "__main__":
    main()
