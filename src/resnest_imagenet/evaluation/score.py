"""The result of an evaluation, whatever was trained."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

# How people call the value by which a run chooses its best network.
_TITLES = {"top1": "top-1", "miou": "mIoU", "box_ap": "box AP", "mask_ap": "mask AP"}


def title_metric(metric: str) -> str:
    """Return how people call a value of a `Score`: its name, where it is another task's."""
    return _TITLES.get(metric, metric)


@dataclass(frozen=True)
class Score:
    """The result of one evaluation, the same on every rank.

    Attributes:
        values: plain numbers and text by name, a line of metrics.jsonl beside its "event", "epoch", "step" and "time";
            trackers plot those that are floats, in percent.
        text: the same for people, in one line.
        pictures: for the trackers, by name: each function draws one, uint8 (H, W, 3).
        files: of the run folder, by name, that describe the best network: each function returns the content.
    """

    values: Mapping[str, Any]
    text: str
    pictures: Mapping[str, Callable[[], np.ndarray]] = field(default_factory=dict)
    files: Mapping[str, Callable[[], bytes]] = field(default_factory=dict)
