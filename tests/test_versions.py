"""What the page of versions is made from: pytest's own XML, and a row for each environment."""

import pytest

from versions import add_faults, add_row, add_speed, build_page, count_tests, describe_environment

XML = """<?xml version="1.0" encoding="utf-8"?>
<testsuites name="pytest tests">
  <testsuite name="pytest" errors="1" failures="2" skipped="3" tests="10" time="12.6"></testsuite>
  <testsuite name="more" errors="0" failures="0" skipped="0" tests="5" time="2.0"></testsuite>
</testsuites>"""


def make_row(python, torch, **other):
    return {"python": python, "torch": torch, "torchvision": "0.1", "failed": 0, **other}


def test_tests_are_counted_as_pytest_wrote_them():
    assert count_tests(XML) == {"passed": 9, "failed": 3, "skipped": 3, "seconds": 15}


def test_an_environment_has_one_row_and_the_newest_comes_first():
    rows = []
    for row in (make_row("3.10.1", "2.9.0"), make_row("3.13.0", "2.15.0"), make_row("3.9.0", "2.15.0")):
        rows = add_row(rows, row)
    rows = add_faults(rows, {"held": 22, "of": 23, "machine": {"python": "3.10.1", "torch": "2.9.0+cu130"}})
    rows = add_row(rows, make_row("3.10.2", "2.9.0", failed=4))  # the same Python, but for its last number
    table = [line.split(" | ") for line in build_page(rows).splitlines() if line.startswith("| 3.")]
    assert [(cells[0].strip("| "), cells[1]) for cells in table] == [
        ("3.13.0", "2.15.0"),
        ("3.9.0", "2.15.0"),
        ("3.10.2", "2.9.0"),
    ]
    assert rows[0]["faults"] == "22 of 23" and rows[0]["failed"] == 4
    with pytest.raises(LookupError, match="run the tests there first"):
        add_faults(rows, {"held": 1, "of": 1, "machine": {"python": "3.13.0", "torch": "2.14.0"}})


def test_speed_has_the_median_of_the_rounds_against_the_same_form_of_ours():
    seconds = {
        "ours": [1.0, 1.0, 2.0],
        "plain formula": [9.0, 9.0, 9.0],
        "timm, channels_last": [1.5, 1.0, 4.0],
        "ours, compiled": [0.5, 0.5, 0.5],
        "timm, channels_last, compiled": [1.0, 0.5, 0.6],
    }
    machine = {"device": "a CPU", "Python": "3.13.0", "torch": "2.15.0+cu132"}
    result = {"machine": machine, "parts": [{"title": "A step", "seconds": seconds}, {"title": "B", "seconds": {}}]}
    rows = add_speed([make_row("3.13.0", "2.15.0"), make_row("3.10.1", "2.9.0")], result)
    rows = add_row(rows, make_row("3.13.0", "2.15.0", failed=1))
    assert build_page(rows).splitlines()[-4:] == [
        "| | torch 2.15.0 |",
        "|---|---:|",
        "| A step, against timm, channels_last; a CPU | 1.50 (1.00 to 2.00) |",
        "| A step, against timm, channels_last, compiled; a CPU | 1.20 (1.00 to 2.00) |",
    ]


def test_this_environment_is_described():
    import torch

    row = describe_environment()
    assert torch.__version__.partition("+")[0] == row["torch"].partition("+")[0] and row["numpy"]
