"""Where each rank is, in a file that outlives it: what is left to tell of a rank that a signal ends at once."""

import itertools
import json
import os
import platform
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from resnest_imagenet.data.plan import BatchPlan, plan_evaluation
from resnest_imagenet.data.source import ImageSource
from resnest_imagenet.distributed import find_launcher_file, format_failure
from resnest_imagenet.errors import UserError, printable
from resnest_imagenet.supervision import EVALUATING, STARTING, describe_place

SUSPECTS = "suspects.txt"
_SIZE = 1024  # bytes of a record: always as many, so that no disk can be too full for it
_READ_AHEAD = 2  # batches that DALI decodes while the run works on one
_DEALT = ("rank", "world_size", "batch_size", "num_batches")  # what may differ between attempts
_KNOWN = ("num_samples", "seed")


class Trace:
    """A record of this rank's place in the run folder, and one for torchrun's summary.

    Both are removed at every end that has a line of its own. What an attempt has left, that had none, the next reports.
    They are not synchronised to the disk: the system keeps what a process has written, and that is all they outlive.
    """

    def __init__(self, folder: Path) -> None:
        """Read what the last attempt has left.

        Args:
            folder: of the run.
        """
        self._folder = folder
        self._left: dict[Path, dict[str, Any] | None] = {}
        for path in sorted(folder.glob("rank-*.trace")):
            record = None
            with suppress(OSError, ValueError):  # it may be empty where a machine has lost its power
                record = json.loads(path.read_bytes())
            is_ours = isinstance(record, dict) and record.keys() >= {"epoch", "batch", "doing", *_DEALT, *_KNOWN}
            self._left[path] = record if is_ours else None
        self._files: dict[Path, int] = {}
        self._written: dict[Path, bytes] = {}

    def __enter__(self) -> "Trace":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def begin(self, batches: BatchPlan) -> None:
        """Make the records; when all ranks have read what was left.

        Args:
            batches: this rank's of an epoch of training.
        """
        self._batches = batches
        known = {name: getattr(batches, name) for name in (*_DEALT, *_KNOWN)}
        self._dealt = json.dumps(known).strip("{}")
        self._own = self._folder / f"rank-{batches.rank}.{platform.node()}.{os.getpid()}.trace"
        launcher_file = find_launcher_file()
        for path in (self._own, *([Path(launcher_file)] if launcher_file else [])):
            with suppress(OSError):  # a run that cannot leave a trace is still a run
                self._files[path] = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        self.note(0, 0, STARTING)

    def note(self, epoch: int, batch: int, doing: str) -> None:
        """Write down where this rank is; some microseconds."""
        for path, descriptor in self._files.items():
            if path == self._own:
                text = f'{{"epoch": {epoch}, "batch": {batch}, "doing": "{doing}", {self._dealt}}}'
            else:
                where = _describe(epoch, batch, doing, len(self._batches))
                text = format_failure(f"rank {self._batches.rank} was killed by a signal, {where}")
            self._written[path] = text.encode().ljust(_SIZE)
            with suppress(OSError):
                os.pwrite(descriptor, self._written[path], 0)

    def close(self) -> None:
        """Remove the records."""
        while self._files:
            path, descriptor = self._files.popitem()
            with suppress(OSError):
                # torchrun may have been told of another cause by now.
                if os.pread(descriptor, 2 * _SIZE, 0) == self._written[path]:
                    path.unlink()
                os.close(descriptor)

    def closing_after(self, end: Callable[[UserError], None]) -> Callable[[UserError], None]:
        """Return what says how the run ends, and then removes the records."""

        def end_and_close(error: UserError) -> None:
            end(error)
            self.close()

        return end_and_close

    def report_last_attempt(self, train_set: ImageSource, val_set: ImageSource) -> None:
        """Print on rank 0 which ranks ended without a word, where, and on which images; forget what they have left.

        Args:
            train_set: the images of training.
            val_set: those of the evaluation.
        """
        if self._batches.rank > 0:
            return
        left = [record for path, record in self._left.items() if record is not None and path.exists()]
        for path in self._left:
            path.unlink(missing_ok=True)
        if not left:
            return
        first = min(left, key=lambda record: (record["epoch"], record["batch"], record["rank"]))
        ranks = sorted(record["rank"] for record in left)
        plan = replace(self._batches, **{name: first[name] for name in _DEALT})
        where = _describe(first["epoch"], first["batch"], first["doing"], len(plan))
        line = f"WARNING: rank {', '.join(map(str, ranks))} of the last attempt ended without a word, {where}"
        is_same = all(first[name] == getattr(self._batches, name) for name in _KNOWN)
        names = list(_name_images(first, plan, train_set, val_set)) if is_same else []
        if names:
            suspects = self._folder / SUSPECTS
            with suppress(OSError):
                suspects.write_text("".join(f"{name}\n" for name in names))
            line += f"; its images: {', '.join(names[:3])}, ... ({len(names)}, all in {suspects})"
            if not train_set.shard_sizes:
                line += f"; to look for a bad one: resnest-data check data.root={train_set.root.parent}"
        print(printable(line), file=sys.stderr, flush=True)


def _name_images(
    record: dict[str, Any], plan: BatchPlan, train_set: ImageSource, val_set: ImageSource
) -> Iterator[str]:
    """Yield the images of the batch that a rank was at, and of those that it had begun to read."""
    if record["doing"] == STARTING:
        return
    source, batch = train_set, record["batch"]
    if record["doing"] == EVALUATING:
        source, batch = val_set, batch - len(plan)
        plan = plan_evaluation(len(val_set), plan.batch_size, plan.rank, plan.world_size)
    for indices in itertools.islice(plan.batches(record["epoch"], batch), 1 + _READ_AHEAD):
        yield from map(source.name, indices.tolist())


def _describe(epoch: int, batch: int, doing: str, first_eval_batch: int) -> str:
    if doing == EVALUATING:
        return f"{doing} after epoch {epoch + 1}, in batch {batch - first_eval_batch + 1}"
    return describe_place((epoch, batch, doing))
