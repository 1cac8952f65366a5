"""
The shape of operators' rules: what may be written in a rule, and what no rule may say.

A rule says what to match and what to do instead of the built-in table.  What it means is in `matching`; reading rules
and naming faults is in `load`.
"""

import re
from typing import Annotated, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    model_validator,
)

from worker.policy.model import BreakerAction, Disposition, ErrorClass, Fault, Phase, Scope
from worker.policy.rules.regex import RegexError, compile_regex
from worker.wire.http import is_success

_NOT_JUDGED = frozenset(
    {
        ErrorClass.BAD_MESSAGE,
        ErrorClass.CANCELLED,
        ErrorClass.DEADLINE_EXCEEDED,
        ErrorClass.IDEMPOTENCY_CONFLICT,
    }
)
"""Classes the worker gives without asking the table, so that a rule on one of them could never match."""


def _as_tuple(value: object) -> object:
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def _as_statuses(value: object) -> object:
    """Expand `429`, `5xx` and lists of them to the set of statuses."""
    statuses: set[int] = set()
    for item in value if isinstance(value, list | tuple | set | frozenset) else [value]:
        if isinstance(item, str) and re.fullmatch(r"[2-5]xx", item):
            statuses |= set(range(int(item[0]) * 100, int(item[0]) * 100 + 100))
        elif isinstance(item, int) and not isinstance(item, bool) and 100 <= item <= 599:  # noqa: PLR2004 all of HTTP's
            statuses.add(item)
        else:
            msg = f"{item!r} is not a status: give 100 to 599, or a class such as 5xx"
            raise ValueError(msg)
    if not statuses:
        msg = "names no status"
        raise ValueError(msg)
    return frozenset(statuses)


def _as_range(value: object) -> object:
    return {"min": value, "max": value} if isinstance(value, int) and not isinstance(value, bool) else value


def _regex(pattern: str) -> str:
    try:
        compile_regex(pattern)
    except RegexError as error:
        msg = f"not a usable regular expression: {error}"
        raise ValueError(msg) from error
    return pattern


class _Part(BaseModel):
    # Validators are built with the first rule: most workers have none.
    model_config = ConfigDict(extra="forbid", frozen=True, coerce_numbers_to_str=True, defer_build=True)


class Range(_Part):
    """A number as it is, or `{min, max}`, both included."""

    min: int | None = Field(default=None, ge=1)
    max: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.min is None and self.max is None:
            msg = "needs min or max"
            raise ValueError(msg)
        if self.min is not None and self.max is not None and self.min > self.max:
            msg = "min is above max"
            raise ValueError(msg)
        return self


_Words = Annotated[
    tuple[Annotated[str, Field(min_length=1, max_length=256)], ...], BeforeValidator(_as_tuple), Field(min_length=1)
]
_Regex = Annotated[str, Field(min_length=1), AfterValidator(_regex)]
_Range = Annotated[Range, BeforeValidator(_as_range)]


class Match(_Part):
    """What a rule applies to; every key that is given must fit, and of a list any one."""

    backend: _Words | None = None
    """Names of routes; `*` and `?` as in file names."""
    path: _Words | None = None
    """Paths of requests, with `*` and `?`."""
    model: _Words | None = None
    """Models of requests, with `*` and `?`; a request without one fits no pattern."""
    phase: Annotated[tuple[Phase, ...], BeforeValidator(_as_tuple), Field(min_length=1)] | None = None
    status: Annotated[frozenset[int], BeforeValidator(_as_statuses)] | None = None
    """Statuses or classes of them; inside a stream the one that the error event names."""
    type: _Words | None = None
    """The error's `type`, exactly."""
    code: _Words | None = None
    """The error's `code` or Azure's inner code, exactly; a number is compared as text."""
    param: _Words | None = None
    exception: Annotated[tuple[Fault, ...], BeforeValidator(_as_tuple), Field(min_length=1)] | None = None
    """What broke when no complete response came."""
    message_regex: _Regex | None = None
    """Occurs in the error's message; RE2 syntax."""
    body_regex: _Regex | None = None
    """Occurs in the first 8 KiB of the body; RE2 syntax."""
    error_class: Annotated[tuple[ErrorClass, ...], BeforeValidator(_as_tuple), Field(min_length=1)] | None = Field(
        default=None, alias="class"
    )
    """The class that the built-in table gives."""
    delivery_attempt: _Range | None = None
    """The broker's count; does not fit where attempts are not counted."""
    attempts: _Range | None = None
    """Attempts in this process."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.model_fields_set:
            msg = 'is empty and would match everything; say backend: "*" if that is meant'
            raise ValueError(msg)
        never = _NOT_JUDGED.intersection(self.error_class or ())
        if never:
            msg = f"class {min(never)} is given by the worker itself; no rule sees it"
            raise ValueError(msg)
        return self


class BackoffRule(_Part):
    """Backoff between attempts in this process: full jitter below `base_s` doubled per attempt, at most `max_s`."""

    base_s: float = Field(default=1.0, gt=0, le=3600, allow_inf_nan=False)
    max_s: float = Field(default=60.0, gt=0, le=86_400, allow_inf_nan=False)
    jitter: Literal["full"] = "full"

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.base_s > self.max_s:
            msg = "base_s is above max_s"
            raise ValueError(msg)
        return self


class ReplyRule(_Part):
    """What an answer looks like when it comes to one."""

    status: int | None = Field(default=None, ge=400, le=599)
    """Never a success: an error is not an answer."""
    code: str | None = Field(default=None, min_length=1, max_length=64, pattern=r"^[A-Za-z0-9_.-]+$")
    """`error.code`; with it the envelope is used instead of the backend's own body."""


class Rule(_Part):
    """One rule: a name, what it applies to, and at least one thing to do."""

    name: str = Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9_.\[\]-]+$")
    """Stands in log, metric and `policy explain`; unique.  Left out: `rules[<index>]`."""
    match: Match
    error_class: ErrorClass | None = Field(default=None, alias="class")
    """Re-classifies; the built-in row of this class then applies, as far as the rule says nothing else."""
    do: Disposition | None = None
    counts: bool | None = None
    """Whether it may cost a delivery attempt: `false` is another word for `do: hold`, `true` for `do: nack`."""
    backoff: BackoffRule | None = None
    honor_retry_after: bool = True
    hold_max_s: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    max_attempts: int | None = Field(default=None, ge=1, le=100)
    breaker: Literal[BreakerAction.NONE, BreakerAction.COUNT, BreakerAction.TRIP] | None = None
    scope: Scope | None = None
    reply: ReplyRule | None = None

    @property
    def disposition(self) -> Disposition | None:
        """What the rule wants done; `None` leaves it to the row."""
        if self.do is not None or self.counts is None:
            return self.do
        return Disposition.NACK if self.counts else Disposition.HOLD

    @property
    def sees_success(self) -> bool:
        """Whether the rule asks for good answers too: only one that names a success status does."""
        is_named = self.match.status is not None and any(map(is_success, self.match.status))
        return is_named and self.match.error_class is None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.model_fields_set - {"name", "match"}:
            msg = "does nothing: give class, do, or another action"
            raise ValueError(msg)
        if self.counts is not None and self.do is not None and self.counts != (self.do is Disposition.NACK):
            msg = f"counts: {str(self.counts).lower()} contradicts do: {self.do} (only a nack costs a delivery attempt)"
            raise ValueError(msg)
        if self.sees_success and self.error_class is None:
            msg = "matches a success status, so it must say by `class` what kind of error that is"
            raise ValueError(msg)
        return self
