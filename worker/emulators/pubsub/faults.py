"""
The interface for tests: let calls fail or take longer, end streams, count calls, and inspect subscriptions.

Faults are applied at the edge of the server, before or after the engine did the work; the engine itself is unchanged.
A fault *after* the work is the harder case for a client: the message is published, and the publisher gets an error.

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
"""Runs a function in the thread that owns the server's state, and returns its result."""


class LiveStream(Protocol):
    """An open StreamingPull."""

    @property
    def subscription_path(self) -> str:
        """Path of the subscription."""
        ...

    def break_off(self, error: PubSubError) -> None:
        """End the stream with this error."""
        ...

    def mute(self) -> None:
        """Send nothing more on it."""
        ...


@dataclass(slots=True)
class _Rule:
    """One fault: what happens to the calls of a method, and to how many more of them (`None`: until cleared)."""

    delay_s: float
    error: InjectedError | None
    is_after: bool
    left: int | None


class CallFaults:
    """The faults of one call, fixed when it arrived."""

    def __init__(self, rules: Iterable[_Rule]) -> None:
        self._before = [(rule.delay_s, rule.error) for rule in rules if not rule.is_after]
        self._after = [(rule.delay_s, rule.error) for rule in rules if rule.is_after]

    async def before(self) -> None:
        """Wait or raise before the work is done.  Cancellation: the work was not done."""
        await _apply(self._before)

    async def after(self) -> None:
        """Wait or raise after the work was done.  Cancellation: the work stays done."""
        await _apply(self._after)


class Faults:
    """
    The faults and counters of a running server.  Methods are named as in the API: `Publish`, `StreamingPull`.

    Args:
        methods: All names of methods; any other name raises ValueError.
        inspect: Returns the snapshot of a subscription, given its path.
        streams: The open StreamingPulls; read at each call of `break_streams`.
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
        Let calls of a method fail.  For `StreamingPull` new streams are refused; open ones are not changed.

        Args:
            method: The method.
            code: The gRPC status of the answer.
            times: Number of calls; `None` for all calls until `clear`.
            message: The text of the answer.
            after: Do the work first, then answer with the error.
        """
        self._add(method, _Rule(0.0, InjectedError(code.name, message), after, times))

    def delay(self, method: str, seconds: float, *, times: int | None = None, after: bool = False) -> None:
        """
        Let calls of a method take longer.

        Args:
            method: The method.
            seconds: Added to each call; a call with a large number ends at the client's deadline.
            times: Number of calls; `None` for all calls until `clear`.
            after: Do the work at once and delay only the answer.
        """
        self._add(method, _Rule(seconds, None, after, times))

    def clear(self, method: str | None = None) -> None:
        """Remove the faults of a method, or all faults; calls that wait already are not changed."""
        if method is None:
            self._on_loop(self._rules.clear)
        else:
            self._on_loop(lambda: self._rules.pop(self._checked(method), None))

    def calls(self, method: str) -> int:
        """Return the number of calls of a method since the start or `reset_calls`, failed ones included."""
        return self._on_loop(lambda: self._calls[self._checked(method)])

    def reset_calls(self) -> None:
        """Set all counts of calls to 0."""
        self._on_loop(self._calls.clear)

    def inspect(self, subscription_path: str) -> SubscriptionSnapshot:
        """
        Return the state of a subscription at this moment.

        Raises:
            NotFoundError: The subscription does not exist.  Permanent.
        """
        return self._on_loop(lambda: self._inspect(subscription_path))

    def break_streams(
        self, code: grpc.StatusCode, *, message: str = "broken by a test", subscription_path: str | None = None
    ) -> int:
        """
        End open StreamingPulls, as a server or a proxy may.

        Args:
            code: The gRPC status they end with.
            message: The text of that status.
            subscription_path: Only the streams of this subscription; `None` for all streams.

        Returns:
            Number of streams ended.
        """

        def break_matching() -> int:
            matching = [s for s in self._streams if subscription_path in (None, s.subscription_path)]
            for stream in matching:
                stream.break_off(InjectedError(code.name, message))
            return len(matching)

        return self._on_loop(break_matching)

    def mute_streams(self) -> None:
        """Let open StreamingPulls stand and send nothing more, as a server that hangs."""

        def mute() -> None:
            for stream in self._streams:
                stream.mute()

        self._on_loop(mute)

    def arrive(self, method: str) -> CallFaults | None:
        """Count a call and return its faults, if any; called by the server on its loop."""
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
            raise ValueError(f"unknown method {method!r}; known are {', '.join(sorted(self._methods))}")
        return method

    def _on_loop(self, function: Callable[[], T]) -> T:
        return self._run_on_loop(function)  # type: ignore[return-value]  # the runner returns what the function does


async def _apply(faults: Iterable[tuple[float, InjectedError | None]]) -> None:
    for delay_s, error in faults:
        if delay_s > 0:
            await asyncio.sleep(delay_s)
        if error is not None:
            raise error
