"""Run the tests in the environment of this Python, and show in which environments they ran.

python tools/versions.py [--out docs/versions.json] [-- PYTEST_ARGUMENTS]   the tests; replaces this environment's row
python tools/versions.py --faults reliability.json                          adds what `make fault-test` wrote here
python tools/versions.py --speed performance.json [...]                     adds what benchmarks wrote (`make bench`)
python tools/versions.py --report > docs/versions.md                        the page
"""

import argparse
import datetime
import json
import platform
import statistics
import subprocess
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
# Of these the versions are in a row: what computes, reads images, and is of another release each month.
PACKAGES = (
    "torch",
    "torchvision",
    "triton",
    "timm",
    "numpy",
    "pillow",
    "nvidia-dali-cuda130",
    "onnxruntime",
    "pydantic",
)
# Of a benchmark's competitors those that a row has, and which of ours each is compared with.
COMPETITORS = {
    "timm, NCHW": "ours",
    "timm, channels_last": "ours",
    "timm, channels_last, compiled": "ours, compiled",
    "torchvision's": "ours",
    "torchvision's, channels_last": "ours",
}
Row = dict[str, Any]

HEAD = """\
# Versions

The environments in which the tests ran. The newest is that of `constraints.txt`, which `make setup` installs and CI
runs; the oldest has the lower bounds of `pyproject.toml`, on the oldest Python: `make test-oldest`. torch 2.15 has no
build for Python 3.10, which takes 2.14. Made by `python tools/versions.py` with the Python of each environment.
"""
SPEED = """\
## Speed

How much faster than each competitor ours is in these environments, from the benchmarks of `make bench`,
`make bench-segmentation` and `make bench-detection`: the median of interleaved rounds, and their range.
"""


def describe_environment() -> Row:
    """Return the versions of Python and of the packages that this Python imports."""
    row: Row = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            row[name] = version(name)
        except PackageNotFoundError:
            row[name] = None
    return row


def count_tests(junit: str) -> dict[str, int]:
    """Return how many tests passed, failed and were skipped, and the seconds they took.

    Args:
        junit: the XML that pytest writes with --junitxml.
    """
    suites = list(ElementTree.fromstring(junit).iter("testsuite"))
    total = {
        name: sum(int(suite.get(name, 0)) for suite in suites) for name in ("tests", "failures", "errors", "skipped")
    }
    failed = total["failures"] + total["errors"]
    seconds = round(sum(float(suite.get("time", 0)) for suite in suites))
    passed = total["tests"] - failed - total["skipped"]
    return {"passed": passed, "failed": failed, "skipped": total["skipped"], "seconds": seconds}


def run_tests(arguments: list[str]) -> Row:
    """Run pytest with some arguments in this environment, and return the row."""
    with tempfile.TemporaryDirectory() as folder:
        junit = Path(folder) / "junit.xml"
        subprocess.run([sys.executable, "-m", "pytest", f"--junitxml={junit}", *arguments], cwd=ROOT, check=False)
        counts = count_tests(junit.read_text())
    commit = subprocess.check_output(["git", "describe", "--always", "--dirty"], cwd=ROOT, text=True).strip()
    what = {"tests": "quick" if "--quick" in arguments else "all", "commit": commit}
    return {**describe_environment(), **what, **counts, "date": datetime.date.today().isoformat()}


def is_same_environment(row: Row, other: Row) -> bool:
    """Return whether two rows tell of one environment: the same Python, but for its last number, and torch."""
    return all(row[name] == other[name] for name in ("torch", "torchvision")) and (
        row["python"].split(".")[:2] == other["python"].split(".")[:2]
    )


def add_row(rows: list[Row], row: Row) -> list[Row]:
    """Return the rows with one more, which replaces that of its environment, but for the faults and the speed there."""
    old = next((other for other in rows if is_same_environment(row, other)), {})
    kept = {name: old[name] for name in ("faults", "speed") if name in old}
    rest = [other for other in rows if other is not old]
    return sorted([*rest, {**kept, **row}], key=lambda row: (_to_numbers(row["torch"]), _to_numbers(row["python"])))


