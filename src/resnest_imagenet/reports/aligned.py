"""Tables of Markdown for a terminal: columns under each other, without bars and links."""

import re
from collections.abc import Sequence
from itertools import groupby

_GAP = 2  # columns of the terminal between two of a table
# Columns that repeat in a machine's words what the first one names: a narrow terminal has no place for them.
_SPARED = ("model", "experiment")
_LINK = re.compile(r"\[([^\]]*)\]\([^)]*\)")


def align_tables(markdown: str, width: int) -> str:
    """Return a text with its tables aligned; other lines stay.

    Args:
        markdown: of `format_table` or `format_tables`.
        width: of the terminal, in characters; a table that is wider stays so.
    """
    lines: list[str] = []
    for is_table, block in groupby(markdown.split("\n"), lambda line: line.startswith("|")):
        rows = list(block)
        lines += _align(rows, width) if is_table else rows
    return "\n".join(lines)


def _align(block: Sequence[str], width: int) -> list[str]:
    rows = [[_LINK.sub(r"\1", cell.strip()) for cell in line.strip("|").split("|")] for line in block]
    head, marks, *body = rows
    columns = list(zip(marks, head, *body, strict=True))
    if _measure(columns) > width:
        columns = [column for column in columns if column[1] not in _SPARED]
    titles = [title.rpartition(": ") for _, title, *_ in columns]
    widths = [_width(column) for column in columns]
    lines = [_place_groups([group for group, _, _ in titles], widths)]
    cells = [[title for _, _, title in titles], *zip(*(column[2:] for column in columns), strict=True)]
    is_number = [mark.endswith(":") for mark, *_ in columns]
    return [*filter(None, lines), *(_join(row, widths, is_number) for row in cells)]


def _join(row: Sequence[str], widths: Sequence[int], is_number: Sequence[bool]) -> str:
    columns = zip(row, widths, is_number, strict=True)
    return (
        (" " * _GAP).join(f"{cell:>{size}}" if right else f"{cell:<{size}}" for cell, size, right in columns).rstrip()
    )


def _place_groups(groups: Sequence[str], widths: Sequence[int]) -> str:
    """Return the line above the titles: "top-1 @224" stands over "paper" and the "here" beside it."""
    line, start = "", 0
    for group, size in zip(groups, widths, strict=True):
        if group:
            # Right-aligned above its first column, or from the beginning of that if it is longer.
            line = line.ljust(max(start, start + size - len(group))) + group
        start += size + _GAP
    return line


def _measure(columns: Sequence[tuple[str, ...]]) -> int:
    return sum(map(_width, columns)) + _GAP * (len(columns) - 1)


def _width(column: tuple[str, ...]) -> int:
    _, title, *cells = column
    return max(map(len, (title.rpartition(": ")[2], *cells)))
