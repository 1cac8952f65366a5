"""
Says in words how a decision comes about: what `inference-worker policy explain` prints.

The same functions decide here as in the running worker, hooks included; only their thread is left out, so that an
operator can step through a hook.  One that took longer than its limit is told and overruled, as in the worker.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from worker.policy.budgets import Budget, apply_budgets
from worker.policy.engine import ErrorPolicy, Judgement
from worker.policy.hook import HookOutcome, chain
from worker.policy.model import Backoff, Decision, ErrorEvent
from worker.policy.normalise import Facts, normalise
from worker.policy.signals import match_signal


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One stage of the way to a decision."""

    stage: str
    """`event`, `facts`, `table`, `rules`, `hooks`, `budgets`."""
    text: str
    """One line for people."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """A decision with the way to it."""

    decision: Decision
    facts: Facts
    steps: tuple[Step, ...]

    def render(self) -> str:
        """Return it as text of several lines, ending in the fields of the decision."""
        width = max(len(step.stage) for step in self.steps)
        lines = [f"{step.stage:<{width}}  {step.text}" for step in self.steps]
        lines += ["", f"decision: {self.decision.disposition}  (by {self.decision.rule})"]
        lines += [f"  {name}: {value}" for name, value in _shown(self.decision).items()]
        return "\n".join(lines) + "\n"


def explain(
    policy: ErrorPolicy, event: ErrorEvent, budget: Budget | None = None, *, consecutive_forbidden: int = 0
) -> Explanation:
    """
    Return the decision about an event and every step that led to it.

    Args:
        policy: With the operator's rules and hooks.
        event: What happened.
        budget: What is left; `None` leaves the budgets out.
        consecutive_forbidden: 403s in a row on this route, this one included.
    """
    judgement = policy.judge(event, consecutive_forbidden=consecutive_forbidden)
    facts = judgement.facts or normalise(event.status, event.headers, event.body)
    steps = [
        Step(stage="event", text=_event_text(event)),
        Step(stage="facts", text=_facts_text(facts)),
        Step(stage="table", text=_table_text(judgement, facts, event)),
        Step(stage="rules", text=_rules_text(judgement)),
    ]
    decision = judgement.decision
    if policy.hooks and decision.error_class is not None:
        decision, text = _ask_hooks(policy, event, decision)
        steps.append(Step(stage="hooks", text=text))
    if budget is not None:
        after = apply_budgets(decision, budget)
        steps.append(Step(stage="budgets", text=_budget_text(decision, after)))
        decision = after
    return Explanation(decision=decision, facts=facts, steps=tuple(steps))


def _ask_hooks(policy: ErrorPolicy, event: ErrorEvent, default: Decision) -> tuple[Decision, str]:
    """Return what the hooks make of the default, and how it went."""
    started = time.monotonic()
    report = chain(policy.hooks, event, default)
    seconds, limit_s = time.monotonic() - started, policy.hook_timeout_s
    asked = f"asked {', '.join(hook.name for hook in policy.hooks)}"
    if seconds > limit_s:
        return default, f"{asked}: took {seconds:.3g} s of {limit_s:g} s allowed, so the decision before them stands"
    said = "no objection" if report.outcome is HookOutcome.DEFAULT else f"{report.outcome} by {report.hook}"
    return report.decision, f"{asked}: {said}{report.detail and f' ({report.detail})'}"


def _event_text(event: ErrorEvent) -> str:
    parts = [f"{event.path} on {event.backend}, phase {event.phase}"]
    parts.append("no response" if event.status is None else f"status {event.status}")
    if event.fault is not None:
        parts.append(f"fault {event.fault}")
    if event.in_stream:
        parts.append("inside a stream" + (", after text" if event.has_partial else ""))
    parts.append(
        f"{len(event.body)} bytes, try {event.attempts}, delivery attempt {event.delivery_attempt or 'unknown'}"
    )
    return "; ".join(parts)


def _facts_text(facts: Facts) -> str:
    shape = " in ".join([facts.shape, *reversed(facts.wrapped)])
    named = {name: getattr(facts, name) for name in ("type", "code", "inner_code", "param", "status_hint")}
    words = "".join(f", {name} {value!r}" for name, value in named.items() if value is not None)
    return f"shape {shape}{words}, message {facts.message[:120]!r}"


def _table_text(judgement: Judgement, facts: Facts, event: ErrorEvent) -> str:
    if judgement.error_class is None:
        return "a good answer"
    has_status = event.status is not None and event.status >= 400  # noqa: PLR2004 the first error status
    signal = match_signal(facts, facts.status if has_status else facts.status_hint)
    if signal is None or signal.error_class is not judgement.error_class:
        return f"{judgement.error_class}, by status, fault or phase"
    return f"{judgement.error_class}, by a known sign ({signal.source})"


def _rules_text(judgement: Judgement) -> str:
    if judgement.rule is None:
        return "none fits; the table's row applies"
    return f"{judgement.rule.name!r} fits"


def _budget_text(before: Decision, after: Decision) -> str:
    if after is before:
        return "enough left"
    spent = after.rule.removeprefix(before.rule).replace("+budget:", " ").split()
    return f"{before.disposition} becomes {after.disposition}: {', '.join(spent)}"


def _shown(decision: Decision) -> Mapping[str, Any]:
    """Return the fields worth a line: what is set and not said before."""
    said = {"disposition", "rule"}
    shown: dict[str, Any] = {}
    for field in fields(decision):
        value = getattr(decision, field.name)
        if field.name in said or value is None or value == "":
            continue
        shown[field.name] = (
            f"{value.base_s:g} s to {value.max_s:g} s, full jitter" if isinstance(value, Backoff) else value
        )
    return shown
