"""Errors that a user can cause: one line that says what is wrong, where, and what to do."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """An error to be shown as one line, without a traceback; `exit_code` is the process's."""

    exit_code = 1


class ConfigError(UserError, ValueError):
    """An option is unknown, missing, of the wrong type, out of range, or at odds with another."""

    exit_code = 2


class DataError(UserError):
    """The data set is missing, malformed or unreadable."""

    exit_code = 3


class CheckpointError(UserError):
    """A checkpoint is missing, damaged, or not of this model."""

    exit_code = 4


class NonFiniteLossError(UserError):
    """The loss is NaN or infinite."""

    exit_code = 5


def suggest(name: str, valid: Iterable[str]) -> str:
    """Return "; did you mean 'x'?" for the nearest of the valid names, or "" where none is near."""
    near = difflib.get_close_matches(name, list(valid), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, or its type where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
