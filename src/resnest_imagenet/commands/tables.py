"""resnest-tables: the paper's tables beside what was counted and measured here."""

import json
import sys
from typing import Any

from resnest_imagenet.commands.launch import run_command
from resnest_imagenet.commands.table3 import load_recipes
from resnest_imagenet.config import TablesConfig
from resnest_imagenet.errors import printable

HEADINGS = {3: "Table 3: ImageNet", 7: "Table 7: semantic segmentation"}


def run(config: TablesConfig) -> None:
    """Print the tables that are chosen, in the paper's order; one alone has no heading."""
    from resnest_imagenet.evaluation.results import MIOU, TOP1, read_all_measured

    numbers: list[int] = sorted(set(config.table))
    metrics = {3: TOP1, 7: MIOU}
    results, skipped = read_all_measured(config.results, load_recipes(), [metrics[number] for number in numbers])
    rows, strangers = build_rows(numbers, results)
    for line in skipped + strangers:
        print(printable(f"resnest-tables: skipped: {line}"), file=sys.stderr)
    print(format_tables(rows, config.format))


def build_rows(numbers: list[int], results: list[Any]) -> tuple[dict[int, list[dict[str, Any]]], list[str]]:
    """Return the rows of the tables by their number, and a line for each result that has no row.

    Args:
        numbers: of the tables.
        results: of `read_all_measured`.
    """
    from resnest_imagenet.evaluation.results import Measured, MeasuredRegions
    from resnest_imagenet.reports import downstream, table3

    rows: dict[int, list[dict[str, Any]]] = {}
    strangers: list[str] = []
    if 3 in numbers:
        of_images = [result for result in results if isinstance(result, Measured)]
        rows[3] = table3.build_table(of_images)
        strangers += table3.list_strangers(of_images)
    if 7 in numbers:
        of_scenes = [result for result in results if isinstance(result, MeasuredRegions)]
        rows[7] = downstream.build_downstream(downstream.TABLE7, of_scenes)
        strangers += downstream.list_strangers(downstream.TABLE7, of_scenes)
    return rows, strangers


def format_tables(rows: dict[int, list[dict[str, Any]]], form: str) -> str:
    """Return the tables as text: of several tables markdown has headings, and JSON is an object by their numbers."""
    from resnest_imagenet.reports import downstream, table3

    if form == "json" and len(rows) > 1:
        return json.dumps(rows, indent=2)
    texts = {
        number: table3.format_table(of_table, form)
        if number == 3
        else downstream.format_downstream(downstream.TABLE7, of_table, form)
        for number, of_table in rows.items()
    }
    if len(texts) == 1:
        return "".join(texts.values())
    return "\n\n".join(f"## {HEADINGS[number]}\n\n{text}" for number, text in texts.items())


def main() -> None:
    """Entry of resnest-tables."""
    run_command("tables", TablesConfig, run)


if __name__ == "__main__":
    main()
