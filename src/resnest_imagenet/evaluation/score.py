"""The result of an evaluation, the same type for every task."""

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
        values: plain numbers and texts by name: with "event", "epoch", "step" and "time" they are a line of
            metrics.jsonl. Trackers plot the floats, in percent.
        text: the same for people, in one line.
        pictures: for the trackers, by name: each function draws a picture, uint8 (H, W, 3).
        files: files of the run folder that describe the best network, by name: each function returns the content.
    """

    values: Mapping[str, Any]
    text: str
    pictures: Mapping[str, Callable[[], np.ndarray]] = field(default_factory=dict)
    files: Mapping[str, Callable[[], bytes]] = field(default_factory=dict)
