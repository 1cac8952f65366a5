"""
Says in words how a verdict comes about: what `inference-worker policy explain` prints.

The functions that decide here are those of the running worker, hooks included.
"""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import msgspec
from msgspec import structs

from worker.policy.backoff import Backoff
from worker.policy.blame import MAX_ROW, UNKNOWN, Blame
from worker.policy.budgets import Budget
from worker.policy.engine import Classified, ErrorPolicy
from worker.policy.hook import HookOutcome
from worker.policy.judge import (
    HEALTHY,
    OUTAGE_DETECTION_S,
    AttemptEnd,
    BackendHealth,
    Report,
    Verdict,
    blame_for,
    judge,
    report,
)
from worker.policy.model import BreakerAction, Decision, Disposition, ErrorEvent
from worker.policy.normalise import Facts, normalise
from worker.policy.signals import match_signal


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """One stage of the way to a verdict."""

    stage: str
    """`event`, `facts`, `table`, `rules`, `hooks`, `blame`, `gate`, `outage`, `delivery`."""
    text: str
    """One line for people."""


class Explanation(msgspec.Struct, frozen=True, kw_only=True):
    """A verdict with the way to it."""

    verdict: Verdict
    facts: Facts
    steps: tuple[Step, ...]

    @property
    def decision(self) -> Decision:
        """What is done in the end."""
        return self.verdict.decision

    def render(self) -> str:
        """Return it as text of several lines, ending in the fields of the decision."""
        width = max(len(step.stage) for step in self.steps)
        lines = [f"{step.stage:<{width}}  {step.text}" for step in self.steps]
        lines += ["", f"decision: {self.decision.disposition}  (by {self.decision.rule})"]
        lines += [f"  {name}: {value}" for name, value in _shown(self.decision).items()]
        return "\n".join(lines) + "\n"


def explain(
    policy: ErrorPolicy,
    event: ErrorEvent,
    budget: Budget,
    health: BackendHealth = HEALTHY,
    *,
    blame: Blame = UNKNOWN,
    can_resume: bool = False,
    forbidden_in_a_row: int = 0,
) -> Explanation:
    """
    Return the verdict about an attempt and every step that led to it.

    Args:
        policy: With the operator's rules and hooks.
        event: What happened.
        budget: What is left to spend on the delivery.
        health: What the gate knows of the backend after the report.
        blame: What is known about the message and the others of its lane.
        can_resume: The attempt left something that the next one can go on from.
        forbidden_in_a_row: Of a 403: as `ErrorPolicy.decide` takes it.
    """
    classified = policy.classify(event, forbidden_in_a_row=forbidden_in_a_row)
    facts = classified.facts or normalise(event.status, event.headers, event.body)
    steps = [
        Step(stage="event", text=_event_text(event)),
        Step(stage="facts", text=_facts_text(facts)),
        Step(stage="table", text=_table_text(classified, facts, event)),
        Step(stage="rules", text=_rules_text(classified)),
    ]
    decision = classified.decision
    if policy.hooks and decision.error_class is not None:
        decision, text = _ask_hooks(policy, event, decision)
        steps.append(Step(stage="hooks", text=text))
    if decision.error_class is not None:
        steps.append(Step(stage="blame", text=_blame_text(blame_for(decision, blame), is_refusal=decision.is_overload)))
    end = AttemptEnd(event=event, decision=decision, can_resume=can_resume, blame=blame)
    steps.append(Step(stage="gate", text=_gate_text(report(end, budget))))
    verdict = judge(end, budget, health)
    if verdict.needs_outage_check:
        text = f"waits {OUTAGE_DETECTION_S:g} s; if the breaker opens meanwhile, the failure is an outage's"
        steps.append(Step(stage="outage", text=text))
        verdict = judge(structs.replace(end, is_outage_checked=True), budget, health)
    steps.append(Step(stage="delivery", text=_delivery_text(decision, verdict)))
    return Explanation(verdict=verdict, facts=facts, steps=tuple(steps))


