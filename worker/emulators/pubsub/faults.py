"""
The test interface: make the server fail, slow down, hang up, count and tell.

A rehearsal tool as much as a test tool: what a worker does when acks are refused for a minute can be tried here and
nowhere else.  Faults act at the edge of the server, before or after the engine did the work; the engine itself never
lies.  A fault *after* the work is the nasty kind: the message is published, and the publisher told otherwise.

Threads: every method of `Faults` may be called from any thread while the server runs, and from the server's own loop.
"""

import asyncio
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol, TypeVar

import grpc

from worker.emulators.pubsub.errors import InjectedError, PubSubError
from worker.emulators.pubsub.subscription import SubscriptionSnapshot

T = TypeVar("T")

RunOnLoop = Callable[[Callable[[], object]], object]
"""Runs a function where the server's state may be touched, and returns its result."""


class LiveStream(Protocol):
    """An open StreamingPull."""

    @property
    def subscription_path(self) -> str:
        """What it pulls from."""
        ...

    def break_off(self, error: PubSubError) -> None:
        """End it with this error, soon."""
        ...


@dataclass(slots=True)
class _Rule:
    """One wish: what happens to calls of a method, and to how many more (`None`: until cleared)."""

    delay_s: float
    error: InjectedError | None
    is_after: bool
    left: int | None


class CallFaults:
    """What was decided for one call when it arrived."""

    def __init__(self, rules: Iterable[_Rule]) -> None:
        self._before = [(rule.delay_s, rule.error) for rule in rules if not rule.is_after]
        self._after = [(rule.delay_s, rule.error) for rule in rules if rule.is_after]

    async def before(self) -> None:
        """Wait or raise instead of doing the work.  Cancellation: nothing was done."""
        await _suffer(self._before)

    async def after(self) -> None:
        """Wait or raise although the work was done.  Cancellation: the work stays done."""
        await _suffer(self._after)


class Faults:
    """
    What tests may do to a running server.  Methods are named as in the API: `Publish`, `Acknowledge`, `StreamingPull`.

    Args:
        methods: All there are; any other name is a mistake in the test.
        inspect: Returns the snapshot of a subscription by its path.
        streams: The open StreamingPulls, live.
        run_on_loop: See `RunOnLoop`.
    """

    def __init__(
        self,
        methods: Iterable[str],
        inspect: Callable[[str], SubscriptionSnapshot],
        streams: Iterable[LiveStream],
        run_on_loop: RunOnLoop,
    ) -> None:
        self._methods = frozenset(methods)
        self._inspect = inspect
        self._streams = streams
        self._run_on_loop = run_on_loop
        self._rules: dict[str, list[_Rule]] = {}
        self._calls: Counter[str] = Counter()

    def fail(
        self,
        method: str,
        code: grpc.StatusCode,
        *,
        times: int | None = None,
        message: str = "injected by a test",
        after: bool = False,
    ) -> None:
        """
        Let calls of a method fail.  For `StreamingPull` this refuses new streams; open ones go on.

        Args:
            method: The method.
            code: The status answered.
            times: So many calls; `None` until `clear`.
            message: The text answered.
            after: Do the work first, then answer the error.
        """
        self._add(method, _Rule(0.0, InjectedError(code.name, message), after, times))

    def delay(self, method: str, seconds: float, *, times: int | None = None, after: bool = False) -> None:
        """
        Let calls of a method take longer.

        Args:
            method: The method.
            seconds: Added to each call; a large number makes it hang until the client gives up.
            times: So many calls; `None` until `clear`.
            after: Do the work at once and hold back the answer only.
        """
        self._add(method, _Rule(seconds, None, after, times))

    def clear(self, method: str | None = None) -> None:
        """Forget the faults of a method, or all; calls already held back stay so."""
        if method is None:
            self._on_loop(self._rules.clear)
        else:
            self._on_loop(lambda: self._rules.pop(self._checked(method), None))

    def calls(self, method: str) -> int:
        """Return how many calls of a method arrived since the start or `reset_calls`, failed ones included."""
        return self._on_loop(lambda: self._calls[self._checked(method)])

    def reset_calls(self) -> None:
        """Start counting at 0 again."""
        self._on_loop(self._calls.clear)

    def inspect(self, subscription_path: str) -> SubscriptionSnapshot:
        """
        Return what a subscription holds at this moment: ready, leased, backing off, attempts, counts.

        Raises:
            NotFoundError: There is no such subscription.  Permanent.
        """
        return self._on_loop(lambda: self._inspect(subscription_path))

    def break_streams(
        self, code: grpc.StatusCode, *, message: str = "broken by a test", subscription_path: str | None = None
    ) -> int:
        """
        End open StreamingPulls as a server or a proxy would.

        Args:
            code: The status they end with.
            message: Its text.
            subscription_path: Only those of this subscription; `None` for all.

        Returns:
            How many were open.
        """

        def break_matching() -> int:
            matching = [s for s in self._streams if subscription_path in (None, s.subscription_path)]
            for stream in matching:
                stream.break_off(InjectedError(code.name, message))
            return len(matching)

        return self._on_loop(break_matching)

    def arrive(self, method: str) -> CallFaults | None:
        """Count a call and decide what happens to it; for the server, on its loop."""
        self._calls[method] += 1
        rules = self._rules.get(method)
        if not rules:
            return None
        due = list(rules)
        for rule in due:
            if rule.left is not None:
                rule.left -= 1
        self._rules[method] = [rule for rule in rules if rule.left is None or rule.left > 0]
        return CallFaults(due)

    def _add(self, method: str, rule: _Rule) -> None:
        self._on_loop(lambda: self._rules.setdefault(self._checked(method), []).append(rule))

    def _checked(self, method: str) -> str:
        if method not in self._methods:
            raise ValueError(f"no method {method!r}; there are {', '.join(sorted(self._methods))}")
        return method

    def _on_loop(self, function: Callable[[], T]) -> T:
        return self._run_on_loop(function)  # type: ignore[return-value]  # the runner returns what the function does


async def _suffer(faults: Iterable[tuple[float, InjectedError | None]]) -> None:
    for delay_s, error in faults:
        if delay_s > 0:
            await asyncio.sleep(delay_s)
        if error is not None:
            raise error
