"""What may come between the start of a run and its first step: a request to stop, too little memory, a bad file."""

import itertools
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from faults.harness import (
    RICH,
    Place,
    Trainer,
    find_difference,
    newest,
    read_end,
    require,
    require_equal_runs,
)
from resnest_imagenet.checkpoint import load_checkpoint, save_checkpoint
from resnest_imagenet.errors import DamagedCheckpointError

# The stages of a start, in their order, by a function at the beginning of each; {task}: the class of the run's task.
STAGES = {
    "opening the task": "resnest_imagenet.training.train.open_task",
    "listing the data": "resnest_imagenet.data.parts.open_source",
    "meeting the ranks": "resnest_imagenet.distributed.join",
    "planning the batches": "{task}.plan_batches",
    "building a loader": "{task}.build_loader",
    "preparing the evaluation": "{task}.build_evaluation",
    "describing the data": "{task}.identify",
    "reading a checkpoint": "torch.load",
    "building the network": "{task}.build_model",
    "restoring": "resnest_imagenet.training.state.TrainingState.load_state_dict",
    "describing the run": "resnest_imagenet.training.run_folder.describe_environment",
    "opening TensorBoard": "torch.utils.tensorboard.SummaryWriter",
    "opening MLflow": "mlflow.MlflowClient",
    "compiling": "torch._inductor.compile_fx.compile_fx",
}
FAST_STAGES = ("meeting the ranks", "describing the data", "reading a checkpoint", "restoring", "opening TensorBoard")
SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR1")


def stop_while_starting(place: Place) -> dict[str, Any]:
    """A signal at each stage of a start: exit code 75, no checkpoint changes, the next start resumes bit for bit."""
    options: tuple[str, ...] = ("checkpoint.every_steps=2", "loader=torchvision")
    options += () if place.fast else RICH
    # Asked before it has opened, MLflow writes nothing.
    more_of = {"compiling": ("train.compile=true",), "opening MLflow": ("log.trackers=[mlflow]",)}
    whole, stopped = place.new_run(), place.new_run()
    require(Trainer(place, whole, *options).wait() == [0], f"{whole} ends well")
    killed = Trainer(place, stopped, *options, faults=[("killed", [0, 5])])
    require(killed.wait() == [-9], f"{stopped} is killed:\n{killed.output}")
    task = "tiny_task.TinyTask" if place.is_tiny else "resnest_imagenet.tasks.classification.Classification"
    stages = FAST_STAGES if place.fast else tuple(STAGES)
    before = _read_checkpoints(stopped)
    for stage, name in zip(stages, itertools.cycle(SIGNALS)):
        _require_stopped(place, stopped, name, STAGES[stage].format(task=task), *options, *more_of.get(stage, ()))
        require(_read_checkpoints(stopped) == before, f"{name} while {stage}: a checkpoint has changed")
    trainer = Trainer(place, stopped, *options)
    require(trainer.wait() == [0], f"{stopped} ends well:\n{trainer.output}")
    require(f"after step {_newest_step(before)}," in trainer.output, f"it resumes:\n{trainer.output}")
    require_equal_runs(whole, stopped)
    if place.fast:
        return {"stages": len(stages)}
    source = f"train.init_from={whole / 'checkpoints/best.pt'}"
    _require_stopped(place, place.new_run(), "SIGTERM", "torch.load", *options, source)
    _stop_ranks(place)
    return {"stages": len(stages) + 1 + 4}


def _require_stopped(place: Place, run: Path, name: str, function: str, *options: str) -> None:
    trainer = Trainer(place, run, *options, faults=[("gets_signal_in", [name, function])])
    codes, what = trainer.wait(), f"{name} in {function}"
    require(codes == [75], f"{what}: {codes}\n{trainer.output}")
    line = f"resnest-train: {name}: stopped before the first step; the same command resumes the run"
    require(trainer.lines[-1] == line, f"{what}:\n{trainer.output}")
    warnings = [line for line in trainer.lines if line.startswith("WARNING") and "ended without a message" not in line]
    require("Traceback" not in trainer.output and not warnings, f"{what}:\n{trainer.output}")
    end = read_end(run)
    require(end["exit_code"] == 75 and "stopped before the first step" in end["error"], f"{what}: {end}")


