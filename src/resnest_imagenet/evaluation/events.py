"""Reads metrics.jsonl: a line for each event of a training run."""

import json
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic_core import from_json

from resnest_imagenet.errors import ConfigError
from resnest_imagenet.files import require_file

TOP1 = "top1"  # the metric of evaluations that name none: those of earlier versions
MAX_DRAWN = 1e40  # above float32's largest number, and below those that break a chart's axis

# "event" is its kind, "epoch" its epoch, from 1 on, "step" the number of steps done; the other keys depend on the kind.
Event = dict[str, Any]

_START = b'{"event"'  # of each line


def name_metric(values: Event) -> str:
    """Return the name of the value by which a run chooses its best network; "top1" if there is no name.

    Args:
        values: an event of an evaluation, or the content of status.json or of a checkpoint.
    """
    metric = values.get("metric", TOP1)
    return metric if isinstance(metric, str) else TOP1


def read_events(path: Path, numbers: dict[str, tuple[str, ...]]) -> list[Event]:
    """Return events of a metrics.jsonl, without a last line that the run's end has cut off.

    Args:
        path: of the file.
        numbers: the numbers that each kind of event must have, by kind; other kinds are skipped. An evaluation must
            also have the value of its metric.

    Raises:
        ConfigError: it cannot be read, or holds something else.
    """
    with refusing_other_content(path):
        events = [event for event in stream_events(path) if event["event"] in numbers]
        for event in events:
            metric = (name_metric(event),) if event["event"] == "eval" else ()
            require_numbers(event, (*numbers[event["event"]], *metric))
        return events


@contextmanager
def refusing_other_content(path: Path) -> Iterator[None]:
    """Raise a ConfigError where the code within cannot use a metrics.jsonl, or its path is no file."""
    require_file(path)
    try:
        yield
    except (OSError, ValueError, LookupError, TypeError, OverflowError, RecursionError) as error:
        raise ConfigError(f"{path}: not what resnest-train writes") from error


def stream_events(path: Path) -> Iterator[Event]:
    """Yield the events of a file, without its damaged lines.

    Raises:
        OSError: the file cannot be read.
        ValueError: it has damaged lines, and no event.
    """
    is_damaged, has_event = False, False
    for item in scan_events(path):
        if isinstance(item, bytes):
            is_damaged = True
        else:
            has_event = True
            yield item
    if is_damaged and not has_event:
        raise ValueError("no event")


def require_numbers(event: Event, names: Iterable[str]) -> None:
    """Raise a LookupError or a ValueError unless an event has these numbers, and charts can draw them."""
    for name in names:
        value = event[name]
        is_count = name in ("step", "epoch")  # counts start at 1; a loss may be infinite
        if type(value) not in (int, float) or (is_count and not 0 < value < math.inf):
            raise ValueError(f"{name}={value}")
        if MAX_DRAWN < abs(value) < math.inf:
            raise ValueError(f"{name}={value}")


def parse_events(path: Path) -> tuple[list[Event], list[bytes]]:
    """Read all events that can be read, as `scan_events` does.

    Returns:
        The events, and the damaged lines.

    Raises:
        OSError: the file cannot be read.
    """
    events: list[Event] = []
    damaged: list[bytes] = []
    for item in scan_events(path):
        damaged.append(item) if isinstance(item, bytes) else events.append(item)
    return events, damaged


def scan_events(path: Path) -> Iterator[Event | bytes]:
    """Yield the events of a file and its damaged lines, in their order; the file may be larger than the memory.

    An event at the end of a damaged line, as after a write that was cut off, follows that line. A last line that is cut
    off is skipped: a killed run may leave one. Epochs are counted from 1: earlier versions counted those of steps
    from 0, as the first of them shows.

    Raises:
        OSError: the file cannot be read.
    """
    if not path.is_file():  # reading a pipe would wait forever
        return
    first_epoch: int | None = None  # of the events of steps
    with path.open("rb") as file:
        for line in file:
            event = _parse(line)
            if event is None:
                content = line.rstrip(b"\n")
                if content and line.endswith(b"\n"):
                    yield content
                    event = _parse(content[content.rfind(_START) :])
                if event is None:
                    continue
            if event["event"] != "eval" and type(event.get("epoch")) is int is type(event.get("step")):
                first_epoch = event["epoch"] if first_epoch is None else first_epoch
                event["epoch"] += first_epoch == 0
            yield event


def _parse(line: bytes) -> Event | None:
    try:
        event = from_json(line)  # four times as fast as json
    except ValueError:
        try:
            event = json.loads(line)  # of other encodings, and with halves of characters
        except (ValueError, RecursionError):
            return None
    return event if isinstance(event, dict) and isinstance(event.get("event"), str) else None


def format_seconds(seconds: float) -> str:
    """Return a time in its two largest units: "3 h 5 min", "5 min 7 s", "7 s"."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if minutes else f"{rest} s"
    return f"{minutes // 60} h {minutes % 60} min"
