"""
Hooks: an operator's own function that may overrule a decision.

An installed package offers `decide(event, default) -> Decision | None` under the entry point group
`inference_worker.error_policy`; several are chained in the order of their names, each seeing what the one before it
decided.  Hooks see errors only, never good answers.

Two parts.  `chain` is pure.  `HookRunner` is the shell around it and the one place of this package that starts
threads: a hook is a stranger's synchronous code, so it runs outside the event loop and inside a time limit.  A thread
cannot be stopped; a hook that hangs keeps its thread, and when all of the few threads hang the table decides at once
without waiting.  The threads are daemons of our own rather than an executor's, since an executor joins its threads
when the interpreter exits and a hung hook would then hang the shutdown.
"""

import asyncio
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from enum import StrEnum
from importlib.metadata import EntryPoint, entry_points

from worker.errors import SettingsError
from worker.policy.model import Decision, ErrorEvent
from worker.policy.text import bounded

GROUP = "inference_worker.error_policy"

DEFAULT_TIMEOUT_S = 0.25
"""For the whole chain of one event; a decision is arithmetic, not a call to somewhere."""

MAX_THREADS = 4
"""Hooks at work at once.  Errors come in bursts of `max_in_flight`, each takes a thread for microseconds."""

Decide = Callable[[ErrorEvent, Decision], object]
"""`decide(event, default) -> Decision | None`; `object`, since what a stranger returns is checked, not believed."""


class HookError(SettingsError):
    """A hook cannot be used; permanent until the operator changes what is installed."""


class HookOutcome(StrEnum):
    """What came of asking the hooks; label of the metric."""

    DEFAULT = "default"
    """None of them objected."""
    OVERRIDDEN = "overridden"
    RAISED = "raised"
    """An exception, or something that is neither a decision nor `None`."""
    TIMED_OUT = "timed_out"
    """Not done within the limit, or no thread left because others hang."""


@dataclass(frozen=True, slots=True)
class Hook:
    """One installed hook."""

    name: str
    decide: Decide


@dataclass(frozen=True, slots=True, kw_only=True)
class HookReport:
    """What the hooks made of a default decision, and how it went."""

    decision: Decision
    outcome: HookOutcome
    hook: str | None = None
    """Name of the hook that overruled, failed or was at work when the time ran out."""
    detail: str = ""
    """For the log: the exception, or what was returned instead of a decision."""


def load_hooks(installed: Iterable[EntryPoint] | None = None) -> tuple[Hook, ...]:
    """
    Import every installed hook, in the order of their names.

    Args:
        installed: Stands for the entry points of the running interpreter.

    Raises:
        HookError: One cannot be imported, is not callable, or shares its name with another; permanent.  Names all.
    """
    points = entry_points(group=GROUP) if installed is None else installed
    hooks: list[Hook] = []
    faults: list[str] = []
    for point in sorted(points, key=lambda point: point.name):
        label = f"error-policy hook {point.name!r} ({point.value})"
        try:
            function = point.load()
        except Exception as error:  # noqa: BLE001 a stranger's module may raise anything when it is imported
            faults.append(f"{label}: cannot be imported: {type(error).__name__}: {error}")
            continue
        if not callable(function):
            faults.append(f"{label}: is not a function")
        elif hooks and hooks[-1].name == point.name:
            faults.append(f"{label}: another hook has the same name")
        else:
            hooks.append(Hook(point.name, function))
    if faults:
        raise HookError(faults)
    return tuple(hooks)


@dataclass(slots=True)
class _Progress:
    """Which hook is at work, for the report of a chain that did not come back."""

    hook: str | None = None


def chain(hooks: Sequence[Hook], event: ErrorEvent, default: Decision, progress: _Progress | None = None) -> HookReport:
    """
    Ask the hooks in order and return what they make of the default.

    The first failure ends the chain with the default: a half-applied chain is what nobody configured.
    """
    decision, outcome, last = default, HookOutcome.DEFAULT, None
    for hook in hooks:
        if progress is not None:
            progress.hook = hook.name
        try:
            wish = hook.decide(event, decision)
        except Exception as error:  # noqa: BLE001 a stranger's code; whatever it raises, the table decides
            return _raised(default, hook.name, error)
        if wish is None or wish is decision:
            continue
        if not isinstance(wish, Decision):
            return _raised(default, hook.name, TypeError(f"returned {type(wish).__name__} instead of a Decision"))
        decision, outcome, last = _sound(wish, decision, hook), HookOutcome.OVERRIDDEN, hook.name
    return HookReport(decision=decision, outcome=outcome, hook=last)


