"""Records each rank's place in a file that outlives it: the only trace of a rank that a signal kills."""

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
_SIZE = 1024  # bytes of a record: a fixed size, so that a full disk cannot prevent an update
_READ_AHEAD = 2  # batches that DALI decodes while the run works on one
_DEALT = ("rank", "world_size", "batch_size", "num_batches")  # what may differ between attempts
_KNOWN = ("num_samples", "seed")


class Trace:
    """A record of this rank's place in the run folder, and one for torchrun's summary.

    Both are removed when a run ends with a line of its own. If an attempt ends without one, the next attempt reports
    its records. They are not synchronised to the disk: they only have to outlive the process.
    """

    def __init__(self, folder: Path) -> None:
        """Read the records that the last attempt has left.

        Args:
            folder: of the run.
        """
        self._folder = folder
        self._left: dict[Path, dict[str, Any] | None] = {}
        for path in sorted(folder.glob("rank-*.trace")):
            record = None
            with suppress(OSError, ValueError):  # it may be empty after a power cut
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
        """Make the records, after all ranks have read the earlier ones.

        Args:
            batches: this rank's batches of an epoch of training.
        """
        self._batches = batches
        values = {name: getattr(batches, name) for name in (*_DEALT, *_KNOWN)}
        self._dealt = json.dumps(values).strip("{}")
        self._own = self._folder / f"rank-{batches.rank}.{platform.node()}.{os.getpid()}.trace"
        launcher_file = find_launcher_file()
        for path in (self._own, *([Path(launcher_file)] if launcher_file else [])):
            with suppress(OSError):  # a run that cannot leave a trace is still a run
                self._files[path] = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        self.note(0, 0, STARTING)

    def note(self, epoch: int, batch: int, doing: str) -> None:
        """Write this rank's place; it takes some microseconds."""
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
                # The file may have another cause for torchrun by now.
                if os.pread(descriptor, 2 * _SIZE, 0) == self._written[path]:
                    path.unlink()
                os.close(descriptor)

    def closing_after(self, end: Callable[[UserError], None]) -> Callable[[UserError], None]:
        """Return a function that calls `end` and then removes the records."""

        def end_and_close(error: UserError) -> None:
            end(error)
            self.close()

        return end_and_close

    def report_last_attempt(self, train_set: ImageSource, val_set: ImageSource) -> None:
        """Print on rank 0 which ranks ended without a message, where, and with which images; remove their records.

        Args:
            train_set: the images of training.
            val_set: the images of the evaluation.
        """
        if self._batches.rank > 0:
            return
        records = [record for path, record in self._left.items() if record is not None and path.exists()]
        for path in self._left:
            path.unlink(missing_ok=True)
        if not records:
            return
        first = min(records, key=lambda record: (record["epoch"], record["batch"], record["rank"]))
        ranks = sorted(record["rank"] for record in records)
        plan = replace(self._batches, **{name: first[name] for name in _DEALT})
        where = _describe(first["epoch"], first["batch"], first["doing"], len(plan))
        line = f"WARNING: rank {', '.join(map(str, ranks))} of the last attempt ended without a message, {where}"
        is_same = all(first[name] == getattr(self._batches, name) for name in _KNOWN)
        names = list(_name_images(first, plan, train_set, val_set)) if is_same else []
        if names:
            suspects = self._folder / SUSPECTS
            with suppress(OSError):
                suspects.write_text("".join(f"{name}\n" for name in names))
            line += f"; its images: {', '.join(names[:3])}, ... ({len(names)}, all in {suspects})"
            if not train_set.shard_sizes:
                has_folders = train_set.root != val_set.root  # not of a list, or a split
                where = f"data.root={train_set.root.parent}" if has_folders else "with the run's options of data"
                line += f"; to look for a bad one: resnest-data check {where}"
        print(printable(line), file=sys.stderr, flush=True)


def _name_images(
    record: dict[str, Any], plan: BatchPlan, train_set: ImageSource, val_set: ImageSource
) -> Iterator[str]:
    """Yield the images of a rank's batch, and of the batches that it had begun to read."""
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
