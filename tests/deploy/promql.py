"""
Which metrics and labels a PromQL expression asks for.

No parser: names are what is left when texts, matchers, groupings, functions, durations and numbers are taken away.
Enough for the rules and the dashboard of this project, whose own tests (promtool) judge the syntax.
"""

import re
from dataclasses import dataclass

from worker.batches.metrics import batch_catalogue
from worker.telemetry.metrics import catalogue

FOREIGN = {
    "pubsub_googleapis_com:subscription_oldest_unacked_message_age",
    "pubsub_googleapis_com:subscription_num_undelivered_messages",
    "pubsub_googleapis_com:subscription_dead_letter_message_count",
    "pubsub_googleapis_com:subscription_expired_ack_deadlines_count",
    "keda_scaler_detail_errors_total",
}
"""
Not the worker's: Cloud Monitoring's metrics of Pub/Sub (https://cloud.google.com/monitoring/api/metrics_gcp#gcp-pubsub)
under their PromQL names, and KEDA's operator's (https://keda.sh/docs/latest/integrations/prometheus/).
"""
TARGET_LABELS = {"namespace", "pod", "job", "instance"}
"""Given by the scraper."""
_STRINGS = re.compile(r'"(?:[^"\\]|\\.)*"')
_GROUPINGS = re.compile(r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\(([^)]*)\)")
_SELECTORS = re.compile(r"([a-zA-Z_:][a-zA-Z0-9_:]*)\s*\{([^}]*)\}")
_NAMES = re.compile(r"(?<![\w:.$])([a-zA-Z_:][a-zA-Z0-9_:]*)(?!\s*\()\b")
_WORDS = {"and", "or", "unless", "bool", "offset", "by", "without", "on", "inf", "nan"}


@dataclass(frozen=True)
class Asked:
    """What an expression asks for."""

    metrics: frozenset[str]
    matched: frozenset[tuple[str, str]]
    """Metric and label of each matcher."""
    grouped: frozenset[str]
    """Labels of groupings."""


def asked(expression: str) -> Asked:
    """Read an expression."""
    text = _STRINGS.sub('""', expression)
    matched = frozenset(
        (name, label)
        for name, matchers in _SELECTORS.findall(text)
        for label in re.findall(r"([a-zA-Z_]\w*)\s*(?:=~|!~|!=|=)", matchers)
    )
    grouped = frozenset(
        label.strip() for group in _GROUPINGS.findall(text) for label in group.split(",") if label.strip()
    )
    text = re.sub(r"\{[^}]*\}", "", _GROUPINGS.sub(" ", text))
    text = re.sub(r"\[[^\]]*\]", "", text)
    names = {name for name in _NAMES.findall(text) if name not in _WORDS}
    return Asked(frozenset(names), matched, grouped)


def known() -> dict[str, frozenset[str]]:
    """Return every name that the metrics of the worker and of `batches serve` are scraped under, with its labels."""
    names: dict[str, frozenset[str]] = {}
    for name, kind, labels, _ in (*catalogue(), *batch_catalogue()):
        if kind == "histogram":
            names |= {f"{name}_sum": frozenset(labels), f"{name}_count": frozenset(labels)}
            names[f"{name}_bucket"] = frozenset({*labels, "le"})
        else:
            names[name] = frozenset(labels)
    return names


def faults(expression: str) -> list[str]:
    """Return what the expression asks for and nobody has, one sentence each."""
    request, ours = asked(expression), known()
    wrong = [f"no metric {name}" for name in sorted(request.metrics - ours.keys() - FOREIGN)]
    for name, label in sorted(request.matched):
        if name in ours and label not in ours[name] | TARGET_LABELS:
            wrong.append(f"{name} has no label {label}")
    if request.metrics <= ours.keys():
        labels = TARGET_LABELS.union(*(ours[name] for name in request.metrics))
        wrong += [f"nothing has the label {label}" for label in sorted(request.grouped - labels)]
    return wrong
