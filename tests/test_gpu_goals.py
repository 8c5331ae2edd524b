"""The table of goals on a GPU: what fails or does not fit into the minutes is a line, and the rest is measured."""

import json
import sys
from pathlib import Path

import pytest
import torch

from conftest import CPU

TOOLS = Path(__file__).parents[1] / "tools/gpu"


@pytest.fixture
def goals(monkeypatch):
    monkeypatch.syspath_prepend(str(TOOLS))
    import goals

    yield goals
    for name in ("goals", "measure"):
        sys.modules.pop(name, None)


def test_every_part_has_its_lines(goals, tmp_path, monkeypatch, capsys):
    def fail(setting):
        yield goals.at_least("speed", 1.3, 1.25, " x")
        raise torch.OutOfMemoryError("out of memory\nmore")

    def wait(setting):
        yield goals.at_most("share", 0.06, 0.05)

    monkeypatch.setattr(goals, "PARTS", {"a": (fail, 5), "b": (wait, 5), "c": (wait, 50)})
    setting = goals.Setting(CPU, tmp_path, tmp_path, is_tiny=False)
    rows = goals.measure_parts(setting, ["a", "b", "c"], goals.time.monotonic() + 20)
    figures = [(row.name, row.figure, row.is_met) for row in rows]
    assert figures == [
        ("speed", "1.30 x", True),
        ("a", "OutOfMemoryError: out of memory", False),
        ("share", "0.06", False),
        ("c", "not measured: out of minutes", None),
    ]
    assert [row["figure"] for row in json.loads((tmp_path / "goals.json").read_text())] == [row.figure for row in rows]
    assert capsys.readouterr().out.splitlines()[0].endswith(">= 1.25 x    met")
