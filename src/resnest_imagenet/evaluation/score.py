"""The result of an evaluation, whatever was trained."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np


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
