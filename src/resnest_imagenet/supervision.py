"""Finds out which rank failed, died or hangs.

Ranks exchange this through the store, because a collective can only wait or fail.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from resnest_imagenet.distributed import Ranks, is_lost_peer, tell_launcher
from resnest_imagenet.errors import DistributedError, Stopped, UserError, explain_runtime, first_line, printable

FAILURE = "failure"  # the key of the first failure
SECONDS_TO_LEAVE = 5  # after another rank has failed, a rank has this long to end by itself
SECONDS_TO_CONTINUE = 5  # a rank that seems to hang has this long to show progress: it may have been frozen

# A rank's activities, in their order within a batch.
STARTING, LOADING, FORWARD, BACKWARD, AGREEING, EVALUATING, SAVING = _ORDER = (
    "starting",
    "waiting for data",
    "computing the loss",
    "computing gradients",
    "applying a step",
    "evaluating",
    "saving",
)


class Watch:
    """Publishes how far this rank is, and ends it if the run cannot continue, even from within a collective.

    Of ranks that wait for each other, the one furthest behind is at fault. One thread talks to the store and another
    one decides: a call to the store can block forever if the network is cut.

    A process may be frozen (SIGSTOP, a suspended machine) for longer than the timeout, and then continue. It restarts
    its clock, because it could not see the others' progress while it was frozen, and the others wait some seconds for
    it.
    """

    def __init__(
        self,
        ranks: Ranks,
        timeout: float,
        on_abort: Callable[[UserError], None],
        note: Callable[[int, int, str], None] = lambda epoch, batch, doing: None,
    ) -> None:
        self._ranks = ranks
        self._timeout = timeout
        self._on_abort = on_abort
        self._note = note
        self._beat = min(2.0, timeout / 10)
        self._place: tuple[int, int, str] = (0, 0, STARTING)
        self._moved = self._awake = time.monotonic()
        self._naps = 0  # how often this process was frozen
        self._suspects: dict[int, Any] = {}  # by rank: its place when this rank's timeout was over
        self._suspected = 0.0
        self._failure: DistributedError | None = None
        self._ended = threading.Event()
        # A separate connection: a call that waits for a key would block other calls on the same one.
        self._store = ranks.store.clone() if ranks.store else None
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._guard, self._talk)]

    def at(self, epoch: int, batch: int, doing: str) -> None:
        """Set the place of this rank: all ranks pass the same places in the same order."""
        self._place = (epoch, batch, doing)
        self._moved = time.monotonic()
        self._note(epoch, batch, doing)

    def then(self, doing: str) -> None:
        """Set this rank's next activity in the same batch."""
        self.at(*self._place[:2], doing)

    def start(self) -> None:
        """Start watching, if there are other ranks."""
        if self._store:
            for thread in self._threads:
                thread.start()

    def end(self) -> None:
        """Stop watching."""
        self._ended.set()
        for thread in self._threads if self._store else []:
            thread.join(self._beat)

    def publish(self, error: UserError | Stopped, rank: int | None) -> bool:
        """Publish which error of which rank ends the run; return whether it is the first one published."""
        assert self._store
        message = json.dumps([rank, str(error), error.exit_code])
        return self._store.compare_set(FAILURE, "", message).decode() == message

    def find_cause(self) -> DistributedError:
        """Return an error that names the rank that ended, with its own error if it published one."""
        with suppress(RuntimeError):  # the process with the store may have ended
            if failure := self._read_failure():
                return failure
            before = self._read_progress()
            time.sleep(2.5 * self._beat)
            silent = [rank for rank, line in enumerate(self._read_progress()) if line == before[rank]]
            if silent:
                place = describe_place(json.loads(before[silent[0]])[0])
                error = DistributedError(f"{_name(silent)} no longer answers; last seen {place}")
                if self.publish(error, None):
                    return error
            if failure := self._read_failure():
                return failure
        return _lost()

    def _talk(self) -> None:
        assert self._store
        beats = 0
        # Stop talking once a failure is known: the store may go away, and torch's own error would then hide the cause.
        while not self._failure and not self._ended.wait(self._beat):
            beats += 1
            try:
                self._store.set(f"progress {self._ranks.rank}", json.dumps([self._place, self._naps, beats]))
                self._failure = self._read_failure()
                if self._count_still() <= self._timeout:
                    self._suspects = {}
                elif self._failure is None:
                    self._suspect()
                    self._failure = self._read_failure()
            except RuntimeError:  # the process with the store has ended
                self._failure = self._failure or _lost()

    def _guard(self) -> None:
        first_seen = None
        while not self._ended.wait(self._beat):
            now = time.monotonic()
            if now - self._awake > 3 * self._beat + 1:
                self._naps += 1
                self._moved = now
            self._awake = now
            still = now - self._moved
            is_cut_off = still > self._timeout + SECONDS_TO_CONTINUE + SECONDS_TO_LEAVE
            failure = self._failure or (_lost() if is_cut_off else None)
            if failure is None:
                continue
            first_seen = first_seen or now
            # A rank that hangs ends when the others have read the failure; another rank has time to end by itself.
            patience = 2 * self._beat if still > self._timeout else SECONDS_TO_LEAVE
            if min(still, now - first_seen) > patience:
                if not failure.is_reported:
                    print(printable(f"resnest-train: rank {self._ranks.rank}: {failure}"), file=sys.stderr, flush=True)
                self._on_abort(failure)
                os._exit(failure.exit_code)

    def _count_still(self) -> float:
        """Return the seconds without progress; 0 until the guard has seen whether this process was frozen."""
        now = time.monotonic()
        return now - self._moved if now - self._awake < 2 * self._beat + 1 else 0

    def _suspect(self) -> None:
        """Report the rank that keeps the others waiting, unless it makes progress while it is suspected."""
        progress = [json.loads(line) for line in self._read_progress()]
        order = [(epoch, batch, _ORDER.index(doing)) for (epoch, batch, doing), *_ in progress]
        late = {rank: progress[rank][:2] for rank, place in enumerate(order) if place == min(order)}
        if not self._suspects:
            self._suspects, self._suspected = late, time.monotonic()
        elif late != self._suspects:
            self._suspects, self._moved = {}, time.monotonic()
        elif time.monotonic() - self._suspected > SECONDS_TO_CONTINUE:
            self._accuse(list(late), late[min(late)][0])

    def _accuse(self, late: list[int], place: tuple[int, int, str]) -> None:
        """Publish which ranks keep the others waiting; the first rank that publishes also prints it."""
        names = "every rank" if len(late) == self._ranks.world_size else _name(late)
        text = f"{names} hangs, {describe_place(place)}: no progress for {self._timeout:g} s (timeout_seconds)"
        if self.publish(DistributedError(text), None):
            print(f"resnest-train: {text}", file=sys.stderr, flush=True)
            tell_launcher(text)

    def _read_failure(self) -> DistributedError | None:
        assert self._store
        if not self._store.check([FAILURE]):
            return None
        rank, text, code = json.loads(self._store.get(FAILURE))
        error = DistributedError(text if rank is None else f"rank {rank}: {text}")
        error.exit_code, error.is_reported = code, True
        return error

    def _read_progress(self) -> list[str]:
        assert self._store
        keys = [f"progress {rank}" for rank in range(self._ranks.world_size)]
        nothing = json.dumps([(0, 0, STARTING), 0, 0])
        return [self._store.get(key).decode() if self._store.check([key]) else nothing for key in keys]


