"""metrics.jsonl: a line for each event of a training run, read back."""

import json
from pathlib import Path
from typing import Any

Event = dict[str, Any]  # "event": its kind; and what that has

_START = b'{"event"'  # of each line


def parse_events(path: Path) -> tuple[list[Event], list[bytes]]:
    """Read what can be read.

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
    return [event for event in events if event is not None], damaged


def _parse(line: bytes) -> Event | None:
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return event if isinstance(event, dict) and isinstance(event.get("event"), str) else None
