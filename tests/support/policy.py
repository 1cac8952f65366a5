"""What table and rules make of an attempt's end, for tests that are about nothing else."""

import yaml

from worker.policy.engine import ErrorPolicy
from worker.policy.model import Decision, ErrorEvent
from worker.policy.rules.load import parse_rules
from worker.policy.rules.model import Rule

NOW = 1_800_000_000.0


def rules_of(text: str) -> tuple[Rule, ...]:
    """Rules written as YAML: a list, or a file with `policy.rules`."""
    document = yaml.safe_load(text)
    return parse_rules(document["policy"]["rules"] if isinstance(document, dict) else document)


def classify(event: ErrorEvent, *, rules: str = "[]", forbidden_in_a_row: int = 0) -> Decision:
    """The decision of rules and table, with a fixed clock."""
    policy = ErrorPolicy(rules_of(rules), now_unix=lambda: NOW)
    return policy.classify(event, forbidden_in_a_row=forbidden_in_a_row).decision