def add_faults(rows: list[Row], reliability: Row) -> list[Row]:
    """Return the rows with the faults that held in one environment.

    Raises:
        LookupError: the tests did not run there.
    """
    machine = reliability["machine"]
    row = _find_row(rows, machine["python"], machine["torch"])
    return _replace(rows, row, {"faults": f"{reliability['held']} of {reliability['of']}"})


def add_speed(rows: list[Row], result: Row) -> list[Row]:
    """Return the rows with a benchmark's ratios of one environment: how much faster than each competitor ours is.

    Raises:
        LookupError: the tests did not run there.
    """
    machine = result["machine"]
    row = _find_row(rows, machine["Python"], machine["torch"])
    speed = {}
    for part in result["parts"]:
        for name, mine in COMPETITORS.items():
            if name in part["seconds"] and mine in part["seconds"]:
                pairs = zip(part["seconds"][name], part["seconds"][mine], strict=True)
                ratios = sorted(other / ours for other, ours in pairs)
                text = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
                speed[f"{part['title']}, against {name}; {machine['device']}"] = text
    return _replace(rows, row, {"speed": {**row.get("speed", {}), **speed}})


def _find_row(rows: list[Row], python: str, torch: str) -> Row:
    for row in rows:
        if (row["python"], row["torch"]) == (python, torch.partition("+")[0]):
            return row
    raise LookupError(f"no row of Python {python} with torch {torch}: run the tests there first")


def _replace(rows: list[Row], row: Row, more: Row) -> list[Row]:
    return [{**other, **more} if other is row else other for other in rows]


def _to_numbers(text: str) -> list[int]:
    return [int(number) for number in text.partition("+")[0].split(".") if number.isdigit()]


def build_page(rows: list[Row]) -> str:
    """Return the page with the tables of all environments, the newest torch first."""
    titles = {
        "nvidia-dali-cuda130": "DALI",
        "python": "Python",
        "numpy": "NumPy",
        "pillow": "Pillow",
        "triton": "Triton",
    }
    columns = ("python", *PACKAGES, "tests", "passed", "failed", "skipped", "faults", "seconds", "commit", "date")
    lines = ["| " + " | ".join(titles.get(name, name) for name in columns) + " |", "|---" * len(columns) + "|"]
    for row in reversed(rows):
        lines.append("| " + " | ".join(str("" if row.get(name) is None else row[name]) for name in columns) + " |")
    measured = [row for row in reversed(rows) if row.get("speed")]
    if measured:
        lines += ["", SPEED, "| | " + " | ".join(f"torch {row['torch']}" for row in measured) + " |"]
        lines.append("|---|" + "---:|" * len(measured))
        for name in dict.fromkeys(name for row in measured for name in row["speed"]):
            lines.append(f"| {name} | " + " | ".join(row["speed"].get(name, "") for row in measured) + " |")
    return "\n".join([HEAD, *lines]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs/versions.json")
    parser.add_argument("--report", action="store_true", help="write the page to standard output")
    parser.add_argument("--faults", type=Path, metavar="RELIABILITY.json")
    parser.add_argument("--speed", type=Path, nargs="+", default=[], metavar="PERFORMANCE.json")
    parser.add_argument("arguments", nargs="*", help="pytest's")
    args = parser.parse_args()
    rows = json.loads(args.out.read_text()) if args.out.exists() else []
    if args.report:
        sys.stdout.write(build_page(rows))
        return
    if args.faults:
        rows = add_faults(rows, json.loads(args.faults.read_text()))
    for path in args.speed:
        rows = add_speed(rows, json.loads(path.read_text()))
    if not args.faults and not args.speed:
        rows = add_row(rows, run_tests(args.arguments))
    args.out.write_text(json.dumps(rows, indent=1) + "\n")
    sys.exit(any(row["failed"] for row in rows))


if __name__ == "__main__":
    main()
