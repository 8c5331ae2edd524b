"""Texts in CSV files that a spreadsheet does not take for formulas."""

import re
from typing import Any

# What a spreadsheet calculates, or takes off before it looks; quotes in front are those of `guard`.
_FORMULA = re.compile(r"'*[=+\-@\t\r]")


def guard(value: Any) -> Any:
    """Put a quote before a text that a spreadsheet would calculate, as people do in one; numbers stay as they are."""
    return f"'{value}" if isinstance(value, str) and _FORMULA.match(value) else value


def unguard(text: str) -> str:
    """Return what `guard` was given."""
    return text[1:] if text.startswith("'") and _FORMULA.match(text) else text
