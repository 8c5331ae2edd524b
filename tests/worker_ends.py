"""How a process with tests has ended that was not told to: its exit code, and where it was if a signal ended it."""

import faulthandler
import os
import tempfile
from pathlib import Path
from subprocess import TimeoutExpired
from typing import Any

import pytest

LINES = 60  # of a trace

_ends: list[str] = []


def _name_trace(run: str, worker: str) -> Path:
    return Path(tempfile.gettempdir()) / f"pytest-{run}-{worker}.trace"


@pytest.hookimpl(trylast=True)  # after pytest's own
def pytest_configure(config: pytest.Config) -> None:
    """Let Python write where it was to a file: what a process prints may be far above the summary."""
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID")
    if run is not None and "PYTEST_XDIST_WORKER" in os.environ:
        trace = _name_trace(run, os.environ["PYTEST_XDIST_WORKER"]).open("w")
        faulthandler.enable(trace)
        config.add_cleanup(lambda: (faulthandler.disable(), trace.close(), os.unlink(trace.name)))


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    """Note how it has ended."""
    if not error:
        return
    try:
        code = node.gateway._io.popen.wait(10)
    except TimeoutExpired:
        code = "none: it still runs"
    trace = _name_trace(node.workerinput["testrunuid"], node.workerinput["workerid"])
    lines = trace.read_text().splitlines()[:LINES] if trace.exists() else []
    trace.unlink(missing_ok=True)
    _ends.append("\n".join([f"{node.gateway.id}: {error}; exit code {code} (negative: a signal)", *lines]))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print it."""
    for end in _ends:
        terminalreporter.write_line(end)
