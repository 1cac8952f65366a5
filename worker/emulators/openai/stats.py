"""
What the server counted: the other side's evidence in every rehearsal.

A caller that claims "nothing was sent twice" is checked here, by request id and by body.  Two requests with the same
body count as a repeat, so give rehearsal requests bodies that differ.  Memory is bounded: beyond a number of distinct
ids or bodies the oldest are forgotten, and the snapshot says so.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from heapq import nlargest
from typing import Any, Generic, TypeVar

K = TypeVar("K", str, int)

MAX_KEYS = 500_000
"""Distinct ids or bodies remembered: about 60 MB at worst."""
MAX_PATHS = 64
"""Distinct paths counted by name; the rest is `other`."""
MAX_SECONDS = 7200
"""Length of the per-second series: two hours."""
_SHOWN = 10


class Tally(Generic[K]):
    """Counts how often each key was seen, forgetting the oldest keys above a limit."""

    def __init__(self, limit: int = MAX_KEYS) -> None:
        """Remember at most `limit` keys."""
        self._limit = limit
        self._seen: dict[K, int] = {}
        self.distinct = 0
        """Keys seen for the first time, forgotten ones included."""
        self.repeats = 0
        """Sights of a key that had been seen before."""
        self.repeated = 0
        """Keys seen more than once."""

    def add(self, key: K) -> int:
        """Count a sight and return how often the key was seen before."""
        before = self._seen.get(key, 0)
        self._seen[key] = before + 1
        if before:
            self.repeats += 1
            self.repeated += before == 1
        else:
            self.distinct += 1
            if len(self._seen) > self._limit:
                del self._seen[next(iter(self._seen))]
        return before

    @property
    def forgotten(self) -> int:
        """Keys that are no longer remembered: a further sight of one would count as its first."""
        return self.distinct - len(self._seen)

    def most_repeated(self) -> list[tuple[K, int]]:
        """Return the keys seen most often and how often, at most ten, those seen once left out."""
        return [
            (key, times) for key, times in nlargest(_SHOWN, self._seen.items(), key=lambda item: item[1]) if times > 1
        ]


class Stats:
    """Counters of one server; only its event loop touches them."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Start at zero; `clock` gives monotonic seconds."""
        self._clock = clock
        self._watchers: list[tuple[Callable[[Stats], bool], asyncio.Future[None]]] = []
        self.in_flight = 0
        """Requests that have arrived and are not settled; survives a reset."""
        self.reset()

    def reset(self) -> None:
        """Set every counter to zero except the requests in flight."""
        self.started_s = self._clock()
        self.requests = 0
        self.peak_in_flight = self.in_flight
        self.by_path: Counter[str] = Counter()
        self.by_status: Counter[str] = Counter()
        self.by_mode: Counter[str] = Counter()
        """Requests hit by each mode of behaviour."""
        self.request_ids: Tally[str] = Tally()
        self.bodies: Tally[int] = Tally()
        """Bodies received, by the first 8 bytes of their SHA-256."""
        self.generated: Tally[int] = Tally()
        """Bodies generated to completion; its repeats are wasted generations."""
        self.tokens_generated = 0
        self.tokens_repeated = 0
        """Tokens of repeated generations."""
        self.tokens_undelivered = 0
        """Tokens generated for answers that were cut on purpose or whose client left."""
        self.prompt_tokens = 0
        """Of calls that were answered."""
        self.prompt_tokens_cached = 0
        """Of these the ones found in the cache of prefixes."""
        self.client_disconnects = 0
        self._seconds: dict[int, Counter[str]] = {}
        self._notify_watchers()

    def begin(self, path: str) -> None:
        """Count a request that has arrived."""
        self.requests += 1
        self.in_flight += 1
        self.peak_in_flight = max(self.peak_in_flight, self.in_flight)
        known = path in self.by_path or len(self.by_path) < MAX_PATHS
        self.by_path[path if known else "other"] += 1
        second = self._second()
        second["requests"] += 1
        second["peak_in_flight"] = max(second["peak_in_flight"], self.in_flight)
        self._notify_watchers()

    def end(self, status: str) -> None:
        """Count how a request ended: a status, or `reset`, `closed`, `hung`, `cut`, `disconnected`."""
        self.in_flight -= 1
        self.by_status[status] += 1
        self._second()[status] += 1
        self._notify_watchers()

    def identify(self, request_id: str | None, body: int) -> int:
        """Count a request's identities and return how often its body was seen before."""
        if request_id is not None:
            self.request_ids.add(request_id)
        return self.bodies.add(body)

    def complete(self, body: int, tokens: int) -> None:
        """Count a generation that reached its end and was sent whole."""
        again = self.generated.add(body)
        self.tokens_generated += tokens
        self._second()["tokens"] += tokens
        if again:
            self.tokens_repeated += tokens

    def add_prompt(self, tokens: int, cached: int) -> None:
        """Count a prompt and how much of it was cached."""
        self.prompt_tokens += tokens
        self.prompt_tokens_cached += cached

    def add_undelivered(self, tokens: int) -> None:
        """Count tokens generated for an answer that was not delivered whole."""
        self.tokens_generated += tokens
        self.tokens_undelivered += tokens

    def _second(self) -> Counter[str]:
        now = int(self._clock() - self.started_s)
        second = self._seconds.get(now)
        if second is None:
            second = self._seconds[now] = Counter()
            if len(self._seconds) > MAX_SECONDS:
                del self._seconds[next(iter(self._seconds))]
        return second

    def _notify_watchers(self) -> None:
        for predicate, future in self._watchers:
            if not future.done() and predicate(self):
                future.set_result(None)

    async def wait_for(self, predicate: Callable[["Stats"], bool]) -> None:
        """
        Return as soon as a predicate of the counters holds; it is evaluated after every request's begin and end.

        Cancellation: the predicate is evaluated no more.
        """
        future = asyncio.get_running_loop().create_future()
        watcher = (predicate, future)
        self._watchers.append(watcher)
        try:
            if not predicate(self):
                await future
        finally:
            self._watchers.remove(watcher)

    def snapshot(self, *, series: bool = False) -> dict[str, Any]:
        """Return everything counted as JSON; with `series` also what happened in each second since the start."""
        answer: dict[str, Any] = {
            "uptime_s": round(self._clock() - self.started_s, 3),
            "process_cpu_s": round(time.process_time(), 3),
            "requests": self.requests,
            "in_flight": self.in_flight,
            "peak_in_flight": self.peak_in_flight,
            "by_path": dict(self.by_path),
            "by_status": dict(self.by_status),
            "by_mode": dict(self.by_mode),
            "client_disconnects": self.client_disconnects,
            "request_ids": _shown(self.request_ids),
            "bodies": _shown(self.bodies),
            "generations": {
                "completed": self.generated.distinct + self.generated.repeats,
                "distinct_bodies": self.generated.distinct,
                "bodies_generated_again": self.generated.repeated,
                "wasted": self.generated.repeats,
            },
            "tokens": {
                "generated": self.tokens_generated,
                "repeated": self.tokens_repeated,
                "undelivered": self.tokens_undelivered,
            },
            "prompts": {"tokens": self.prompt_tokens, "cached": self.prompt_tokens_cached},
        }
        if series:
            answer["series"] = [{"second": second, **counts} for second, counts in self._seconds.items()]
        return answer


def _shown(tally: Tally[Any]) -> dict[str, Any]:
    repeated = {key if isinstance(key, str) else f"{key:016x}": times for key, times in tally.most_repeated()}
    return {
        "distinct": tally.distinct,
        "repeats": tally.repeats,
        "forgotten": tally.forgotten,
        "most_repeated": repeated,
    }
