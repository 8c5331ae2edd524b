"""A run that is killed, or whose files are damaged: the same command resumes bit for bit."""

import contextlib
import itertools
import os
import random
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from faults.harness import RICH, Place, Trainer, newest, read_status, require, require_equal_runs


def survive_kill(place: Place) -> dict[str, Any]:
    """Kill -9 at random moments in the middle of epochs: weights, average, optimiser and metrics as without."""
    settings = [(*each, 6) for each in itertools.product(("dali", "torchvision"), (1, 2), ("fp32", "bf16"))]
    # With three ranks the order in which gradients are added matters.
    settings.append(("dali", 3, "fp32", 4))
    kills = 2 if place.fast else 5
    for loader, ranks, precision, steps_per_epoch in settings[3:4] if place.fast else settings:
        options = (*RICH, *place.of_stages, f"loader={loader}", f"train.precision={precision}")
        options += ("checkpoint.every_steps=2", "log.every_steps=1", "train.epochs=3")
        options += ("train.global_batch=24",) if ranks == 3 else ()
        whole, killed = place.new_run(), place.new_run()
        require(Trainer(place, whole, *options, ranks=ranks).wait() == [0] * ranks, f"{whole} ends well")
        rng = random.Random(f"{loader} {ranks} {precision}")
        within = [step for step in range(1, 3 * steps_per_epoch) if step % steps_per_epoch]
        for step in sorted(rng.sample(within, kills)):
            trainer = Trainer(place, killed, *options, ranks=ranks, faults=place.pace)
            epoch, number = divmod(step, steps_per_epoch)
            trainer.wait_for(f"epoch {epoch + 1}/3, step {number}/")
            time.sleep(rng.random() * 0.1)
            trainer.kill()
        require(Trainer(place, killed, *options, ranks=ranks).wait() == [0] * ranks, f"{killed} ends well")
        require_equal_runs(whole, killed)
    return {"settings": 1 if place.fast else len(settings), "kills_each": kills}


def survive_kill_in_write(place: Place) -> dict[str, Any]:
    """Kill -9 inside the writing of a checkpoint: nothing is lost that was written before, and nothing is left over."""
    rng = random.Random(2)
    options = ("checkpoint.every_steps=1", "checkpoint.keep=2", "train.ema_decay=0.9", "train.epochs=10", "loader=dali")
    moments = [("bytes", rng.random()) for _ in range(14)]
    moments += [(where, 0.0) for where in ("before_rename", "after_rename", "before_removal") for _ in range(2)]
    if place.fast:
        moments = moments[13::2]  # one of each kind
    rng.shuffle(moments)
    whole, killed = place.new_run(), place.new_run()
    require(Trainer(place, whole, *options).wait() == [0], f"{whole} ends well")
    recovered, step = 0, 0
    for where, share in moments:
        write = rng.randint(2, 3)  # of the files of this attempt
        trainer = Trainer(place, killed, *options, faults=[("killed_in_write", [where, write, share])])
        require(trainer.wait() == [-9], f"killed {where}:\n{trainer.output}")
        newest_step = int(newest(killed).stem.partition("-")[2])
        # Not beyond it where best.pt was being written.
        require(
            newest_step >= step, f"after a kill at {where} the newest checkpoint is of step {newest_step}, not {step}"
        )
        recovered, step = recovered + 1, newest_step
        require("going back to" not in trainer.output, f"a damaged checkpoint:\n{trainer.output}")
    trainer = Trainer(place, killed, *options)
    require(trainer.wait() == [0], f"{killed} ends well")
    require(f"resuming after step {step}," in trainer.output, "the last checkpoint is the one that was used")
    require_equal_runs(whole, killed)
    names = sorted(path.name for path in killed.rglob("*") if path.is_file() and "events" not in path.name)
    names = [name for name in names if name != "suspects.txt"]  # of the attempts that were killed
    require(names == sorted({path.name for path in whole.rglob("*") if path.is_file()} - _events(whole)), f"{names}")
    return {"recovered": recovered, "of": len(moments)}


def _events(run: Path) -> set[str]:
    return {path.name for path in (run / "tensorboard").iterdir()}


