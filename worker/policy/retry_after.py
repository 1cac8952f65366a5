"""
The backend's hint about the next attempt: how long to wait, and whether there shall be one.

Pure: the clock is an argument.  A hint that cannot be read is no hint; it never fails an answer.
"""

import math
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

MAX_RETRY_AFTER_S = 86_400.0
"""Longer hints are cut to a day: no lease lives longer."""
MAX_PLAUSIBLE_S = 31 * 86_400.0
"""A hint beyond the longest period of a quota, a month, is a mistake and no hint."""
FIRST_UNIX_TIME = 1e9
"""From here on a number is a point in time (September 2001) and no number of seconds (31 years); Unix milliseconds
begin at a thousand times that.  Several gateways write the time of their limit's reset into Retry-After."""

_RFC_3339 = re.compile(r"\d{4}-\d\d-\d\d[T ]", re.ASCII)
_NUMBER = re.compile(r"\d{1,16}(\.\d{1,9})?", re.ASCII)


def retry_after_s(headers: Mapping[str, str], *, now_unix: float) -> float | None:
    """
    Return how many seconds the backend asks to wait, or `None` when it does not say or cannot be understood.

    `retry-after-ms` is finer and goes first; `retry-after` may be seconds, an HTTP date or an RFC 3339 time.  A number
    that is a Unix time is read as that time.  A time in the past is 0; what is more than a month away is no hint.

    Args:
        headers: Response headers, names in lower case.
        now_unix: Seconds since 1970, for dates.

    Returns:
        0 to `MAX_RETRY_AFTER_S`.

    Source: RFC 9110 section 10.2.3; for `retry-after-ms`
        https://github.com/openai/openai-python/blob/main/src/openai/_base_client.py (`_parse_retry_after_header`).
    """
    milliseconds = _number(headers.get("retry-after-ms"))
    if milliseconds is not None:
        is_time = milliseconds >= FIRST_UNIX_TIME  # also in seconds: as a wait it would be eleven days
        return _plausible(_until(milliseconds if is_time else milliseconds / 1000, now_unix))
    value = headers.get("retry-after")
    number = _number(value)
    return _plausible(_until_date(value, now_unix) if number is None else _until(number, now_unix))


def should_retry(headers: Mapping[str, str]) -> bool | None:
    """
    Return the backend's own verdict `x-should-retry`, or `None` when it gives none.

    Source: https://github.com/openai/openai-python/blob/main/src/openai/_base_client.py (`_should_retry`).
    """
    return {"true": True, "false": False}.get(headers.get("x-should-retry", "").strip().lower())


def _number(value: str | None) -> float | None:
    """Read a plain decimal number; signs, exponents, `nan` and `inf` are not one."""
    text = (value or "").strip()
    return float(text) if _NUMBER.fullmatch(text) else None


def _until(number: float, now_unix: float) -> float:
    """Return the seconds that a number means: itself, or the time until it."""
    if number < FIRST_UNIX_TIME:
        return number
    return max(0.0, (number / 1000 if number >= 1000 * FIRST_UNIX_TIME else number) - now_unix)


def _plausible(seconds: float | None) -> float | None:
    return None if seconds is None or seconds > MAX_PLAUSIBLE_S else min(seconds, MAX_RETRY_AFTER_S)


def _until_date(value: str | None, now_unix: float) -> float | None:
    if not value or len(value) > 64:  # noqa: PLR2004 the longest HTTP date has 33 characters
        return None
    text = value.strip()
    try:
        date = datetime.fromisoformat(text) if _RFC_3339.match(text) else parsedate_to_datetime(text)
        if date.tzinfo is None:  # the asctime form of RFC 9110 has no zone and is GMT
            date = date.replace(tzinfo=UTC)
        wait_s = date.timestamp() - now_unix
    except (ValueError, OverflowError, TypeError, IndexError):
        return None
    return max(0.0, wait_s) if math.isfinite(wait_s) else None
