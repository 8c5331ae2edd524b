"""Images behind a storage that fails, and names that look like images' but are none."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from faults.harness import LOADERS, Claims, Command, Place, Trainer, newest, require, require_equal_runs
from resnest_imagenet.checkpoint import load_checkpoint

KINDS = ("a pipe", "a socket", "a link to /dev/zero", "a link to a pipe")


def name_what_is_no_file(place: Place) -> dict[str, Any]:
    """A pipe, a socket or a link to /dev/zero among the images is named by both loaders, check and predict: no hang."""
    claims = Claims()
    data, trained = place.folder / "set", place.new_run()
    for part in ("train", "val"):
        for label in ("ring", "square"):
            (data / part / label).mkdir(parents=True)
            for number, path in enumerate(sorted((place.data / "train" / label).iterdir())[:8]):
                os.link(path, data / part / label / f"{number}.JPEG")
    options = (f"data.root={data}", "train.epochs=1", "train.warmup_epochs=0")
    if not place.fast:
        require(Trainer(place, trained, *options).wait() == [0], f"{trained} ends well")
    for kind in KINDS[:1] if place.fast else KINDS:
        with _plant(data / "train/ring", kind) as path:
            commands = [Trainer(place, place.new_run(), *options, f"loader={loader}") for loader in LOADERS]
            commands.append(Command(place, "data", "check", f"data.root={data}", "workers=1"))
            if not place.fast:
                ckpt = f"ckpt={trained}/checkpoints/best.pt"
                commands.append(Command(place, "predict", ckpt, f"images={data}/train", "crop=32", "device=cpu"))
            for name, command in zip((*LOADERS, "check", "predict"), commands, strict=False):
                claims.add(
                    command.wait() == [3], f"{kind}, {name}: exit code {command.wait()}, not 3: {command.output}"
                )
                is_named = "train/ring/bad.JPEG" in command.output and "not a file" in command.output
                claims.add(is_named, f"{kind}, {name}: not named: {command.output}")
                claims.add("Traceback" not in command.output, f"{kind}, {name}: {command.output}")
            if not place.fast:
                others = commands[-1].output.count(".JPEG\n")
                claims.add(others == 16, f"{kind}, predict: {others} of the 16 others: {commands[-1].output}")
        require(not path.exists(), f"{path} is gone")
    claims.require()
    return {"kinds": 1 if place.fast else len(KINDS), "claims": claims.number}


@contextmanager
def _plant(folder: Path, kind: str) -> Iterator[Path]:
    path, pipe = folder / "bad.JPEG", folder.parents[1] / "pipe"
    with socket.socket(socket.AF_UNIX) as server:
        if kind == "a socket":
            before = Path.cwd()
            os.chdir(folder)  # a socket's name may be no longer than 107 bytes
            server.bind(path.name)
            os.chdir(before)
        elif kind == "a pipe":
            os.mkfifo(path)
        elif kind == "a link to a pipe":
            os.mkfifo(pipe)
            path.symlink_to(pipe)
        else:
            path.symlink_to("/dev/zero")
        yield path
    path.unlink()
    pipe.unlink(missing_ok=True)


def survive_storage_errors(place: Place) -> dict[str, Any]:
    """Storage errors that pass change nothing; those that stay replace no image and end the run, with a checkpoint."""
    errors = ("EIO", "ESTALE", "EMFILE")
    for loader in LOADERS:
        options = (f"loader={loader}", "data.on_error=substitute", "checkpoint.every_steps=100")
        whole = place.new_run()
        require(Trainer(place, whole, *options).wait() == [0], f"{whole} ends well")
        for error in errors:
            run = place.new_run()
            # Some images fail twice in the first epoch, and for ever in the second, which they are wanted in again.
            faults = [("has_failing_storage", [error, 2, 1]), ("has_failing_storage", [error, 99, 2])]
            trainer = Trainer(place, run, *options, faults=faults)
            _judge(trainer, f"{loader}, {error}", ".JPEG: cannot be read (")
            step = load_checkpoint(newest(run))["step"]
            require(6 <= step < 12, f"a checkpoint of the second epoch, not of step {step}")
            require(Trainer(place, run, *options).wait() == [0], f"{run} resumes")
            require_equal_runs(whole, run)
    run = place.new_run()
    _judge(Trainer(place, run, *options, faults=[("loses_worker", [1, 2])]), "a worker is killed", "loader.workers=0")
    require(Trainer(place, run, *options).wait() == [0], f"{run} resumes")
    require_equal_runs(whole, run)
    return {"errors": len(LOADERS) * len(errors), "lost_workers": 1}


def _judge(trainer: Trainer, what: str, words: str) -> None:
    require(trainer.wait() == [6], f"{what}: exit code {trainer.wait()}, not 6: {trainer.output}")
    require(words in trainer.lines[-1], f"{what}: named last: {trainer.output}")
    require("replaced by" not in trainer.output and "Traceback" not in trainer.output, f"{what}: {trainer.output}")
