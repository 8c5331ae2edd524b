"""Segmentation under the same run: killed in the middle of an epoch, and scenes that cannot be used."""

from typing import Any

from faults.harness import Command, Place, newest, require, require_equal_runs
from resnest_imagenet.checkpoint import load_checkpoint
from resnest_imagenet.data.demo_scenes import write_demo_scenes

SMALL = ("+experiment=demo_segmentation", "device=cpu", "train.epochs=2", "train.crop=64", "train.batch_size=2")
SMALL += ("train.global_batch=4", "train.blur=0.5", "train.ema_decay=0.9", "loader.workers=1", "log.every_steps=1")
SMALL += ("timeout_seconds=60",)


def resume_scenes(place: Place) -> dict[str, Any]:
    """Segmentation killed in the middle of an epoch ends as without; a mask that is damaged is named, or replaced."""
    scenes = place.folder / "scenes"
    write_demo_scenes(scenes, seed=0, train_scenes=19, val_scenes=3)
    options = (*SMALL, f"data.root={scenes}", "checkpoint.every_steps=1")
    settings = ((1, "fp32"), (2, "fp32"), (1, "bf16"))
    for ranks, precision in settings:
        whole, killed = (f"run_dir={place.new_run()}" for _ in range(2))
        chosen = (*options, f"train.precision={precision}")
        complete = Command(place, "train", *chosen, whole, ranks=ranks)
        require(complete.wait() == [0] * ranks, f"{whole} ends well\n{complete.output}")
        trainer = Command(place, "train", *chosen, killed, ranks=ranks, faults=[("killed", [1, 3])])
        require(-9 in trainer.wait(), f"{killed} is killed\n{trainer.output}")
        folders = [place.folder / each.rpartition("/")[2] for each in (whole, killed)]
        step = load_checkpoint(newest(folders[1]))["step"]
        require(step == 5, f"the last checkpoint is of the step before, not of step {step}")
        again = Command(place, "train", *chosen, killed, ranks=ranks)
        require(again.wait() == [0] * ranks, f"{killed} ends well\n{again.output}")
        require_equal_runs(*folders)
        for name in ("iou.csv", "scenes.csv"):
            same = (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()
            require(same, f"{name} differs")
    bad = sorted((scenes / "masks/train").glob("*.png"))[3]
    bad.write_bytes(bad.read_bytes()[:100])
    for on_error, code, words in (("raise", 3, ""), ("substitute", 0, "replaced by")):
        run = f"run_dir={place.new_run()}"
        trainer = Command(place, "train", *options, run, f"data.on_error={on_error}")
        require(trainer.wait() == [code], f"{on_error}: exit code {code}\n{trainer.output}")
        lines = [line for line in trainer.lines if bad.name in line and words in line]
        require(len(lines) == 1 and "Traceback" not in trainer.output, f"{bad.name} is named once\n{trainer.output}")
    return {"settings": len(settings), "bad_masks": 2}
