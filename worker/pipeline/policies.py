"""
The error policy of the settings: rules and hooks, loaded and checked before anything starts.

Rules come out of the settings as plain data; their faults are told with the line of the YAML file they stand in.
"""

from collections.abc import Callable
from pathlib import Path

from worker.policy.engine import ErrorPolicy
from worker.policy.hook import HookReport, load_hooks
from worker.policy.rules.load import parse_rules, rule_lines
from worker.settings.schema import Settings


def build_policy(
    settings: Settings, source: str | None = None, *, on_hook: Callable[[HookReport], None] | None = None
) -> ErrorPolicy:
    """
    Return the policy in force.

    Args:
        settings: With the operator's rules.
        source: The YAML file they came from, for the lines of faults; `None` when there was none.
        on_hook: Called with every report of the hooks.

    Raises:
        SettingsError: A rule or a hook cannot be used; permanent.
    """
    lines = rule_lines(Path(source).read_text("utf-8")) if source is not None else None
    rules = parse_rules(settings.policy.rules, lines=lines, source=source or "policy.rules")
    return ErrorPolicy(rules, load_hooks(), hook_timeout_s=settings.policy.hook_timeout_s, on_hook=on_hook)
