"""metrics.jsonl: a line for each event of a training run, read back."""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from resnest_imagenet.errors import ConfigError
from resnest_imagenet.files import require_file

TOP1 = "top1"  # of evaluations that name no metric: those of earlier versions
MAX_DRAWN = 1e40  # more than float32 holds, and less than breaks a chart's axis

# "event": its kind; "epoch": the one that it is of, from 1 on; "step": steps done; and what its kind has.
Event = dict[str, Any]

_START = b'{"event"'  # of each line


def name_metric(values: Event) -> str:
    """Return the name of the value by which a run chooses its best network; "top1" where nothing names one.

    Args:
        values: an event of an evaluation, or what status.json or a checkpoint holds.
    """
    metric = values.get("metric", TOP1)
    return metric if isinstance(metric, str) else TOP1


def read_events(path: Path, numbers: dict[str, tuple[str, ...]]) -> list[Event]:
    """Return events of a metrics.jsonl; a line that was cut by the run's end is none.

    Args:
        path: of the file.
        numbers: what each kind of event must have, by the kind; others are passed over. An evaluation must have the
            value of its metric besides.

    Raises:
        ConfigError: it cannot be read, or holds something else.
    """
    require_file(path)
    try:
        events, damaged = parse_events(path)
        if damaged and not events:
            raise ValueError("no event")
        events = [event for event in events if event["event"] in numbers]
        for event in events:
            metric = (name_metric(event),) if event["event"] == "eval" else ()
            require_numbers(event, (*numbers[event["event"]], *metric))
        return events
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise ConfigError(f"{path}: not what resnest-train writes") from error


def require_numbers(event: Event, names: Iterable[str]) -> None:
    """Raise a LookupError or a ValueError unless an event has these numbers, of a size that charts take."""
    for name in names:
        value = event[name]
        is_count = name in ("step", "epoch")  # from 1 on; a loss may be infinite
        if type(value) not in (int, float) or (is_count and not 0 < value < math.inf):
            raise ValueError(f"{name}={value}")
        if MAX_DRAWN < abs(value) < math.inf:
            raise ValueError(f"{name}={value}")


def parse_events(path: Path) -> tuple[list[Event], list[bytes]]:
    """Read what can be read; epochs are counted from 1, as they are in the files of today's version.

    Returns:
        The events, and the damaged lines. Where an event stands at the end of a damaged line, as after a write that was
        cut, it is one of the events. A last line that is cut is neither: a run that is killed may leave one.

    Raises:
        OSError: the file cannot be read.
    """
    if not path.is_file():  # a pipe would be waited for
        return [], []
    events, damaged = [], []
    *lines, last = path.read_bytes().split(b"\n")
    for line in filter(None, lines):
        event = _parse(line)
        if event is None:
            damaged.append(line)
            event = _parse(line[line.rfind(_START) :])
        events.append(event)
    events.append(_parse(last))
    return _count_from_one([event for event in events if event is not None]), damaged


def _count_from_one(events: list[Event]) -> list[Event]:
    """Return the events of a file with their epochs counted from 1: earlier versions counted those of steps from 0."""
    numbers = ("epoch", "step")  # an event without them is damaged
    of_steps = [e for e in events if e["event"] != "eval" and all(type(e.get(name)) is int for name in numbers)]
    if any(event["epoch"] == 0 for event in of_steps):
        for event in of_steps:
            event["epoch"] += 1
    return events


def _parse(line: bytes) -> Event | None:
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return event if isinstance(event, dict) and isinstance(event.get("event"), str) else None
