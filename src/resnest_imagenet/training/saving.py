"""The checkpoints of a run: their content, and whether a run may resume from one."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resnest_imagenet.checkpoint import load_checkpoint
from resnest_imagenet.data.loader import Loader
from resnest_imagenet.distributed import Ranks, barrier, gather_objects
from resnest_imagenet.errors import CheckpointError, is_out_of_memory, printable
from resnest_imagenet.evaluation.score import title_metric
from resnest_imagenet.tasks.task import Task
from resnest_imagenet.training.identity import (
    compare_identity,
    describe_circumstances,
    describe_identity,
    is_of_images,
    read_identity,
)
from resnest_imagenet.training.run_folder import RunFolder
from resnest_imagenet.training.schedule import StepPlan
from resnest_imagenet.training.state import TrainingState, has_stalled
from resnest_imagenet.training.upgrade import upgrade_checkpoint

LENGTHS = ("train.epochs", "train.steps")  # the options of which a run has one


@dataclass(frozen=True)
class Saver:
    """Writes and finds checkpoints.

    Random numbers, the order of the images and the loaders' positions are functions of the seed and the step
    (`randomness.py`), so checkpoints do not hold them.

    Attributes:
        run: the folder.
        ranks: the ranks of the run; rank 0 writes, and chooses the checkpoint to read.
        plan: the steps of the run.
        metric: chooses the best network.
        identity: values that must not change when a run is resumed, by option name.
        circumstances: values that may change; the result is then no longer the same bit for bit.
        description: for readers of a checkpoint: task, configuration, class names, colours and numbers.
    """

    run: RunFolder
    ranks: Ranks
    plan: StepPlan
    metric: str
    identity: dict[str, Any]
    circumstances: dict[str, Any]
    description: dict[str, Any]

    @staticmethod
    def of(run: RunFolder, ranks: Ranks, task: Task, plan: StepPlan, tick: Callable[[], None]) -> "Saver":
        """Describe a run; all ranks take part. `tick` is called from time to time while files are read."""
        config = task.config
        of_classes = {name: getattr(task, name, None) for name in ("palette", "category_ids")}
        return Saver(
            run,
            ranks,
            plan,
            task.metric,
            identity=describe_identity(task, plan.global_batch, ranks, tick),
            circumstances=describe_circumstances(task, ranks),
            description={
                "task": config.train.task,
                "metric": task.metric,
                "config": config.model_dump(),
                "classes": list(task.classes),
                **{name: values.tolist() for name, values in of_classes.items() if values is not None},
            },
        )

    def save(self, state: TrainingState, loader: Loader, is_best: bool) -> None:
        """Write a checkpoint; all ranks take part.

        Raises:
            StorageError: it cannot be written; the previous one is still there.
        """
        content = {
            **state.state_dict(self.ranks),
            "bad_images": gather_objects(sorted(loader.substitution.bad), self.ranks),
            "identity": self.identity,
            "circumstances": self.circumstances,
            **self.description,
        }
        self.run.save(content, is_best)

    def find(self, on_mismatch: str) -> dict[str, Any] | None:
        """Return the newest checkpoint that is not damaged, the same on all ranks; None for a new run.

        Args:
            on_mismatch: what to do if it is of another run: "refuse", "set_aside", or "extend" if that run is shorter
                and otherwise the same.

        Raises:
            CheckpointError: it is of another run, all are damaged or missing, or some rank does not see it.
        """
        name, remains = None, None
        saved: dict[str, Any] = {}
        if self.ranks.is_main:
            name, saved = self.run.read_newest()
            remains = self.run.find_remains() if name is None else None
        name, remains = gather_objects((name, remains), self.ranks)[0]
        path = None
        if name is not None:
            path = self.run.checkpoints / name
            if not path.exists():
                raise CheckpointError(f"{path}: not there: run_dir={self.run.path} is not shared by all ranks")
            saved = upgrade_checkpoint(saved or load_checkpoint(path))
        problem = find_problem(self.run, path, saved, remains, self.identity, on_mismatch)
        if problem is None:
            return saved or None
        barrier(self.ranks)  # all ranks have read it
        if self.ranks.is_main:
            print(printable(f"{problem}: moved to {self.run.set_aside()}, starting from scratch"), flush=True)
        return None

    def restore(self, state: TrainingState, loader: Loader, saved: dict[str, Any]) -> bool:
        """Restore the result of `find`, and print the changes that keep the run from being the same bit for bit.

        Returns:
            Whether the run is finished, so that there is nothing to do.

        Raises:
            CheckpointError: it holds something else, as a checkpoint of another version may.
        """
        try:
            state.load_state_dict(saved, self.ranks)
            lists = saved["bad_images"]
            same_ranks = len(lists) == self.ranks.world_size
            bad = lists[self.ranks.rank] if same_ranks else itertools.chain.from_iterable(lists)
            loader.substitution.bad.update(bad)
            is_finished = is_over(self.run, saved, self.plan, state.patience)
            changes = self._describe_changes(saved)
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            if is_out_of_memory(error):
                raise
            raise CheckpointError(
                f"{self.run.checkpoints}: not checkpoints of a run, or of another version of resnest-imagenet: choose "
                "another run_dir"
            ) from error
        # Outside the try: a lost rank is not the checkpoint's fault.
        is_finished = gather_objects(is_finished, self.ranks)[0]
        if is_finished:
            lines = [describe_end(self.metric, saved, self.plan, state.patience)]
        else:
            lines = [f"resuming after step {state.step}, {state.epoch} epochs done", *changes]
        if self.ranks.is_main:
            print(*lines, sep="\n", flush=True)
        before = read_length(read_identity(saved))
        if before != read_length(self.identity):
            state.history.append({before[0].removeprefix("train."): before[1], "until_step": state.step})
        return is_finished

    def _describe_changes(self, saved: dict[str, Any]) -> list[str]:
        """Return a line for each value that has, or may have, changed since a checkpoint was written."""
        lines = []
        option, before = read_length(read_identity(saved))
        after = self.identity[option]
        if before != after:
            unit = option.removeprefix("train.")
            lines.append(
                f"extended from {before} to {after} {unit}: from here on the schedule is that of {after} {unit}"
            )
        unknown = [name for name in self.identity if is_of_images(name) and name not in saved["identity"]]
        if unknown:
            lines.append(f"not compared, because the checkpoint lacks them: {', '.join(unknown)}")
        circumstances = saved["circumstances"]
        changed = [
            f"{name} {circumstances.get(name)} -> {value}"
            for name, value in self.circumstances.items()
            if circumstances.get(name) != value
        ]
        if changed:
            lines.append(
                f"no longer bit for bit, but each remaining image of the epoch is still seen once: {', '.join(changed)}"
            )
        return lines


def find_problem(
    run: RunFolder,
    newest: Path | None,
    saved: dict[str, Any],
    remains: str | None,
    identity: dict[str, Any],
    on_mismatch: str,
) -> str | None:
    """Return in words why the content of a folder must be set aside; None if a run may resume or begin there.

    Args:
        run: the folder.
        newest: its newest checkpoint, or None.
        saved: the content of that checkpoint.
        remains: without a checkpoint, the result of `RunFolder.find_remains`.
        identity: of the run that starts.
        on_mismatch: see `Saver.find`.

    Raises:
        CheckpointError: the folder holds another run or remains of one, and `on_mismatch` is not "set_aside".
    """
    ways = ["choose another run_dir", "checkpoint.on_mismatch=set_aside to start from scratch in this one"]
    if newest is None:
        if remains is None:
            return None
        problem = f"{run.checkpoints}: the checkpoints of the run in this folder are gone ({remains})"
        ways.insert(0, "put them back")
    else:
        differences = compare_identity(saved, identity)
        option, length = read_length(read_identity(saved))
        is_longer = [*differences] == [option] and 0 < length < (identity[option] or 0)
        if not differences or (is_longer and on_mismatch == "extend"):
            return None
        problem = f"{newest} was trained with {'; '.join(differences.values())}"
        if is_longer:
            ways.insert(1, "checkpoint.on_mismatch=extend to train this one longer")
        elif on_mismatch == "extend":
            problem += " (on_mismatch=extend allows only more epochs or steps)"
    if on_mismatch == "set_aside":
        return problem
    raise CheckpointError(f"{problem}: {', '.join(ways[:-1])}, or {ways[-1]}")


def read_length(identity: dict[str, Any]) -> tuple[str, int]:
    """Return the option with the length of an identity's run, and the length; 0 if it has none."""
    for option in LENGTHS:
        if type(identity.get(option)) is int:
            return option, identity[option]
    return LENGTHS[0], 0


def is_over(run: RunFolder, saved: dict[str, Any], plan: StepPlan, patience: int | None) -> bool:
    """Return whether the run of a checkpoint has finished, by its counters and by its status."""
    is_done = saved["epoch"] >= plan.epochs and saved["step"] >= plan.total_steps
    is_done |= has_stalled(saved.get("stale", 0), patience)
    return is_done and run.read_status().get("state") == "finished"


def describe_end(metric: str, saved: dict[str, Any], plan: StepPlan, patience: int | None) -> str:
    """Return a line about the finished run of a checkpoint; it names train.patience if that has ended the run."""
    is_early = saved["step"] < plan.total_steps
    reason = f": train.patience={patience} has ended it, and more patience resumes it" if is_early else ""
    return f"finished: best {describe_best(metric, saved['best'])}, nothing to do{reason}"


def describe_best(metric: str, value: float) -> str:
    """Return the best value of a metric so far, for people."""
    return f"{title_metric(metric)} {value:.2f} %"
