"""resnest-tables: the paper's tables beside this project's counted and measured figures."""

import json
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from resnest_imagenet.commands.launch import run_command
from resnest_imagenet.commands.table3 import choose_form, load_recipes
from resnest_imagenet.config_reading import TablesConfig
from resnest_imagenet.errors import printable

if TYPE_CHECKING:
    from resnest_imagenet.reports.downstream import DownstreamTable

HEADINGS = {
    3: "Table 3: ImageNet",
    5: "Table 5: object detection",
    6: "Table 6: instance segmentation",
    7: "Table 7: semantic segmentation",
}


def run(config: TablesConfig) -> None:
    """Print the chosen tables in the paper's order; a single table has no heading."""
    from resnest_imagenet.evaluation.events import TOP1
    from resnest_imagenet.evaluation.measured import read_all_measured
    from resnest_imagenet.evaluation.results import BOX_AP, MASK_AP, MIOU
    from resnest_imagenet.reports.aligned import align_tables

    numbers: list[int] = sorted(set(config.table))
    metrics = {3: TOP1, 5: BOX_AP, 6: MASK_AP, 7: MIOU}
    results, skipped = read_all_measured(config.results, load_recipes(), [metrics[number] for number in numbers])
    rows, strangers = build_rows(numbers, results)
    for line in skipped + strangers:
        print(printable(f"resnest-tables: skipped: {line}"), file=sys.stderr)
    form, width = choose_form(config.format)
    text = format_tables(rows, form)
    print(align_tables(text, width) if width else text)


def build_rows(numbers: list[int], results: list[Any]) -> tuple[dict[int, list[dict[str, Any]]], list[str]]:
    """Return the rows of the tables by their number, and a line for each result that has no row.

    Args:
        numbers: of the tables.
        results: of `read_all_measured`.
    """
    from resnest_imagenet.evaluation.results import Measured, MeasuredBoxes, MeasuredRegions
    from resnest_imagenet.reports import downstream, table3

    rows: dict[int, list[dict[str, Any]]] = {}
    strangers: list[str] = []
    if 3 in numbers:
        of_images = [result for result in results if isinstance(result, Measured)]
        rows[3] = table3.build_table(of_images)
        strangers += table3.list_strangers(of_images)
    boxes = [result for result in results if isinstance(result, MeasuredBoxes)]
    of_tables: dict[int, list[downstream.MeasuredDownstream]] = {
        5: [result for result in boxes if result.mask_ap is None],
        6: [result for result in boxes if result.mask_ap is not None],
        7: [result for result in results if isinstance(result, MeasuredRegions)],
    }
    for number, table in list_downstream(numbers).items():
        rows[number] = downstream.build_downstream(table, of_tables[number])
        strangers += downstream.list_strangers(table, of_tables[number])
    return rows, strangers


def list_downstream(numbers: Iterable[int]) -> "dict[int, DownstreamTable]":
    """Return the chosen tables of other tasks than classification by their number."""
    from resnest_imagenet.reports import downstream

    tables = {5: downstream.TABLE5, 6: downstream.TABLE6, 7: downstream.TABLE7}
    return {number: table for number, table in tables.items() if number in numbers}


def format_tables(rows: dict[int, list[dict[str, Any]]], form: str) -> str:
    """Return the tables as text. With several tables, markdown has headings and JSON is an object by their numbers."""
    from resnest_imagenet.reports import downstream, table3

    if form == "json" and len(rows) > 1:
        return json.dumps(rows, indent=2)
    tables = list_downstream(rows)
    texts = {
        number: downstream.format_downstream(tables[number], of_table, form)
        if number in tables
        else table3.format_table(of_table, form)
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
