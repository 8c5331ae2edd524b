"""A run folder that is not as its run has left it, and commands that are of another run."""

import shutil
from pathlib import Path
from typing import Any

from faults.harness import Place, Trainer, require, require_equal_runs

OPTIONS = ("loader=dali", "train.epochs=1", "train.warmup_epochs=0", "train.ema_decay=0.9", "checkpoint.every_steps=2")
TYPING_ERRORS = {"train.precision=bf16": 4, "train.epochs=20": 4, "seed=1": 4, "data.root=/nowhere": 3}
MOVES = 8  # of what a run leaves, and of the folder that it is moved to


def lose_nothing(place: Place) -> dict[str, Any]:
    """Checkpoints moved away, a run killed while it is set aside, damaged metrics, a mistyped command: all is kept."""
    whole = place.new_run()
    require(Trainer(place, whole, *OPTIONS).wait() == [0], f"{whole} ends well")
    damages = _read_damaged_metrics(place, whole)
    moments = [MOVES - 1] if place.fast else list(range(1, MOVES + 1))
    for moment in moments:
        _set_aside(place, whole, moment)
    if not place.fast:  # tests/training has these, in one process
        _take_no_notice_of_other_commands(place, whole)
        _miss_checkpoints(place, whole)
    return {"damages": damages, "moments": len(moments)}


def _list_files(run: Path) -> dict[str, tuple[bytes, int]]:
    """Return content and time of all files of a run, but for those about the last start."""
    files = [path for path in run.rglob("*") if path.is_file() and path.name not in ("lock", "failed_start.json")]
    return {str(path.relative_to(run)): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def _copy(place: Place, run: Path) -> Path:
    return Path(shutil.copytree(run, place.new_run()))


def _read_damaged_metrics(place: Place, whole: Path) -> int:
    run = place.new_run()
    trainer = Trainer(place, run, *OPTIONS, faults=[("killed", [0, 9])])
    require(trainer.wait() == [-9], f"{run} is killed:\n{trainer.output}")
    metrics = run / "metrics.jsonl"
    lines = metrics.read_bytes().splitlines(keepends=True)
    damages = [bytes(4096) + b"\n", b"\xff\xfe\n", b"<html>\n", lines[0][:30] + lines[0]]
    metrics.write_bytes(b"".join([*damages, *lines[1:]]))
    predictions = run / ("answers.csv" if place.is_tiny else "predictions.csv")  # TinyTask's
    predictions.mkdir()
    (run / "trackers.json").write_bytes(bytes(100))
    trainer = Trainer(place, run, *OPTIONS)
    require(trainer.wait() == [0], f"resumes in spite of its metrics:\n{trainer.output}")
    moved = f"WARNING: {metrics}: damaged lines moved to metrics.jsonl.damaged: {len(damages)}"
    require(trainer.output.count(moved) == 1, f"says so once:\n{trainer.output}")
    damaged = run / "metrics.jsonl.damaged"
    require(damaged.read_bytes() == b"".join(damages), "keeps the damaged lines")
    for path in (damaged, predictions.with_name(f"{predictions.name}.damaged")):
        path.unlink() if path.is_file() else path.rmdir()
    require_equal_runs(whole, run)
    return len(damages)


def _take_no_notice_of_other_commands(place: Place, whole: Path) -> None:
    run = _copy(place, whole)
    before = _list_files(run)
    for option, code in TYPING_ERRORS.items():
        trainer = Trainer(place, run, *OPTIONS, option)
        require(trainer.wait() == [code], f"{option}: exit code {code}\n{trainer.output}")
        require(_list_files(run) == before, f"{option} changes nothing of a finished run")
    trainer = Trainer(place, run, *OPTIONS)
    require(trainer.wait() == [0] and "finished: best top-1 " in trainer.output, f"is finished\n{trainer.output}")
    require(_list_files(run) == before, "nor does its own command")


def _miss_checkpoints(place: Place, whole: Path) -> None:
    run, elsewhere = _copy(place, whole), place.new_run()
    (run / "checkpoints").rename(elsewhere)
    before = _list_files(run)
    for best in (None, elsewhere / "best.pt"):  # none at all; all but the best
        if best:
            (run / "checkpoints").mkdir()
            shutil.copy2(best, run / "checkpoints")
        trainer = Trainer(place, run, *OPTIONS)
        require(trainer.wait() == [4] and " are gone (" in trainer.output, f"exit code 4, one line\n{trainer.output}")
        files = _list_files(run)
        files.pop("checkpoints/best.pt", None)
        require(files == before, "missing checkpoints cost nothing else")


def _set_aside(place: Place, whole: Path, moment: int) -> None:
    run = _copy(place, whole)
    before = {name: content for name, (content, _) in _list_files(run).items()}
    command = (*OPTIONS, "seed=1", "checkpoint.on_mismatch=set_aside")
    trainer = Trainer(place, run, *command, faults=[("killed_in_move", [moment])])
    require(trainer.wait() == [-9], f"killed before move {moment}:\n{trainer.output}")
    trainer = Trainer(place, run, *command)
    require(trainer.wait() == [0], f"starts from scratch after a kill before move {moment}:\n{trainer.output}")
    after = {name: content for name, (content, _) in _list_files(run / "earlier-1").items()}
    require(after == before, f"killed before move {moment}: {sorted(before.keys() ^ after.keys())} moved or changed")
    require(not list(run.glob("earlier-*.moving")) and not (run / "earlier-2").exists(), "it is one move")
