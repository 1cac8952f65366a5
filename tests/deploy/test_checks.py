"""The checks themselves can fail: what they are there to find, they find."""

import copy
from typing import Any

import pytest

from tests.deploy import manifests
from tests.deploy.crds import custom_faults, trigger_faults

pytest.importorskip("jsonschema", reason="jsonschema is not installed")


WHERE = {"PodMonitor": "with-podmonitor", "PrometheusRule": "with-alerts-operator"}
"""The variant that has a kind, where it is not the overlay for GKE."""


def _broken(kind: str, *path: Any, value: Any) -> dict[str, Any]:
    (found,) = manifests.variant(WHERE.get(kind, "gke")).of_kind(kind)
    found = copy.deepcopy(found)
    place: Any = found
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return found


@pytest.mark.parametrize(
    ("kind", "path", "value", "word"),
    [
        ("ScaledObject", ("spec", "cooldownPeriods"), 300, "cooldownPeriods"),
        ("ScaledObject", ("spec", "maxReplicaCount"), "8", "8"),
        ("ScaledObject", ("spec", "fallback", "behavior"), "currentReplicasIfHiger", "currentReplicasIfHiger"),
        ("ScaledObject", ("spec", "triggers", 0, "metadata", "treshold"), "1", "treshold"),
        ("TriggerAuthentication", ("spec", "podIdentity", "provider"), "goggle", "goggle"),
        ("PodMonitoring", ("spec", "endpoints", 0, "intervall"), "15s", "intervall"),
        ("PodMonitor", ("spec", "podMetricsEndpoints", 0, "intervall"), "15s", "intervall"),
        ("PrometheusRule", ("spec", "groups", 0, "rules", 0, "expression"), "1", "expression"),
    ],
)
def test_a_mistake_is_found(kind: str, path: tuple[Any, ...], value: Any, word: str):
    """A misspelt field, a quoted number and a value that does not exist are each named."""
    assert any(word in fault for fault in custom_faults(_broken(kind, *path, value=value)))


def test_a_missing_field_is_found():
    """What a definition requires is missed."""
    endpoint = {"port": "http"}
    assert any(
        "interval" in fault for fault in custom_faults(_broken("PodMonitoring", "spec", "endpoints", value=[endpoint]))
    )


@pytest.mark.parametrize(
    ("trigger", "word"),
    [
        ({"type": "gcp-pubsub", "metadata": {"subscriptionName": "s"}}, "gcp-pubsub"),
        ({"type": "promethus", "metadata": {}}, "promethus"),
        ({"type": "prometheus", "metadata": {"query": "x", "threshold": "1"}}, "serverAddress"),
    ],
    ids=["deprecated", "misspelt", "incomplete"],
)
def test_a_wrong_trigger_is_found(trigger: dict[str, Any], word: str):
    """A trigger that KEDA gave up, does not have, or cannot use is named."""
    assert any(word in fault for fault in trigger_faults(trigger))
