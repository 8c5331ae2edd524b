"""Long runs: their reports as columns, and their curves with as many points as a chart shows."""

import json
import random
import struct

import numpy as np
import pytest

from resnest_imagenet.errors import ConfigError
from resnest_imagenet.evaluation.events import parse_events
from resnest_imagenet.evaluation.step_reports import read_run_events

NAMES = ("step", "loss")


def write_events(path, events):
    path.write_text("".join(f"{json.dumps(event)}\n" for event in events))


def test_reports_are_columns_of_the_same_numbers(tmp_path):
    """Of more events than are in the memory at a time, with numbers that are hard to parse."""
    rng = random.Random(0)
    losses = [value for value in (struct.unpack("<d", rng.randbytes(8))[0] for _ in range(9000)) if abs(value) < 1e40]
    losses[:4] = [float("inf"), 5e-324, 0.1 + 0.2, 2.0**70]
    events = [{"event": "train", "step": step, "epoch": 1, "loss": loss} for step, loss in enumerate(losses, 1)]
    events[3] |= {"loss": 2**70, "time": 5.5}
    evaluation = {"event": "eval", "step": 9, "epoch": 1, "top1": 3.5, "name": "\ud800"}
    path = tmp_path / "metrics.jsonl"
    write_events(path, [*events, {"event": "skipped", "step": 1}, evaluation])
    reports, evaluations = read_run_events(path, NAMES)
    assert reports["loss"].tolist() == losses and len(reports) == len(losses) > 4096
    assert reports["time"][3] == 5.5 and np.isnan(reports["time"]).sum() == len(losses) - 1
    assert evaluations == [evaluation] and parse_events(path)[0][: len(events)] == events
    for name, value in (("loss", None), ("loss", True), ("loss", "1"), ("loss", 10**400), ("loss", 1e41), ("step", 0)):
        write_events(path, [*events, events[0] | {name: value}])
        with pytest.raises(ConfigError, match="not what resnest-train writes"):
            read_run_events(path, NAMES)
    path.write_text("")
    assert (len(read_run_events(path, NAMES)[0]), read_run_events(path, NAMES)[1]) == (0, [])


@pytest.mark.slow
def test_a_thinned_curve_covers_the_same_columns_of_pixels():
    """Each column of pixels has the same first, last, lowest and highest point, so the spikes stay."""
    from resnest_imagenet.evaluation.curves import thin  # late: it imports matplotlib

    rng = np.random.default_rng(0)
    x = np.sort(rng.random(30_000)) * 270
    y = rng.normal(size=30_000)
    y[[100, 20_000, 29_999]] = 50, -50, np.nan
    y[5000:5300], y[7000] = np.nan, np.inf
    kept = thin(x, y, 100)
    assert len(kept) <= 4 * 101 and {100, 20_000} <= set(kept.tolist()) and (np.diff(kept) > 0).all()
    columns = np.minimum((x - x[0]) / (x[-1] - x[0]) * 100, 100).astype(int)
    for column in range(101):
        all_of, thinned = y[columns == column], y[kept[columns[kept] == column]]
        assert np.array_equal(all_of[[0, -1]], thinned[[0, -1]], equal_nan=True)
        finite, shown = all_of[np.isfinite(all_of)], thinned[np.isfinite(thinned)]
        assert len(finite) == len(shown) == 0 or (finite.min(), finite.max()) == (shown.min(), shown.max())
    # Few points, points of one place, and points that come back are all kept or thinned without an error.
    assert thin(x[:400], y[:400], 100).tolist() == list(range(400))
    assert len(thin(np.ones(1000), y[:1000], 100)) == 4
    assert len(thin(x[::-1], y, 100)) <= 404
