"""Combinations of settings that cannot work, each one sentence."""

from typing import Any

import pytest

from tests.support.required_settings import a_settings
from worker.settings.conflicts import find_conflicts
from worker.settings.schema import DrainSettings


def test_the_example_of_the_design_is_usable() -> None:
    """The least a person must give is enough."""
    assert find_conflicts(a_settings()) == []


CONFLICTS: dict[str, tuple[dict[str, Any], str]] = {
    "subscription": ({"pubsub": {"request_subscription": ""}}, "pubsub.request_subscription: is required"),
    "topic": ({"pubsub": {"response_topic": ""}}, "pubsub.response_topic: is required"),
    "base_url": ({"backend": {"base_url": ""}}, "backend.base_url: is required"),
    "route without URL": ({"routes": [{"name": "a"}]}, "routes[a].base_url: is required"),
    "same name": (
        {"routes": [{"name": "a", "base_url": "http://a"}] * 2},
        "routes: the name 'a' is used twice",
    ),
    "a route called default": (
        {"routes": [{"name": "default", "base_url": "http://a"}]},
        "routes: the name 'default' is used twice",
    ),
    "two keys": ({"backend": {"api_key": "k", "api_key_file": "/f"}}, "backend.api_key: excludes api_key_file"),
    "a key of no certificate": (
        {"backend": {"base_url": "https://h", "tls": {"key_file": "/f"}}},
        "backend.tls.key_file: needs tls.cert_file",
    ),
    "certificates without TLS": (
        {"backend": {"base_url": "http://h", "tls": {"ca_file": "/f"}}},
        "backend.tls: needs a base_url that begins with https",
    ),
    "connect": ({"backend": {"timeouts": {"connect_s": 481}}}, "backend.timeouts.connect_s: must not exceed"),
    "first byte": ({"backend": {"timeouts": {"first_byte_s": 481}}}, "backend.timeouts.first_byte_s: must not exceed"),
    "grace equal to the timeout": ({"drain": {"grace_s": 480}}, "backend.timeouts.total_s: 480 s is not less than"),
    "lease": (
        {"pubsub": {"max_lease_duration_s": 400}},
        "backend.timeouts.total_s: must not exceed pubsub.max_lease_duration_s",
    ),
    "window": ({"backend": {"window": {"max": 4}}}, "backend.window: needs min <= initial <= max"),
    "window floor": ({"backend": {"window": {"min": 9}}}, "backend.window: needs min <= initial <= max"),
    "window above in flight": ({"pubsub": {"max_in_flight": 63}}, "backend.window.max: 64 exceeds"),
    "probes": (
        {"backend": {"breaker": {"probe_interval_s": 9}}},
        "backend.breaker.probe_interval_s: must not exceed breaker.max_probe_interval_s",
    ),
    "hold": ({"policy": {"hold_max_s": 21_601}}, "policy.hold_max_s: must not exceed pubsub.max_lease_duration_s"),
    "pod": (
        {"drain": {"termination_grace_period_s": 580}},
        "drain: grace_s + settle_s (580 s) must be less than the pod's termination grace period (580 s)",
    ),
    "SageMaker with a key": (
        {"backend": {"base_url": "", "api_key": "k", "sagemaker": {"endpoint": "e"}}},
        "backend.api_key: has no meaning for SageMaker, which takes AWS's credentials",
    ),
    "SageMaker without an endpoint": (
        {"backend": {"sagemaker": {"region": "eu-west-1"}}},
        "backend.sagemaker.endpoint: is required",
    ),
    "SageMaker with headers": (
        {"backend": {"base_url": "", "headers": {"x-a": "b"}, "sagemaker": {"endpoint": "e"}}},
        "backend.headers: has no meaning for SageMaker: they do not reach the container",
    ),
    "SageMaker with a health path": (
        {"backend": {"base_url": "", "breaker": {"health_path": "/h"}, "sagemaker": {"endpoint": "e"}}},
        "backend.breaker.health_path: has no meaning for SageMaker: an endpoint has none",
    ),
    "two choices of a variant": (
        {"backend": {"sagemaker": {"endpoint": "e", "variants": {"a": 1}, "target_variant": "a"}}},
        "backend.sagemaker.variants: excludes sagemaker.target_variant",
    ),
    "a stream of what is not streamed": (
        {"backend": {"sagemaker": {"endpoint": "e", "target_model": "m", "response_stream": True}}},
        "backend.sagemaker.response_stream: SageMaker streams no answer to a request with target_model",
    ),
    "two names of a tenant": (
        {"request": {"tenant_attribute": "t", "tenant_metadata_key": "t"}},
        "request.tenant_metadata_key: the tenant is named by an attribute already",
    ),
    "payloads": (
        {"payloads": {"request_prefixes": ["gs://bucket"], "max_bytes": 300_000_000}},
        "payloads.max_bytes: must not exceed pubsub.max_in_flight_bytes",
    ),
    "redis": ({"dedupe": {"store": "redis"}}, "dedupe.redis_url: is required"),
}


@pytest.mark.parametrize(("sections", "sentence"), CONFLICTS.values(), ids=CONFLICTS)
def test_what_cannot_work_together_is_one_sentence(sections: dict[str, Any], sentence: str) -> None:
    """Each conflict is found, alone, under the key to change."""
    (found,) = find_conflicts(a_settings(**sections))
    assert found.startswith(sentence)


@pytest.mark.parametrize(
    "sections",
    [
        {"drain": {"grace_s": 15, "cut_longer_requests": True}},
        {"drain": {"termination_grace_period_s": 581}},
        {"pubsub": {"max_in_flight": 64}},
        {"pubsub": {"max_lease_duration_s": 600}},
        {"policy": {"hold_max_s": 21_600}},
        {"backend": {"timeouts": {"first_byte_s": 480, "connect_s": 480}}},
    ],
    ids=str,
)
def test_what_just_works_is_no_conflict(sections: dict[str, Any]) -> None:
    """The borders belong to the usable side; a shorter lease alone needs no second setting."""
    assert find_conflicts(a_settings(**sections)) == []


def test_backend_conflicts_are_found_on_every_route() -> None:
    """A route is checked like the short form, under its own name."""
    settings = a_settings(routes=[{"name": "b", "base_url": "http://b", "window": {"max": 500}}])
    assert find_conflicts(settings) == ["routes[b].window.max: 500 exceeds pubsub.max_in_flight (128)"]


def test_the_pod_needs_time_beyond_the_grace() -> None:
    """Defaults add up to less than ten minutes, what the manifests give."""
    assert DrainSettings().grace_s + DrainSettings().settle_s < 600
