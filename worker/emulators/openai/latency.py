"""
Times and rates: how people write them, and how one is drawn.

A latency is a small value that draws from a uniform number it is handed, so that the same request waits equally long in
every run.  Durations are float seconds everywhere; only the text forms know other units.
"""

import math
import re
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

_UNITS_S = {"us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}
_DURATION = re.compile(r"(\d+(?:\.\d*)?|\.\d+)\s*([a-zµ]*)")
_RATE = re.compile(r"(\d+(?:\.\d*)?|\.\d+)\s*(?:/\s*(s|sec|second|m|min|minute|h|hour))?")
_PER_S = {"s": 1.0, "m": 60.0, "h": 3600.0}
_NORMAL = NormalDist()
MAX_DURATION_S = 7 * 24 * 3600.0
"""A week; a longer wait is a mistake in the unit."""


def parse_duration(text: str | float) -> float:
    """
    Return a duration in seconds.

    Args:
        text: A number (seconds) or a text such as `50ms`, `1.5s`, `2m`, `250us`, `0`.

    Raises:
        ValueError: not a duration, negative, or longer than a week.
    """
    if isinstance(text, str):
        match = _DURATION.fullmatch(text.strip())
        if match is None or match[2] not in _UNITS_S:
            raise ValueError(f"{text!r} is not a duration: write 50ms, 1.5s, 2m or a number of seconds")
        seconds = float(match[1]) * _UNITS_S[match[2]]
    elif isinstance(text, bool) or not isinstance(text, int | float):
        raise ValueError(f"{text!r} is not a duration")  # noqa: TRY004 - a reader promises ValueError
    else:
        seconds = float(text)
    if not 0 <= seconds <= MAX_DURATION_S:
        raise ValueError(f"{text!r} is not a duration between 0 and a week")
    return seconds


def show_duration(seconds: float) -> str:
    """Return the shortest text that `parse_duration` reads back as the same number."""
    return f"{seconds * 1000:.6g}ms" if 0 < seconds < 1 else f"{seconds:.10g}s" if seconds else "0"


@dataclass(frozen=True, slots=True)
class Latency:
    """
    A distribution of waiting times.

    `fixed` is always `a`; `uniform` lies between `a` and `b`; `lognormal` has the median `a` and the standard deviation
    `b` of its logarithm, which is the shape that measured inference latencies have: a long tail to the right.
    """

    kind: Literal["fixed", "uniform", "lognormal"] = "fixed"
    a: float = 0.0
    """Seconds."""
    b: float = 0.0
    """Seconds for `uniform`, without a unit for `lognormal`."""

    def draw(self, u: float) -> float:
        """
        Return the waiting time in seconds at which the distribution function reaches `u`.

        Args:
            u: A number strictly between 0 and 1; a uniform one makes the result follow the distribution.
        """
        if self.kind == "fixed":
            return self.a
        if self.kind == "uniform":
            return self.a + u * (self.b - self.a)
        return self.a * math.exp(self.b * _NORMAL.inv_cdf(u))

    @property
    def is_zero(self) -> bool:
        """Whether every draw is 0."""
        return self.a == 0 and (self.kind != "uniform" or self.b == 0)

    def __str__(self) -> str:
        if self.kind == "fixed":
            return show_duration(self.a)
        second = show_duration(self.b) if self.kind == "uniform" else f"{self.b:.10g}"
        return f"{self.kind}:{show_duration(self.a)},{second}"


def parse_latency(text: str | float) -> Latency:
    """
    Return the distribution a text describes.

    Args:
        text: `50ms` (always), `uniform:LOW,HIGH`, `lognormal:MEDIAN,SIGMA` (for example `lognormal:2s,0.8`), or a
            number of seconds.

    Raises:
        ValueError: unknown distribution, wrong number of values, a bad duration, or `LOW` above `HIGH`.
    """
    if not isinstance(text, str) or ":" not in text:
        return Latency(a=parse_duration(text))
    kind, _, rest = text.partition(":")
    values = rest.split(",")
    if len(values) != 2:  # noqa: PLR2004 - both distributions have two parameters
        raise ValueError(f"{text!r}: {kind} takes two values, for example uniform:50ms,2s or lognormal:2s,0.8")
    low = parse_duration(values[0])
    match kind.strip():
        case "uniform":
            high = parse_duration(values[1])
            if high < low:
                raise ValueError(f"{text!r}: the lower bound is above the upper bound")
            return Latency("uniform", low, high)
        case "lognormal":
            sigma = parse_duration(values[1])
            if sigma > 5:  # noqa: PLR2004 - at 5 one request in 20 takes 3,700 medians
                raise ValueError(f"{text!r}: sigma must be between 0 and 5")
            return Latency("lognormal", low, sigma)
    raise ValueError(f"{text!r}: unknown distribution {kind!r}; there are uniform and lognormal")


def parse_rate(text: str | float) -> float:
    """
    Return a rate in requests per second.

    Args:
        text: `50/s`, `600/min`, `1000/h`, or a number per second.

    Raises:
        ValueError: not a rate, or not above 0.
    """
    if isinstance(text, str):
        match = _RATE.fullmatch(text.strip())
        if match is None:
            raise ValueError(f"{text!r} is not a rate: write 50/s, 600/min or a number per second")
        rate = float(match[1]) / _PER_S[(match[2] or "s")[0]]
    elif isinstance(text, bool) or not isinstance(text, int | float):
        raise ValueError(f"{text!r} is not a rate")  # noqa: TRY004 - a reader promises ValueError
    else:
        rate = float(text)
    if not 0 < rate < math.inf:
        raise ValueError(f"{text!r}: a rate must be above 0")
    return rate


class TokenBucket:
    """
    Lets `rate_per_s` requests a second through, after an idle time a burst of one second's worth at once.

    Time is handed in, so that a test decides what time it is.
    """

    def __init__(self, rate_per_s: float, now_s: float) -> None:
        """Start full, at the clock reading `now_s` in seconds."""
        self._rate = rate_per_s
        self._burst = max(1.0, rate_per_s)
        self._level = self._burst
        self._seen_s = now_s

    def take(self, now_s: float) -> float:
        """Return 0 and take a token, or return in how many seconds there will be one."""
        self._level = min(self._burst, self._level + (now_s - self._seen_s) * self._rate)
        self._seen_s = now_s
        if self._level >= 1:
            self._level -= 1
            return 0.0
        return (1 - self._level) / self._rate
