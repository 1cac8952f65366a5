"""
One thing to do wrong: whom it hits, how often, for how long.

Pure: the clock is handed in, chance comes from the seed.  `control` makes behaviours out of JSON and picks among them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from worker.emulators.openai.dice import Dice
from worker.emulators.openai.modes import Mode, Stage
from worker.emulators.openai.readers import Reader, flag, text, texts


@dataclass(frozen=True, slots=True)
class Facts:
    """What a filter can see of a request."""

    path: str
    model: str | None
    stream: bool
    headers: Mapping[str, str]
    """Case-insensitive names."""
    data: bytes
    """The body as it came."""
    metadata: Mapping[str, Any]
    """The body's own `metadata` object; empty when there is none."""
    is_inference: bool


@dataclass(frozen=True, slots=True)
class Match:
    """Filters, all of which must hold; None does not filter."""

    path: str | None = None
    """Shell pattern, for example `/v1/chat/*`."""
    model: str | None = None
    """Shell pattern."""
    stream: bool | None = None
    header: Mapping[str, str] | None = None
    """Header names and a text each value must contain."""
    metadata: Mapping[str, str] | None = None
    """Keys of the body's `metadata` and a text each value must contain."""
    body: str | None = None
    """A text the body must contain, compared as UTF-8 bytes."""

    def holds(self, facts: Facts) -> bool:
        """Return whether the request passes every filter."""
        return (
            (self.path is None or fnmatchcase(facts.path, self.path))
            and (self.model is None or (facts.model is not None and fnmatchcase(facts.model, self.model)))
            and (self.stream is None or facts.stream is self.stream)
            and (self.body is None or self.body.encode() in facts.data)
            and all(part in facts.headers.get(name, "\0") for name, part in (self.header or {}).items())
            and all(part in str(facts.metadata.get(key, "\0")) for key, part in (self.metadata or {}).items())
        )


MATCH_READERS: Mapping[str, Reader] = {
    "path": text,
    "model": text,
    "stream": flag,
    "header": texts,
    "metadata": texts,
    "body": text,
}


@dataclass(slots=True)
class Behaviour:
    """One thing to do wrong; the counters are the only parts that change."""

    mode: Mode
    params: Mapping[str, Any]
    name: str
    match: Match = field(default_factory=Match)
    count: int | None = None
    """Requests it hits before it is spent; None is no limit."""
    skip: int = 0
    """Matching requests it lets pass first."""
    probability: float = 1.0
    """Share of the remaining matching requests that it hits."""
    for_s: float | None = None
    """Seconds it lasts; None is until it is removed."""
    after_s: float = 0.0
    """Seconds before it begins."""
    since_s: float = 0.0
    """Clock reading when it was set."""
    seen: int = 0
    """Matching requests while it was active."""
    hits: int = 0

    def state(self, now_s: float) -> str:
        """Return `pending`, `active` or `spent`."""
        begins_s = self.since_s + self.after_s
        if now_s < begins_s:
            return "pending"
        over = self.for_s is not None and now_s >= begins_s + self.for_s
        return "spent" if over or (self.count is not None and self.hits >= self.count) else "active"

    def takes(self, facts: Facts, now_s: float, seed: int) -> bool:
        """Return whether it hits this request, and count that it was asked."""
        wrong_form = facts.stream if self.mode.unary_only else self.mode.stage is Stage.STREAM and not facts.stream
        in_scope = facts.is_inference or self.mode.whole_server or self.match.path is not None
        if self.state(now_s) != "active" or not in_scope or wrong_form:
            return False
        if not self.match.holds(facts):
            return False
        self.seen += 1
        if self.seen <= self.skip:
            return False
        if self.probability < 1 and Dice(seed, self.name, self.seen).uniform("hit") >= self.probability:
            return False
        self.hits += 1
        return True

    def as_json(self, now_s: float) -> dict[str, Any]:
        """Return it as it was set, with what became of it."""
        given = {key: value for key in MATCH_READERS if (value := getattr(self.match, key)) is not None}
        limits = {"count": self.count, "skip": self.skip, "probability": self.probability}
        times = {"for_s": self.for_s, "after_s": self.after_s}
        outcome = {"state": self.state(now_s), "seen": self.seen, "hits": self.hits}
        params = {key: value if _is_json(value) else str(value) for key, value in self.params.items()}
        return {"mode": self.mode.name, "name": self.name, **params, "match": given, **limits, **times, **outcome}


def _is_json(value: object) -> bool:
    return value is None or isinstance(value, str | int | float | bool | dict)
