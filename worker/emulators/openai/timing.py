"""
Times and rates: how a person writes them, how long an answer takes, and when a rejected client is told to come back.

Pure: a latency draws from a uniform number that its caller passes, a token bucket is told the time, so the same request
waits equally long in every run.  Durations are float seconds everywhere; only the text forms know other units.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import formatdate
from itertools import pairwise
from statistics import NormalDist
from typing import Any, Literal

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

    The time is an argument, so that a test decides it.
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


_STEP = re.compile(r"(?:(?P<at>[^:/]+):)?(?P<knee>[\d.]+)(?:/(?P<limit>\d+))?")
_PLAN_KEYS = {"steps", "exponent", "repeat_s"}
_STEP_KEYS = {"at_s", "knee", "limit"}


@dataclass(frozen=True, slots=True)
class Step:
    """What the server can do from one moment on."""

    at_s: float
    """Seconds since the plan was set; the first step counts from 0 whatever it says."""
    knee: float
    """Requests in service up to which latency does not grow; above 0."""
    limit: int | None = None
    """Requests in service above which more are refused; None is never."""


@dataclass(frozen=True, slots=True)
class CapacityPlan:
    """
    A hidden capacity that changes over time, for rehearsing what has to find it: steps in time order, at least one.

    The model is the one that batching inference servers approach: up to the *knee* requests run side by side at full
    speed; above it they share, so latency grows with the number in service and throughput stays (exponent 1) or falls
    (above 1).  A *limit* refuses further requests.  The factor is taken when a request starts; a long request does not
    speed up when others end, so a wrong guess costs a little more than on a real server.
    """

    steps: tuple[Step, ...]
    exponent: float = 1.0
    """How steeply latency grows above the knee: latency x (in service / knee) ** exponent."""
    repeat_s: float | None = None
    """Seconds after which the plan starts again; None holds the last step for ever."""

    def step(self, elapsed_s: float) -> Step:
        """Return the step in force `elapsed_s` seconds after the plan was set."""
        if self.repeat_s is not None:
            elapsed_s %= self.repeat_s
        current = self.steps[0]
        for step in self.steps[1:]:
            if step.at_s > elapsed_s:
                break
            current = step
        return current

    def factor(self, in_service: int, elapsed_s: float) -> float:
        """Return by what a latency is multiplied when `in_service` requests (this one included) share the server."""
        load = in_service / self.step(elapsed_s).knee
        return 1.0 if load <= 1 else math.pow(load, self.exponent)

    def as_json(self) -> dict[str, Any]:
        """Return the plan as `parse_capacity` reads it."""
        steps = [{"at_s": step.at_s, "knee": step.knee, "limit": step.limit} for step in self.steps]
        return {"steps": steps, "exponent": self.exponent, "repeat_s": self.repeat_s}


def _number(value: object, name: str, low: float = 0.0) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not low < value < math.inf:
        raise ValueError(f"capacity: {name} must be a number above {low:g}, not {value!r}")
    return float(value)


def _step(raw: object) -> Step:
    if not isinstance(raw, Mapping) or "knee" not in raw or raw.keys() - _STEP_KEYS:
        raise ValueError(f"capacity: a step has the keys at_s, knee, limit (knee is required), not {raw!r}")
    limit = raw.get("limit")
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise ValueError(f"capacity: limit must be an integer above 0, not {limit!r}")
    return Step(_number(raw.get("at_s", 0), "at_s", -1e-9), _number(raw["knee"], "knee"), limit)


def _from_text(text: str) -> list[dict[str, Any]]:
    steps = []
    for part in text.split(","):
        match = _STEP.fullmatch(part.strip())
        if match is None:
            raise ValueError(f"{text!r} is not a capacity: write 16, 16/32 or 0:16/32,30:4/8 (seconds:knee/limit)")
        try:
            at_s, knee = float(match["at"] or 0), float(match["knee"])
        except ValueError:
            raise ValueError(f"{part!r} is not a step of a capacity: seconds:knee/limit") from None
        steps.append({"at_s": at_s, "knee": knee, "limit": int(match["limit"]) if match["limit"] else None})
    return steps


def parse_capacity(value: object) -> CapacityPlan | None:
    """
    Return the plan a text, a number or a JSON object describes; None and `none` are unlimited capacity.

    Args:
        value: `16` (a knee), `16/32` (knee and limit), `0:16/32,30:4/8` (from second 0 a knee of 16 and a limit of 32,
            from second 30 on 4 and 8), or `{"steps": [{"at_s", "knee", "limit"}], "exponent", "repeat_s"}`.

    Raises:
        ValueError: unknown keys, no steps, steps out of order, numbers out of range.
    """
    if value is None or value == "none":
        return None
    plan: Mapping[str, Any]
    if isinstance(value, Mapping):
        plan = value
    elif isinstance(value, str):
        plan = {"steps": _from_text(value)}
    else:
        plan = {"steps": [{"knee": value}]}
    if unknown := sorted(plan.keys() - _PLAN_KEYS):
        raise ValueError(f"capacity: unknown keys: {', '.join(unknown)}; there are {', '.join(sorted(_PLAN_KEYS))}")
    raw_steps = plan.get("steps")
    if not isinstance(raw_steps, list) or not raw_steps:
        raise ValueError("capacity: steps must be a list with at least one step")
    steps = tuple(_step(raw) for raw in raw_steps)
    if any(later.at_s <= earlier.at_s for earlier, later in pairwise(steps)):
        raise ValueError("capacity: steps must come in the order of their at_s")
    repeat_s = plan.get("repeat_s")
    return CapacityPlan(
        steps,
        _number(plan.get("exponent", 1.0), "exponent", -1e-9),
        None if repeat_s is None else _number(repeat_s, "repeat_s"),
    )


_HINT_FORM = re.compile(r"(?:(seconds|date|ms):)?(.+)")


@dataclass(frozen=True, slots=True)
class RetryAfter:
    """
    How an overloaded server says when to come back, in the three forms that clients meet.

    Source: RFC 9110, section 10.2.3 (whole seconds or an HTTP date); OpenAI's and Azure's servers also send
    `retry-after-ms`, which their SDKs prefer (https://github.com/openai/openai-python, `_base_client.py`).
    """

    form: Literal["seconds", "date", "ms"] = "seconds"
    delay_s: float | None = None
    """Seconds; None is "auto": the real wait until a request is accepted, as far as the server knows it."""

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
    match = _HINT_FORM.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is not a Retry-After: write none, auto, 2s, date:30s or ms:1500ms")
    delay_s = None if match[2] == "auto" else parse_duration(match[2])
    match match[1]:
        case "date":
            return RetryAfter("date", delay_s)
        case "ms":
            return RetryAfter("ms", delay_s)
    return RetryAfter("seconds", delay_s)
