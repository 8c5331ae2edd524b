"""resnest-report: runs as one page."""

import itertools
import os
import sys
from pathlib import Path

from resnest_imagenet.commands.launch import run_command
from resnest_imagenet.commands.table3 import load_recipes
from resnest_imagenet.config_reading import ReportConfig
from resnest_imagenet.errors import printable
from resnest_imagenet.files import require_writable


def run(config: ReportConfig) -> None:
    """Write the page and print its path."""
    from resnest_imagenet.reports.report import write_report
    from resnest_imagenet.reports.runs import find_runs

    require_writable(Path(config.out), "out")
    runs, skipped = find_runs(config.runs, load_recipes())
    write_report(runs, config.out, config.crop, config.latency, config.device)
    for line in skipped:
        print(printable(f"resnest-report: skipped: {line}"), file=sys.stderr)
    print(printable(f"wrote {config.out}: {', '.join(run.name for run in runs)}"))


def main() -> None:
    """Entry of resnest-report. Folders may come first, bare: `resnest-report runs/a runs/b` is runs=[runs/a,runs/b]."""
    folders = list(itertools.takewhile(_is_folder, sys.argv[1:]))
    if folders:
        runs = ",".join("'" + folder.replace("\\", "\\\\").replace("'", "\\'") + "'" for folder in folders)
        sys.argv[1 : 1 + len(folders)] = [f"runs=[{runs}]"]
    run_command("report", ReportConfig, run)


def _is_folder(word: str) -> bool:
    return os.path.isdir(word) or not ("=" in word or word.startswith("-"))


if __name__ == "__main__":
    main()