def fall_back(place: Place) -> dict[str, Any]:
    """The newest checkpoint is damaged: that is said, the one before is used, and never a fresh start."""
    options = (*RICH, "loader=torchvision", "checkpoint.every_steps=4")
    whole = place.new_run()
    require(Trainer(place, whole, *options).wait() == [0], f"{whole} ends well")
    stopped = place.new_run()
    trainer = Trainer(place, stopped, *options, faults=[("killed", [1, 6])])
    require(trainer.wait() == [-9], f"{stopped} is killed:\n{trainer.output}")
    good = newest(stopped).read_bytes()
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 1
    damages = {
        "flipped bit": bytes(flipped),
        "truncated": good[: len(good) // 3],
        "empty": b"",
        "HTML page": b"<html><body>502 Bad Gateway</body></html>",
    }
    for name, content in damages.items():
        run = place.new_run()
        subprocess.run(["cp", "-r", stopped, run], check=True)
        newest(run).write_bytes(content)
        trainer = Trainer(place, run, *options)
        require(trainer.wait() == [0], f"{name}: {trainer.output}")
        require("WARNING: " in trainer.output and "going back to the checkpoint" in trainer.output, f"{name} is said")
        require("resuming after step 6, 1 epochs done" in trainer.output, f"{name}: the one before is used")
        for damaged in run.rglob("*.damaged"):
            damaged.unlink()
        require_equal_runs(whole, run)
    run = place.new_run()
    subprocess.run(["cp", "-r", stopped, run], check=True)
    for path in (run / "checkpoints").glob("step-*.pt"):
        path.write_bytes(b"")
    for _ in range(2):  # the second time there are none but damaged ones
        trainer = Trainer(place, run, *options)
        require(trainer.wait() == [4], f"no fresh start where all are damaged:\n{trainer.output}")
    return {"detected": len(damages), "of": len(damages)}


def keep_within_storage(place: Place) -> dict[str, Any]:
    """A full disk, a read-only folder, a folder in use: one line, exit code 6 or 2, and the last checkpoint is good."""
    options: tuple[str, ...] = ("loader=dali", "checkpoint.every_steps=2")
    if place.is_tiny:  # other files are as large as its checkpoints
        options += ("log.trackers=[]",)
    whole, run = place.new_run(), place.new_run()
    require(Trainer(place, whole, *options).wait() == [0], f"{whole} ends well")
    require(Trainer(place, run, *options, faults=[("killed", [0, 4])]).wait() == [-9], f"{run} is killed")
    full = Trainer(place, run, *options, faults=[("has_full_disk", [newest(run).stat().st_size // 2])])
    require(full.wait() == [6], f"no file may become large enough: exit code 6\n{full.output}")
    require(full.output.count("cannot be written (File too large)") == 1, f"one line:\n{full.output}")
    require("Traceback" not in full.output, full.output)
    kinds = 1
    require(Trainer(place, run, *options).wait() == [0], "resumes when there is room")
    require_equal_runs(whole, run)

    # A checkpoint of 17 MB fits, or one of 12 KB: a second one does not.
    with _mounted(place, "size=44k" if place.is_tiny else "size=24m") as disk:
        if disk:
            on_disk = Trainer(place, disk / "run", *options, "checkpoint.every_steps=1")
            require(on_disk.wait() == [6], f"a full disk: exit code 6\n{on_disk.output}")
            require(on_disk.output.count("(No space left on device)") == 1, on_disk.output)
            require(read_status(disk / "run")["exit_code"] in (6, None), "status.json says so, where it has room")
            kinds += 1
    with _mounted(place, "size=200m") as disk:
        if disk:
            subprocess.run(["cp", "-r", run, disk / "run"], check=True)
            subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
            read_only = Trainer(place, disk / "run", *options)
            require(read_only.wait() == [2], f"a read-only folder: exit code 2\n{read_only.output}")
            require(read_only.output.count("cannot be written (Read-only file system)") == 1, read_only.output)
            kinds += 1

    used = place.new_run()
    first = Trainer(place, used, *options, faults=[("hangs", [1, 6])])
    first.wait_for("epoch 2/2, step 3/")
    second = Trainer(place, used, *options)
    require(second.wait() == [2], f"a folder in use: exit code 2\n{second.output}")
    require(f"is in use by process {first.processes[0].pid} on " in second.output, second.output)
    require(read_status(used)["state"] == "running", "the first run's status is its own")
    first.kill()
    require(Trainer(place, used, *options).wait() == [0], "a lock whose holder was killed is free at once")
    require_equal_runs(whole, used)
    return {"refused": kinds + 1}


@contextlib.contextmanager
def _mounted(place: Place, options: str) -> Iterator[Path | None]:
    """Mount a small file system; None where this process may not."""
    disk = place.folder / f"disk-{options.partition('=')[2]}"
    disk.mkdir()
    may = (
        os.geteuid() == 0
        and not subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", disk], check=False, capture_output=True
        ).returncode
    )
    try:
        yield disk if may else None
    finally:
        if may:
            subprocess.run(["umount", disk], check=True)
