"""
Hints when to come back, in the three spellings that clients meet.

`Retry-After` is whole seconds or an HTTP date (RFC 9110, section 10.2.3); OpenAI's and Azure's servers also send
`retry-after-ms`, which their SDKs prefer (https://github.com/openai/openai-python, `_base_client.py`).
"""

import math
import re
from dataclasses import dataclass
from email.utils import formatdate
from typing import Literal

from worker.emulators.openai.latency import parse_duration, show_duration

_FORM = re.compile(r"(?:(seconds|date|ms):)?(.+)")


@dataclass(frozen=True, slots=True)
class RetryAfter:
    """How an overloaded server says when to come back."""

    form: Literal["seconds", "date", "ms"] = "seconds"
    delay_s: float | None = None
    """Seconds; None is "auto": the real wait until there is room, as far as the server knows it."""

    def headers(self, wait_s: float, now_s: float) -> dict[str, str]:
        """
        Return the header.

        Args:
            wait_s: The real wait in seconds, used for "auto"; seconds and dates are rounded up, at least to 1.
            now_s: The time of day in Unix seconds, which an HTTP date counts from.
        """
        delay_s = wait_s if self.delay_s is None else self.delay_s
        match self.form:
            case "ms":
                return {"retry-after-ms": str(max(1, math.ceil(delay_s * 1000)))}
            case "date":
                return {"Retry-After": formatdate(math.ceil(now_s + delay_s), usegmt=True)}
        return {"Retry-After": str(math.ceil(delay_s) if self.delay_s is not None else max(1, math.ceil(delay_s)))}

    def __str__(self) -> str:
        delay = "auto" if self.delay_s is None else show_duration(self.delay_s)
        return delay if self.form == "seconds" else f"{self.form}:{delay}"


def parse_retry_after(text: str | float | None) -> RetryAfter | None:
    """
    Return the hint a text describes; None and `none` are no hint at all.

    Args:
        text: `auto`, a duration (`2`, `1500ms`), or one of the two with a form before it: `date:30`, `ms:auto`.

    Raises:
        ValueError: neither.
    """
    if text is None or text == "none":
        return None
    if not isinstance(text, str):
        return RetryAfter(delay_s=parse_duration(text))
    match = _FORM.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is not a Retry-After: write none, auto, 2s, date:30s or ms:1500ms")
    delay_s = None if match[2] == "auto" else parse_duration(match[2])
    match match[1]:
        case "date":
            return RetryAfter("date", delay_s)
        case "ms":
            return RetryAfter("ms", delay_s)
    return RetryAfter("seconds", delay_s)
