"""
A hidden capacity that changes over time, for rehearsing whatever has to find it.

The model is the one that batching inference servers approach: up to the *knee* requests run side by side at full speed;
above it they share, so latency grows with the number in service and throughput stays (exponent 1) or falls (above 1).
A *limit* refuses what comes on top.  The factor is taken when a request starts; a long request does not speed up when
others leave, which makes a wrong guess cost a little more than on a real server.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

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
    """Steps in time order, at least one."""

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
        crowd = in_service / self.step(elapsed_s).knee
        return 1.0 if crowd <= 1 else math.pow(crowd, self.exponent)

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
