"""
What an operators' rule means: whether it fits an event, and what it makes of the table's decision.

Pure.  A rule sees the same facts as the table, and the class that the table gave.
"""

from collections.abc import Iterable
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from worker.policy.backoff import Backoff
from worker.policy.model import Decision, Disposition, ErrorClass, ErrorEvent
from worker.policy.normalise import Facts
from worker.policy.retry_after import retry_after_s
from worker.policy.rules.regex import occurs
from worker.policy.table import ROWS, accept, decide

if TYPE_CHECKING:
    from worker.policy.rules.model import Match, Range, Rule

_MAX_NAME_CHARS = 512
"""Of a path or a model that is compared with a pattern: requesters choose them."""


def first_match(
    rules: "Iterable[Rule]", event: ErrorEvent, facts: Facts, error_class: ErrorClass | None
) -> "Rule | None":
    """
    Return the first rule that fits, or `None`.

    Args:
        rules: In the operator's order.
        event: What happened.
        facts: Of its body.
        error_class: What the table says it is; `None` for a good answer, which only a rule that names a success
            status may touch.
    """
    for rule in rules:
        if (error_class is not None or rule.sees_success) and fits(rule.match, event, facts, error_class):
            return rule
    return None


def fits(match: "Match", event: ErrorEvent, facts: Facts, error_class: ErrorClass | None) -> bool:
    """Say whether everything that a match asks for holds; the regular expressions, which cost most, go last."""
    return (
        _fits_names(match, event)
        and _fits_facts(match, event, facts)
        and (match.error_class is None or error_class in match.error_class)
        and _fits_range(match.delivery_attempt, event.delivery_attempt)
        and _fits_range(match.attempts, event.attempts)
        and (match.message_regex is None or occurs(match.message_regex, facts.message))
        and (match.body_regex is None or occurs(match.body_regex, event.body))
    )


def apply_rule(
    rule: "Rule", event: ErrorEvent, facts: Facts, error_class: ErrorClass | None, *, now_unix: float
) -> Decision:
    """
    Return the decision of a rule that fits: a row of the table with the rule's own words over it.

    The row is that of the rule's class, or of the table's.  What a backend says about our credentials stays covered
    whatever class an operator gives it.
    """
    final_class = rule.error_class or error_class
    base = accept(event) if final_class is None else decide(final_class, event, facts, now_unix=now_unix)
    if final_class is not None and error_class is ErrorClass.AUTH:
        base = replace(base, verbatim=False, expose_backend=False, message=ROWS[final_class].says)
    disposition = rule.disposition or base.disposition
    is_tried_again = disposition is not Disposition.REPLY
    hint_s = retry_after_s(event.headers, now_unix=now_unix) if is_tried_again and rule.honor_retry_after else None
    return replace(
        base,
        rule=rule.name,
        disposition=disposition,
        retryable=base.retryable or is_tried_again,
        retry_after_s=hint_s,
        **_overrides(rule),
    )


def _overrides(rule: "Rule") -> dict[str, Any]:
    """Return the fields of a decision that the rule itself sets."""
    backoff, reply = rule.backoff, rule.reply
    fields = {
        "backoff": None if backoff is None else Backoff(base_s=backoff.base_s, max_s=backoff.max_s),
        "hold_max_s": rule.hold_max_s,
        "max_attempts": rule.max_attempts,
        "breaker": rule.breaker,
        "scope": rule.scope,
        "reply_status": None if reply is None else reply.status,
        "reply_code": None if reply is None else reply.code,
    }
    return {name: value for name, value in fields.items() if value is not None}


def _fits_names(match: "Match", event: ErrorEvent) -> bool:
    return (
        _fits_globs(match.backend, event.backend)
        and _fits_globs(match.path, event.path)
        and _fits_globs(match.model, event.model)
        and (match.phase is None or event.phase in match.phase)
        and (match.exception is None or event.fault in match.exception)
    )


def _fits_facts(match: "Match", event: ErrorEvent, facts: Facts) -> bool:
    return (
        (match.status is None or not match.status.isdisjoint(_statuses(event, facts)))
        and (match.type is None or facts.type in match.type)
        and (match.code is None or facts.code in match.code or facts.inner_code in match.code)
        and (match.param is None or facts.param in match.param)
    )


def _fits_globs(globs: tuple[str, ...] | None, name: str | None) -> bool:
    if globs is None:
        return True
    return name is not None and any(fnmatchcase(name[:_MAX_NAME_CHARS], glob) for glob in globs)


def _fits_range(limits: "Range | None", number: int | None) -> bool:
    if limits is None:
        return True
    return number is not None and (limits.min or 0) <= number <= (limits.max or number)


def _statuses(event: ErrorEvent, facts: Facts) -> set[int]:
    """Return the statuses an event answers to: its own, the container's behind SageMaker, a stream's error event's."""
    found = (facts.status_hint,) if event.in_stream and facts.status_hint is not None else (event.status, facts.status)
    return {status for status in found if status is not None}
