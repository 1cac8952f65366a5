"""Which error answers are asked again: the default of `retry-failed` and `local --retry-errors`, and how it is said."""

import argparse

from worker.policy.model import ErrorClass
from worker.policy.table import ROWS

RETRYABLE = tuple(sorted(str(name) for name, row in ROWS.items() if row.retryable))
"""Classes whose errors may not come again when the same request is sent later."""
ALL = ("all",)
"""Stands for every class."""


def error_classes(text: str) -> tuple[str, ...]:
    """
    Return the error classes that a comma-separated list names; `ALL` for `all`.

    Raises:
        argparse.ArgumentTypeError: One of them is none, or the list is empty.
    """
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if names == ALL:
        return names
    known = {str(each) for each in ErrorClass}
    for name in names:
        if name not in known and name != "unclassified":
            raise argparse.ArgumentTypeError(f"{name} is no error class; there are {', '.join(sorted(known))}")
    if not names:
        raise argparse.ArgumentTypeError("names no class")
    return names