def _sound(wish: Decision, default: Decision, hook: Hook) -> Decision:
    """
    Return a hook's wish without what no hook may do.

    An error stays an error (it has a class and an error status), and what is covered stays covered.
    """
    is_error_status = 400 <= wish.reply_status <= 599  # noqa: PLR2004 HTTP's error statuses
    return replace(
        wish,
        rule=f"hook:{hook.name}",
        error_class=wish.error_class or default.error_class,
        reply_status=wish.reply_status if is_error_status else default.reply_status,
        verbatim=wish.verbatim and (default.verbatim or default.expose_backend),
        expose_backend=wish.expose_backend and default.expose_backend,
    )


def _raised(default: Decision, hook: str | None, error: BaseException) -> HookReport:
    detail = bounded(f"{type(error).__name__}: {error}", 500)
    return HookReport(decision=default, outcome=HookOutcome.RAISED, hook=hook, detail=detail)


class HookRunner:
    """Runs the chain in a thread, within a limit, on at most `max_threads` threads."""

    def __init__(
        self, hooks: Sequence[Hook], *, timeout_s: float = DEFAULT_TIMEOUT_S, max_threads: int = MAX_THREADS
    ) -> None:
        self._hooks = tuple(hooks)
        self._timeout_s = timeout_s
        self._max_threads = max_threads
        self._free = asyncio.Semaphore(max_threads)
        self._hanging = 0

    @property
    def hanging(self) -> int:
        """Threads held by chains that did not come back within the limit."""
        return self._hanging

    async def ask(self, event: ErrorEvent, default: Decision) -> HookReport:
        """
        Return what the hooks decide, or the default when they fail or take too long.

        Waiting for a free thread counts as taking long.

        Cancellation: the hook goes on in its thread; its result is dropped and its thread comes back when it ends.
        """
        if self._hanging >= self._max_threads:
            return self._timed_out(default, None, "every thread is held by a hook that hangs")
        progress = _Progress()
        loop = asyncio.get_running_loop()
        until = loop.time() + self._timeout_s
        try:
            async with asyncio.timeout_at(until):
                await self._free.acquire()
        except TimeoutError:
            return self._timed_out(default, None, "no thread became free")
        answer = self._start(event, default, progress)
        try:
            await asyncio.wait({answer}, timeout=max(0.0, until - loop.time()))
        finally:
            if not answer.done():
                self._hanging += 1
                answer.add_done_callback(self._came_back)
        if answer.done():
            return answer.result()
        return self._timed_out(default, progress.hook, "did not come back in time")

    def _start(self, event: ErrorEvent, default: Decision, progress: _Progress) -> asyncio.Future[HookReport]:
        """Start a thread; its future is never cancelled, so that the thread is given back when it really ends."""
        done: Future[HookReport] = Future()
        done.set_running_or_notify_cancel()

        def work() -> None:
            try:
                report = chain(self._hooks, event, default, progress)
            except BaseException as error:  # noqa: BLE001 the thread's only duty is to report, whatever a hook raises
                report = _raised(default, progress.hook, error)
            done.set_result(report)

        answer = asyncio.wrap_future(done)
        answer.add_done_callback(lambda _: self._free.release())
        try:
            threading.Thread(target=work, name="error-policy-hook", daemon=True).start()
        except RuntimeError as error:  # the process may not start another thread
            done.set_result(_raised(default, None, error))
        return answer

    def _came_back(self, _: asyncio.Future[HookReport]) -> None:
        self._hanging -= 1

    def _timed_out(self, default: Decision, hook: str | None, detail: str) -> HookReport:
        return HookReport(decision=default, outcome=HookOutcome.TIMED_OUT, hook=hook, detail=detail)


__all__ = ["GROUP", "Hook", "HookError", "HookOutcome", "HookReport", "HookRunner", "chain", "load_hooks"]