def _lost() -> DistributedError:
    return DistributedError(
        "the connection to the other ranks is lost: rank 0, its host or the network does not answer"
    )


def describe_place(place: tuple[int, int, str]) -> str:
    """Return a rank's activity in words, with its batch."""
    epoch, batch, doing = place
    if doing in (LOADING, FORWARD, BACKWARD, AGREEING):
        return f"{doing} in batch {batch + 1} of epoch {epoch + 1}"
    return doing


def _name(ranks: list[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"


@contextmanager
def supervise(
    ranks: Ranks,
    timeout: float = 600,
    on_abort: Callable[[UserError], None] = lambda error: None,
    note: Callable[[int, int, str], None] = lambda epoch, batch, doing: None,
) -> Iterator[Watch]:
    """Watch the ranks, and name the one that fails first.

    Args:
        ranks: the ranks of the run; with a single one there is nothing to watch.
        timeout: seconds without progress after which a rank counts as hanging.
        on_abort: called before the process is ended from within a collective.
        note: called with each new place of this rank.

    Raises:
        DistributedError: instead of a collective's error, with its cause.
        UserError: instead of an error of torch or the system that a user can fix.
    """
    watch = Watch(ranks, timeout, on_abort, note)
    watch.start()
    try:
        yield watch
    except BaseException as error:
        if is_lost_peer(error):
            raise watch.find_cause() from error
        explained = None if isinstance(error, UserError) else explain_runtime(error)
        failure = error if isinstance(error, UserError | Stopped) else explained
        failure = failure or UserError(f"{type(error).__name__}: {first_line(error)}")
        # An error that all ranks raise is not published: rank 0, which may hold the store, may have ended already.
        if ranks.store and not failure.is_shared:
            with suppress(RuntimeError):
                failure.is_reported = not watch.publish(failure, ranks.rank)
        if explained:
            raise explained from error
        raise
    finally:
        watch.end()
