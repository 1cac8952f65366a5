"""
The engine: one object that says what is to be done about an attempt's end.

Precedence: hooks over rules over the built-in table.  Since a hook is shown what the others would decide, the order
of work is the reverse.  The budgets (`budgets.apply_budgets`) come last and are the caller's to apply, since they are
about the delivery and not about the error.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from worker.policy.hook import DEFAULT_TIMEOUT_S, Hook, HookReport, chain, load_hooks
from worker.policy.model import Decision, ErrorClass, ErrorEvent
from worker.policy.normalise import Facts, normalise
from worker.policy.rules.matching import apply_rule, first_match
from worker.policy.table import accept, classify, decide, is_good_answer

if TYPE_CHECKING:
    from worker.policy.rules.model import Rule


class Classified(msgspec.Struct, frozen=True, kw_only=True):
    """A decision before hooks, and what led to it."""

    decision: Decision
    facts: Facts | None = None
    """`None` for a good answer that no rule asks about: its body was not read for them."""
    error_class: ErrorClass | None = None
    """What the table says, before any rule."""
    rule: "Rule | None" = None


class ErrorPolicy:
    """Operators' rules, the built-in table and the hooks; holds no state about messages."""

    def __init__(
        self,
        rules: "Sequence[Rule]" = (),
        hooks: Sequence[Hook] = (),
        *,
        now_unix: Callable[[], float] = time.time,
        hook_timeout_s: float = DEFAULT_TIMEOUT_S,
        on_hook: Callable[[HookReport], None] | None = None,
    ) -> None:
        """
        Take the parts; nothing is loaded or started here.

        Args:
            rules: In the operator's order.
            hooks: In the order of their names.
            now_unix: Seconds since 1970, for a Retry-After that is a date.
            hook_timeout_s: For the whole chain of one event.
            on_hook: Called with every report of the hooks, to be counted and logged.
        """
        self._rules = tuple(rules)
        self._has_success_rules = any(rule.sees_success for rule in self._rules)
        self.hooks = tuple(hooks)
        """In the order they are asked."""
        self._hook_timeout_s = hook_timeout_s
        self._now_unix = now_unix
        self._on_hook = on_hook

    def decide(self, event: ErrorEvent, *, forbidden_in_a_row: int = 0) -> Decision:
        """
        Return what table, rules and hooks propose.

        Args:
            event: What happened; a good answer is an event too.
            forbidden_in_a_row: Of a 403: different models or paths of this route that were answered 403, this one
                included, while nothing was served; 0 if something was, within the last minute.
        """
        decision = self.classify(event, forbidden_in_a_row=forbidden_in_a_row).decision
        if not self.hooks or decision.error_class is None:
            return decision
        return self.ask_hooks(event, decision).decision

    def ask_hooks(self, event: ErrorEvent, default: Decision) -> HookReport:
        """Return what the hooks make of the decision of table and rules."""
        hook_report = chain(self.hooks, event, default, timeout_s=self._hook_timeout_s)
        if self._on_hook is not None:
            self._on_hook(hook_report)
        return hook_report

    def classify(self, event: ErrorEvent, *, forbidden_in_a_row: int = 0) -> Classified:
        """Return what rules and table decide, and why; hooks take no part."""
        if is_good_answer(event) and not self._has_success_rules:
            return Classified(decision=accept(event))
        facts = normalise(event.status, event.headers, event.body)
        error_class = classify(event, facts, forbidden_in_a_row=forbidden_in_a_row)
        rule = first_match(self._rules, event, facts, error_class)
        if rule is not None:
            decision = apply_rule(rule, event, facts, error_class, now_unix=self._now_unix())
        elif error_class is None:
            decision = accept(event)
        else:
            decision = decide(error_class, event, facts, now_unix=self._now_unix())
        return Classified(decision=decision, facts=facts, error_class=error_class, rule=rule)


def load_policy(
    rules: Sequence[Mapping[str, Any]],
    *,
    hook_timeout_s: float = DEFAULT_TIMEOUT_S,
    on_hook: Callable[[HookReport], None] | None = None,
) -> ErrorPolicy:
    """
    Return the policy with an operator's rules and every hook that is installed.

    Args:
        rules: As in `policy.rules` of the settings.
        hook_timeout_s: For the whole chain of one event.
        on_hook: Called with every report of the hooks.

    Raises:
        SettingsError: A rule or a hook cannot be used; permanent.
    """
    parsed: Sequence[Rule] = ()
    if rules:
        from worker.policy.rules.load import parse_rules  # noqa: PLC0415 - most workers have none

        parsed = parse_rules(rules)
    return ErrorPolicy(parsed, load_hooks(), hook_timeout_s=hook_timeout_s, on_hook=on_hook)
