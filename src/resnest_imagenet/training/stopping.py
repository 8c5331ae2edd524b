"""Requests to stop: a signal sets a flag, and the run stops at a point where all ranks can save."""

import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import FrameType, TracebackType

from resnest_imagenet.errors import Stopped

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
# The same request may come twice: from the scheduler to every process, and from torchrun to its ranks.
SECONDS_OF_ONE_REQUEST = 2.0


class StopRequest:
    """Handles the signals that ask a run to stop: it raises `Stopped` before the first step, and notes it afterwards.

    `Stopped` may then be raised in any line. It always ends the process; if a callback in C or a `__del__` swallows it,
    `wait_for_step` raises it again. A second signal ends the process at once. That is safe, because files are written
    whole or not at all.

    Attributes:
        name: of the signal that came, or None.
    """

    def __init__(self, speaks: bool = True) -> None:
        """Prepare the request; signals are handled after `__enter__`.

        Args:
            speaks: whether to print a line for a signal.
        """
        self.name: str | None = None
        self.before_leaving: Callable[[], None] = lambda: None  # at a second signal
        self._speaks = speaks
        self._is_stepping = False
        self._since = 0.0
        self._process = os.getpid()
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():  # other threads must not set handlers
            # nohup ignores SIGHUP so that the run outlives its terminal: keep that.
            is_nohup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            signals = [number for number in SIGNALS if not (number == signal.SIGHUP and is_nohup)]
            self._before = {number: signal.signal(number, self._note) for number in signals}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # After a stop request this process is exiting; a further signal must not change its exit code.
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_IGN if self.name else handler)  # type: ignore[arg-type]

    def wait_for_step(self) -> None:
        """From now on only note a signal, because there is a state to save.

        Raises:
            Stopped: a signal came before, and the code that ran then swallowed the exception.
        """
        if self.name is not None:
            raise self._stopped()
        self._is_stepping = True

    def agree(self) -> None:
        """Treat another rank's request as a request to this rank."""
        self.name = self.name or "another rank"
        self._since = time.monotonic()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a forked worker: its parent decides
            return
        if self.name is None:
            self.name, self._since = signal.Signals(number).name, time.monotonic()
            if not self._is_stepping:
                raise self._stopped()
            self._say(f"{self.name}: stopping after this step or the next, with a checkpoint; a second leaves at once")
        elif time.monotonic() - self._since > SECONDS_OF_ONE_REQUEST:
            self._say("a second signal: leaving at once")
            self.before_leaving()
            os._exit(128 + number)

    def _stopped(self) -> Stopped:
        return Stopped(f"{self.name}: stopped before the first step; the same command resumes the run")

    def _say(self, line: str) -> None:
        if self._speaks:  # not through sys.stderr, which the signal may have interrupted
            with suppress(OSError):  # the terminal may have been closed
                os.write(2, f"resnest-train: {line}\n".encode())
