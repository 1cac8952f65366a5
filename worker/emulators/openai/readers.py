"""
How a value that a person wrote (command line text or JSON) becomes a checked Python value.

Each function returns a reader; a reader raises ValueError with what it would have accepted, and says nothing about the
name of the setting, which its caller knows.
"""

import math
from collections.abc import Callable
from typing import Any, cast

Reader = Callable[[Any], Any]


def integer(low: int, high: int | None = None) -> Reader:
    """Read an integer from `low` to `high`; None is no upper bound."""

    def read(value: object) -> int:
        number = value
        if isinstance(value, str):
            try:
                number = int(value)
            except ValueError:
                number = None
        too_high = high is not None and isinstance(number, int) and number > high
        if isinstance(number, bool) or not isinstance(number, int) or number < low or too_high:
            allowed = f"from {low} to {high}" if high is not None else f"of at least {low}"
            raise ValueError(f"must be an integer {allowed}, not {value!r}")
        return number

    return read


def share(value: object) -> float:
    """Read a number from 0 to 1."""
    try:
        number = float(cast("Any", value))
    except (TypeError, ValueError):
        number = math.nan
    if isinstance(value, bool) or not 0 <= number <= 1:
        raise ValueError(f"must be a number from 0 to 1, not {value!r}")
    return number


def choice(*allowed: object) -> Reader:
    """Read one of some values; a text that looks like one of them counts."""

    def read(value: object) -> Any:
        for one in allowed:
            same = value == one and not isinstance(value, bool)
            if same or (isinstance(value, str) and value == str(one)):
                return one
        raise ValueError(f"must be one of {', '.join(map(str, allowed))}, not {value!r}")

    return read


def names(value: object) -> tuple[str, ...]:
    """Read a list of names, or a text with commas between them."""
    listed = value.split(",") if isinstance(value, str) else value
    if not isinstance(listed, list | tuple) or not all(isinstance(name, str) and name.strip() for name in listed):
        raise ValueError(f"must be a list of names (or a text with commas between them), not {value!r}")
    return tuple(name.strip() for name in listed)


def secret(value: object) -> str:
    """Read a key: printable ASCII; its value never stands in the error."""
    if not isinstance(value, str) or not value.strip() or not value.isascii() or not value.isprintable():
        raise ValueError("must be a text of printable ASCII characters")
    return value


def flag(value: object) -> bool:
    """Read true or false."""
    if not isinstance(value, bool):
        raise ValueError(f"must be true or false, not {value!r}")  # noqa: TRY004 - a reader promises ValueError
    return value


def text(value: object) -> str:
    """Read any text."""
    if not isinstance(value, str):
        raise ValueError(f"must be a text, not {value!r}")  # noqa: TRY004 - a reader promises ValueError
    return value


def texts(value: object) -> dict[str, str]:
    """Read an object whose values are texts."""
    if not isinstance(value, dict) or not all(isinstance(inner, str) for inner in value.values()):
        raise ValueError(f"must be an object of texts, not {value!r}")
    return dict(value)


def headers(value: object) -> dict[str, str]:
    """Read HTTP headers: an object of texts without line breaks."""
    read = texts(value)
    if any(not name or any(mark in name + inner for mark in "\r\n\0") for name, inner in read.items()):
        raise ValueError("header names and values must not contain line breaks")
    return read


def optional(read: Reader) -> Reader:
    """Read with `read`, or null and `none` as None."""
    return lambda value: None if value is None or value == "none" else read(value)
