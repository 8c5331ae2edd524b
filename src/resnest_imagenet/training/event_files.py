"""TensorBoard's event files of a run that resumes."""

import os
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

_HEADER = struct.Struct("<QI")  # of a record: the length of its event, and the checksum of the length
_FOOTER = 4  # bytes: the checksum of the event


def cut_event_files(files: Sequence[Path], step: int, num_values: int) -> bool:
    """Cut files after a step, if they then hold all that a run has shown until there; otherwise leave them.

    Checksums are not verified: TensorBoard does so, in Python, slowly.

    Args:
        files: event files.
        step: the last to be kept.
        num_values: numbers that the run has shown until that step.

    Returns:
        Whether they were cut.
    """
    ends = [_find_end(file, step) for file in files]
    if not files or any(end is None for end in ends) or sum(count for _, count in filter(None, ends)) != num_values:
        return False
    for file, (size, _) in zip(files, filter(None, ends), strict=True):
        if size < file.stat().st_size:
            os.truncate(file, size)
    return True


def _find_end(file: Path, step: int) -> tuple[int, int] | None:
    """Return the bytes before the first event after a step, and how many numbers they hold.

    None if events of earlier steps follow, or the file is damaged.
    """
    from google.protobuf.message import DecodeError

    size, count = 0, 0
    is_after = False
    try:
        for end, event in _scan_records(file):
            is_after |= event.step > step
            values = event.summary.value
            if not is_after:
                size = end
                count += sum(value.HasField("simple_value") for value in values)
            elif event.step <= step and values:
                return None
    except DecodeError:
        return None
    return size, count


def _scan_records(file: Path) -> Iterator[tuple[int, Any]]:
    """Yield where each event ends in the file, and the event; a last one that is cut off is skipped."""
    from tensorboard.compat.proto.event_pb2 import Event

    end = 0
    with file.open("rb") as stream:
        while len(header := stream.read(_HEADER.size)) == _HEADER.size:
            length = _HEADER.unpack(header)[0]
            if length > file.stat().st_size:
                return
            content = stream.read(length + _FOOTER)
            if len(content) < length + _FOOTER:
                return
            end += len(header) + len(content)
            yield end, Event.FromString(content[:-_FOOTER])


def read_pictures(files: Sequence[Path], step: int) -> list[Any]:
    """Return the events up to a step that have a picture, as they were written."""
    from tensorboard.backend.event_processing import event_file_loader

    events = (event for file in files for event in event_file_loader.LegacyEventFileLoader(str(file)).Load())
    return [e for e in events if e.step <= step and any(value.HasField("image") for value in e.summary.value)]
