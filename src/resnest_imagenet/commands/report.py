"""resnest-report: what runs did, as one page."""

import itertools
import sys

from resnest_imagenet.commands.launch import run_command
from resnest_imagenet.commands.table3 import load_recipes
from resnest_imagenet.config import ReportConfig


def run(config: ReportConfig) -> None:
    """Write the page and say where."""
    from resnest_imagenet.evaluation.report import write_report

    runs = write_report(config, load_recipes())
    print(f"wrote {config.out}: {', '.join(run.name for run in runs)}")


def main() -> None:
    """Entry of resnest-report. Folders may come first, bare: `resnest-report runs/a runs/b` is runs=[runs/a,runs/b]."""
    folders = list(itertools.takewhile(lambda word: "=" not in word and not word.startswith("-"), sys.argv[1:]))
    if folders:
        runs = ",".join(f"'{folder}'" for folder in folders)
        sys.argv[1 : 1 + len(folders)] = [f"runs=[{runs}]"]
    run_command("report", ReportConfig, run)


if __name__ == "__main__":
    main()