def _ask_hooks(policy: ErrorPolicy, event: ErrorEvent, default: Decision) -> tuple[Decision, str]:
    """Return what the hooks make of the default, and how it went."""
    answer = policy.ask_hooks(event, default)
    asked = f"asked {', '.join(hook.name for hook in policy.hooks)}"
    said = "no objection" if answer.outcome is HookOutcome.DEFAULT else f"{answer.outcome} by {answer.hook}"
    return answer.decision, f"{asked}: {said}{answer.detail and f' ({answer.detail})'}"


def _blame_text(blame: Blame, *, is_refusal: bool) -> str:
    """Return whose trouble the failure is."""
    if not blame.is_contradicted:
        if blame.others_failing:
            return f"shared: {blame.others_failing} other messages failed as well, and none was served since"
        return "unknown: no other message was served since it first failed, and no other one failed"
    if blame.is_own(is_refusal=is_refusal):
        return f"its own: others are served, and chance does not explain {blame.failures} failures in a row"
    later_ones = (structs.replace(blame, failures=count) for count in range(2, MAX_ROW + 1))
    own_from = next((each.failures for each in later_ones if each.is_own(is_refusal=is_refusal)), None)
    later = "chance explains any number of failures" if own_from is None else f"its own from failure {own_from} on"
    return f"contradicted: others are served, so it says nothing about the backend; {later}"


def _gate_text(outcome: Report) -> str:
    """Return what breaker and window learn."""
    parts = {
        BreakerAction.SUCCESS: "a success for the breaker",
        BreakerAction.NONE: "nothing for the breaker",
        BreakerAction.COUNT: f"one failure in a row for the breaker of the {outcome.scope}",
        BreakerAction.TRIP: f"the breaker of the {outcome.scope} opens when a second message says so",
    }
    text = [parts[outcome.breaker]]
    if outcome.is_overload:
        text.append("the window decreases, once for all that was refused together")
    if outcome.pause_s:
        text.append(f"the window pauses for {outcome.pause_s:g} s")
    return "; ".join(text)


def _delivery_text(proposed: Decision, verdict: Verdict) -> str:
    """Return what the circumstances made of the proposed decision."""
    decision = verdict.decision
    what = f"{decision.disposition}"
    if decision.disposition is not proposed.disposition:
        what = f"{proposed.disposition} becomes {decision.disposition}"
    reasons = decision.rule.removeprefix(proposed.rule).replace("budget:", "").split("+")
    text = f"{what}: {', '.join(filter(None, reasons))}" if decision.rule != proposed.rule else what
    if decision.disposition is Disposition.HOLD:
        text += "; the attempt does not count against the class's limit" if verdict.is_outage else ""
    return text


def _event_text(event: ErrorEvent) -> str:
    parts = [f"{event.path} on {event.backend}, phase {event.phase}"]
    parts.append("no response" if event.status is None else f"status {event.status}")
    if event.fault is not None:
        parts.append(f"fault {event.fault}")
    if event.in_stream:
        parts.append("inside a stream" + (", after text" if event.has_partial else ""))
    parts.append(
        f"{len(event.body)} bytes, attempt {event.attempts}, delivery attempt {event.delivery_attempt or 'unknown'}"
    )
    return "; ".join(parts)


def _facts_text(facts: Facts) -> str:
    shape = " in ".join([facts.shape, *reversed(facts.wrapped)])
    named = {name: getattr(facts, name) for name in ("type", "code", "inner_code", "param", "status_hint")}
    words = "".join(f", {name} {value!r}" for name, value in named.items() if value is not None)
    return f"shape {shape}{words}, message {facts.message[:120]!r}"


def _table_text(classified: Classified, facts: Facts, event: ErrorEvent) -> str:
    if classified.error_class is None:
        return "a good answer"
    has_status = event.status is not None and event.status >= 400  # noqa: PLR2004 the first error status
    signal = match_signal(facts, facts.status if has_status else facts.status_hint)
    if signal is None or signal.error_class is not classified.error_class:
        return f"{classified.error_class}, by status, fault or phase"
    return f"{classified.error_class}, by a known sign ({signal.source})"


def _rules_text(classified: Classified) -> str:
    if classified.rule is None:
        return "none fits; the table's row applies"
    return f"{classified.rule.name!r} fits"


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
