"""Does Table 3's order hold? Its 50-layer networks under one recipe, on a small data set that a GPU trains in minutes.

python tools/gpu/order.py DATA OUT [--epochs 12 --crop 96 --seeds 0 1 --minutes 9 --device cuda]

DATA: train/ and test/ with a folder for each class, such as CIFAR-10 as JPEGs. Stopped or out of minutes, the same call
resumes where it was. Prints a table and writes OUT/order.json with the curves once every run is finished.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

REPOSITORY = Path(__file__).parents[2]
MODELS = (
    "resnet50",
    "seresnext50_32x4d",
    "skresnext50_32x4d",
    "resnet50d",
    "resnest50_fast_2s1x64d",
    "resnest50",
)


def _is_finished(run_dir: Path) -> bool:
    status = run_dir / "status.json"
    return status.exists() and json.loads(status.read_text())["state"] == "finished"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--crop", type=int, default=96)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--minutes", type=float, default=9)
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    deadline = time.monotonic() + 60 * args.minutes
    runs = {(model, seed): args.out / f"{model}-{seed}" for seed in args.seeds for model in MODELS}
    for (model, seed), run_dir in runs.items():
        command = [
            *(sys.executable, "-m", "resnest_imagenet.commands.train", f"+experiment={model}", "recipe=resnest"),
            *(f"data.root={args.data.resolve()}", "data.val_dir=test", f"run_dir={run_dir}", f"seed={seed}"),
            *(f"train.epochs={args.epochs}", f"train.crop={args.crop}", f"train.batch_size={args.batch}"),
            # On such small maps DropBlock drops four times its probability: without it.
            *(
                "train.global_batch=null",
                "train.dropblock=0",
                "train.warmup_epochs=1",
                f"device={args.device}",
                "train.precision=bf16",
            ),
        ]
        if _is_finished(run_dir):
            continue
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY / "src"), "OMP_WAIT_POLICY": "PASSIVE"}
        try:
            subprocess.run(command, env=environment, check=True, timeout=deadline - time.monotonic())
        except subprocess.TimeoutExpired:
            sys.exit(f"{args.minutes} minutes are over in {run_dir}: call again to resume")

    results = []
    for (model, seed), run_dir in runs.items():
        events = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        curve = [event["top1"] for event in events if event["event"] == "eval"]
        speed = max(event["images_per_s"] for event in events if event["event"] == "train")
        results.append({"model": model, "seed": seed, "top1": curve, "images_per_s": speed})
    device = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    setting = {"device": device, "torch": torch.__version__, "epochs": args.epochs, "crop": args.crop}
    content = {**setting, "batch": args.batch, "data": args.data.name, "results": results}
    (args.out / "order.json").write_text(json.dumps(content, indent=2) + "\n")
    print(f"{'model':<24}{'top-1 after the last epoch, by seed':<40}{'mean':>7}{'images/s':>10}")
    for model in MODELS:
        own = [result for result in results if result["model"] == model]
        last = [result["top1"][-1] for result in own]
        by_seed = "  ".join(f"{top1:.2f}" for top1 in last)
        print(f"{model:<24}{by_seed:<40}{statistics.mean(last):>7.2f}{own[0]['images_per_s']:>10.0f}")


if __name__ == "__main__":
    main()
