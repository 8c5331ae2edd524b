"""Protects texts in CSV files from spreadsheets, which would calculate some as formulas."""

import re
from typing import Any

# Characters that start a formula, or that a spreadsheet strips first; the quotes before them come from `guard`.
_FORMULA = re.compile(r"'*[=+\-@\t\r]")


def guard(value: Any) -> Any:
    """Put a quote before a text that a spreadsheet would calculate, as people do by hand; numbers do not change."""
    return f"'{value}" if isinstance(value, str) and _FORMULA.match(value) else value


def unguard(text: str) -> str:
    """Undo `guard`."""
    return text[1:] if text.startswith("'") and _FORMULA.match(text) else text