def _stop_ranks(place: Place) -> None:
    """Two ranks; both are asked, or the second alone, which reads the checkpoint too."""
    options = ("checkpoint.every_steps=2", "loader=dali", "timeout_seconds=20")
    whole, stopped = place.new_run(), place.new_run()
    require(Trainer(place, whole, *options, ranks=2).wait() == [0, 0], f"{whole} ends well")
    killed = Trainer(place, stopped, *options, ranks=2, faults=[("killed", [0, 8]), ("killed", [0, 9])])
    require(killed.wait() == [-9, -9], f"{stopped} is killed:\n{killed.output}")
    before = _read_checkpoints(stopped)
    for place_of_signal, at_rank in itertools.product(("torch.load", STAGES["restoring"]), (None, 1)):
        fault = ("gets_signal_in", ["SIGTERM", place_of_signal, at_rank])
        trainer = Trainer(place, stopped, *options, ranks=2, faults=[fault])
        codes = trainer.wait()
        # Who waits for the one that has left says that it is lost.
        require(codes[at_rank or 0] == 75 and set(codes) <= {75, 7}, f"{fault}: {codes}\n{trainer.output}")
        require(_read_checkpoints(stopped) == before, f"{fault}: a checkpoint has changed")
    require(Trainer(place, stopped, *options, ranks=2).wait() == [0, 0], f"{stopped} ends well")
    require_equal_runs(whole, stopped)


def _read_checkpoints(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((run / "checkpoints").iterdir())}


def _newest_step(checkpoints: dict[str, bytes]) -> int:
    """Return the step of the newest of the checkpoints, by their files' names."""
    return max(int(Path(name).stem.partition("-")[2]) for name in checkpoints if name.startswith("step-"))


def keep_when_memory_is_short(place: Place) -> dict[str, Any]:
    """Too little memory to read a checkpoint: one line, exit code 6, nothing is renamed, and the run resumes later."""
    options = ("loader=dali", "checkpoint.every_steps=2")
    whole, short = place.new_run(), place.new_run()
    require(place.fast or Trainer(place, whole, *options).wait() == [0], f"{whole} ends well")
    require(Trainer(place, short, *options, faults=[("killed", [0, 10])]).wait() == [-9], f"{short} is killed")
    before = _read_checkpoints(short)
    size = newest(short).stat().st_size // 2**20
    rooms = (1, size + 2) if place.fast else (1, size // 2, size + 2, size + size // 2)
    for room in rooms:  # the file's bytes do not fit, or they do and the tensors do not
        trainer = Trainer(place, short, *options, faults=[("has_little_memory", [room])])
        codes, lines = trainer.wait(), trainer.lines
        line = f"resnest-train: {newest(short)}: cannot be read: not enough memory"
        require(codes == [6] and lines == [line], f"{room} MB: {codes}\n{trainer.output}")
        require(_read_checkpoints(short) == before, f"{room} MB: a checkpoint has changed")
    if not place.fast:
        require(Trainer(place, short, *options).wait() == [0], "it resumes when there is memory")
        require_equal_runs(whole, short)
    return {"shortages": len(rooms)}


def notice_damage(place: Place) -> dict[str, Any]:
    """Flips of a bit, cuts, lost bytes, zeroed and lost pages of a small and a large checkpoint: all are noticed."""
    run = place.new_run()
    trainer = Trainer(place, run, "loader=dali", "train.epochs=1", "train.warmup_epochs=0")
    require(trainer.wait() == [0], f"{run} ends well:\n{trainer.output}")
    large, small = newest(run), place.folder / "small.pt"
    *_, weight = load_checkpoint(large)["model"].values()
    small_content = {"model": {"weight": weight.clone()}, "step": 1}
    save_checkpoint(small_content, small)
    tried = 0
    for path in (small, large):
        content, good = load_checkpoint(path), path.read_bytes()
        damaged = place.folder / "damaged.pt"
        for kind, data in _damage(
            good, random.Random(path.name), (10, 5, 5, 5) if place.fast else (1000, 200, 100, 50)
        ):
            damaged.write_bytes(data)
            tried += 1
            try:
                difference = find_difference(content, load_checkpoint(damaged))
            except DamagedCheckpointError:
                continue
            if difference is not None:
                shutil.copy(damaged, place.folder / "unnoticed.pt")
            require(difference is None, f"{kind} of {path.name} is not noticed: {difference}")
    return {"damages": tried, "MB": round(len(good) / 1e6, 1)}


def _damage(good: bytes, rng: random.Random, numbers: tuple[int, int, int, int]) -> Iterator[tuple[str, bytes]]:
    """Yield so many flips, cuts, lost bytes and pages of a file, with what it is."""
    flips, cuts, lost, pages = numbers
    for position in rng.choices(range(len(good)), k=flips):
        flipped = bytearray(good)
        flipped[position] ^= 1 << rng.randrange(8)
        yield f"a flip at {position}", bytes(flipped)
    for position in rng.choices(range(len(good)), k=cuts):
        yield f"a cut at {position}", good[:position]
    for position in rng.choices(range(len(good)), k=lost):
        yield f"a lost byte at {position}", good[:position] + good[position + 1 :]
    for start in rng.choices(range(0, len(good), 4096), k=pages):
        page = good[start : start + 4096]
        yield f"a lost page at {start}", good[:start] + good[start + len(page) :]
        yield f"a zeroed page at {start}", good[:start] + bytes(len(page)) + good[start + len(page) :]
