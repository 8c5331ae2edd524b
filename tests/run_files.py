"""What a run leaves, read back and compared."""

import json
from pathlib import Path
from typing import Any

import torch


def read_events(run: Path) -> list[dict[str, Any]]:
    """Return the events of metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def without_clock(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return events without what no two runs share."""
    clock = ("time", "images_per_s", "data_wait")
    return [{name: value for name, value in event.items() if name not in clock} for event in events]


def list_places(events: list[dict[str, Any]]) -> list[tuple[str, int, int]]:
    """Return the kind, epoch and step of events."""
    return [(event["event"], event["epoch"], event["step"]) for event in events]


def read_status(run: Path) -> dict[str, Any]:
    """Return status.json."""
    return json.loads((run / "status.json").read_text())


def read_scalars(run: Path) -> dict[str, list[tuple[int, float]]]:
    """Return all of TensorBoard's points but those of the clock, as (step, value) by name."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    scalars = EventAccumulator(str(run / "tensorboard"))
    scalars.Reload()
    clock = ("train/images_per_s", "train/data_wait")
    names = [name for name in scalars.Tags()["scalars"] if name not in clock]
    # In order: files of one second are not.
    return {name: sorted((point.step, point.value) for point in scalars.Scalars(name)) for name in names}


def list_files(run: Path) -> dict[Path, tuple[bytes, int]]:
    """Return content and time of all files of a run, but for those about the process or the last start."""
    files = [path for path in run.rglob("*") if path.is_file() and path.name not in ("lock", "failed_start.json")]
    return {path.relative_to(run): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def assert_equal(first: Any, second: Any) -> None:
    """Compare nested plain containers bit for bit."""
    if isinstance(first, torch.Tensor):
        assert torch.equal(first, second)
    elif isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first:
            assert_equal(first[key], second[key])
    elif isinstance(first, list):
        assert len(first) == len(second)
        for mine, other in zip(first, second, strict=True):
            assert_equal(mine, other)
    else:
        assert first == second


def assert_same_run(first: Path, second: Path) -> None:
    """Compare the newest checkpoints and the events of two runs: all but the folder, the clock and the host."""
    contents = []
    for run in (first, second):
        content = torch.load(max((run / "checkpoints").glob("step-*.pt")), weights_only=True)
        contents.append({**content, "config": {**content["config"], "run_dir": None}})
    assert_equal(*contents)
    assert without_clock(read_events(first)) == without_clock(read_events(second))
