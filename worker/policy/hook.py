"""
Hooks: an operator's own function that may overrule a decision.

An installed package offers `decide(event, default) -> Decision | None` under the entry point group
`inference_worker.error_policy`; several are chained in the order of their names, each seeing what the one before it
decided.  Hooks see errors only, never good answers.

A hook runs on the event loop, as every part of this program does: it is arithmetic on an event, not a network call.  A
chain that takes longer than its limit is overruled and counted, so that an operator learns of a hook that slows the
worker down.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from enum import StrEnum
from importlib.metadata import EntryPoint, entry_points

import msgspec

from worker.errors import SettingsError
from worker.policy.model import Decision, ErrorEvent
from worker.policy.normalise import bounded

GROUP = "inference_worker.error_policy"

DEFAULT_TIMEOUT_S = 0.25
"""For the whole chain of one event, seconds; far above arithmetic, far below what other deliveries would notice."""

Decide = Callable[[ErrorEvent, Decision], object]
"""`decide(event, default) -> Decision | None`; `object`, since what it returns is checked."""


class HookError(SettingsError):
    """A hook cannot be used; permanent until the operator changes what is installed."""


class HookOutcome(StrEnum):
    """What came of asking the hooks; label of the metric."""

    DEFAULT = "default"
    """No hook returned another decision."""
    OVERRIDDEN = "overridden"
    RAISED = "raised"
    """An exception, or something that is neither a decision nor `None`."""
    TIMED_OUT = "timed_out"
    """It took longer than the limit."""


class Hook(msgspec.Struct, frozen=True):
    """One installed hook."""

    name: str
    decide: Decide


class HookReport(msgspec.Struct, frozen=True, kw_only=True):
    """What the hooks made of a default decision, and how it went."""

    decision: Decision
    outcome: HookOutcome
    hook: str | None = None
    """Name of the hook that overruled or failed; the last one asked when the time ran out."""
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
        except Exception as error:  # noqa: BLE001 an operator's module may raise anything when it is imported
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


def chain(hooks: Sequence[Hook], event: ErrorEvent, default: Decision, *, timeout_s: float) -> HookReport:
    """
    Ask the hooks in order and return what they make of the default.

    The first failure ends the chain with the default: a half-applied chain is not what was configured.

    Args:
        hooks: In the order of their names.
        event: What happened.
        default: What table and rules decide.
        timeout_s: For the whole chain; a chain that took longer leaves the default.
    """
    decision, outcome, last = default, HookOutcome.DEFAULT, None
    started = time.perf_counter()
    for hook in hooks:
        try:
            chosen = hook.decide(event, decision)
        except Exception as error:  # noqa: BLE001 - an operator's code; whatever it raises, the table decides
            return _raised(default, hook.name, error)
        seconds = time.perf_counter() - started
        if seconds > timeout_s:
            detail = f"took {seconds:.3g} s of {timeout_s:g} s allowed"
            return HookReport(decision=default, outcome=HookOutcome.TIMED_OUT, hook=hook.name, detail=detail)
        if chosen is None or chosen is decision:
            continue
        if not isinstance(chosen, Decision):
            return _raised(default, hook.name, TypeError(f"returned {type(chosen).__name__} instead of a Decision"))
        decision, outcome, last = _sound(chosen, decision, hook), HookOutcome.OVERRIDDEN, hook.name
    return HookReport(decision=decision, outcome=outcome, hook=last)


def _sound(chosen: Decision, default: Decision, hook: Hook) -> Decision:
    """
    Return a hook's decision without what no hook may do.

    An error stays an error (it has a class and an error status), and what is covered stays covered.
    """
    is_error_status = 400 <= chosen.reply_status <= 599  # noqa: PLR2004 HTTP's error statuses
    return replace(
        chosen,
        rule=f"hook:{hook.name}",
        error_class=chosen.error_class or default.error_class,
        reply_status=chosen.reply_status if is_error_status else default.reply_status,
        verbatim=chosen.verbatim and (default.verbatim or default.expose_backend),
        expose_backend=chosen.expose_backend and default.expose_backend,
    )


def _raised(default: Decision, hook: str, error: Exception) -> HookReport:
    detail = bounded(f"{type(error).__name__}: {error}", 500)
    return HookReport(decision=default, outcome=HookOutcome.RAISED, hook=hook, detail=detail)
