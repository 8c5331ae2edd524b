"""The catalogue of faults: what a training run survives, or ends with a line for, shown by doing it to real runs.

PYTHONPATH=tests python -m faults [--only 1 4] [--fast] [--out reliability.json]

Prints one line for each entry, and writes the figures. Exit code 1 where a claim does not hold. Some minutes on two
cores.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from faults import (
    bad_images,
    counting,
    crashes,
    frozen,
    hostile,
    missing,
    objects,
    options,
    ranks,
    scenes,
    starting,
    storage,
    terminal,
    undecodable,
)
from faults.harness import Place

Entry = Callable[[Place], dict[str, Any]]
CATALOGUE: dict[int, Entry] = {
    1: crashes.survive_kill,
    2: crashes.survive_kill_in_write,
    3: ranks.stop_when_asked,
    4: crashes.fall_back,
    5: crashes.keep_within_storage,
    6: ranks.recover_from_death,
    7: ranks.name_the_culprit,
    8: ranks.refuse_nonsense,
    9: counting.count_exactly,
    10: hostile.refuse_code,
    11: bad_images.name_bad_data,
    12: options.explain_options,
    13: undecodable.survive_bad_images,
    14: storage.name_what_is_no_file,
    15: storage.survive_storage_errors,
    16: starting.stop_while_starting,
    17: starting.keep_when_memory_is_short,
    18: starting.notice_damage,
    19: missing.lose_nothing,
    20: frozen.outlast_a_freeze,
    21: terminal.outlast_the_terminal,
    22: scenes.resume_scenes,
    23: objects.resume_objects,
}
# Those about what surrounds the steps, whatever is trained: a small part of each trains the tiny task.
OF_ANY_TASK = {1, 2, 3, 4, 5, 6, 7, 8, 16, 18, 19, 20, 21}
# Those without a small part: of what they claim, tests/ has a test for each piece, in its own process.
FULL_ONLY = {9, 10, 12, 15, 22, 23}


def make_place(number: int, fast: bool, folder: Path) -> Place:
    """Make a folder for an entry."""
    place = Place(folder / str(number), fast, is_tiny=fast and number in OF_ANY_TASK)
    place.folder.mkdir()
    return place


def run_entry(number: int, fast: bool, folder: Path) -> dict[str, Any]:
    """Do one entry, and return whether it held, with its figures or its failure."""
    place = make_place(number, fast, folder)
    started = time.monotonic()
    try:
        result = {"holds": True, "figures": CATALOGUE[number](place)}
    except Exception as error:
        result = {"holds": False, "failure": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}
    finally:
        place.end_children()
    claim = (CATALOGUE[number].__doc__ or "").strip()
    return {"number": number, "claim": claim, **result, "seconds": round(time.monotonic() - started, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=int, nargs="+", choices=CATALOGUE, metavar="N")
    parser.add_argument("--fast", action="store_true", help="a small part of those that have one")
    parser.add_argument("--out", type=Path, default=Path("reliability.json"))
    args = parser.parse_args()
    numbers = args.only or [number for number in CATALOGUE if not (args.fast and number in FULL_ONLY)]
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        _ = Place(Path(folder) / "first", args.fast).data  # made once, before two entries want it
        with ThreadPoolExecutor(2) as pool:  # trainers have one thread each
            results = []
            for result in pool.map(lambda number: run_entry(number, args.fast, Path(folder)), numbers):
                results.append(result)
                figures = ", ".join(f"{name} {value}" for name, value in result.get("figures", {}).items())
                verdict = "ok  " if result["holds"] else "FAIL"
                print(
                    f"{verdict} {result['number']:>2} {result['claim']} [{figures}; {result['seconds']:.0f} s]",
                    flush=True,
                )
                if not result["holds"]:
                    print(result["trace"], flush=True)
    held = sum(result["holds"] for result in results)
    machine = {"cpu": platform.machine(), "cores": len(os.sched_getaffinity(0)), "python": platform.python_version()}
    machine |= {"torch": torch.__version__, "platform": platform.platform(terse=True)}
    seconds = round(time.monotonic() - started)
    content = {"held": held, "of": len(results), "seconds": seconds, "fast": args.fast, "machine": machine}
    args.out.write_text(json.dumps({**content, "entries": results}, indent=2) + "\n")
    print(f"{held} of {len(results)} hold, {seconds} s; {args.out}")
    sys.exit(held < len(results))


if __name__ == "__main__":
    main()
