"""Combinations of settings that cannot work, each one sentence."""

from typing import Any

import pytest

from tests.support.required_settings import a_settings
from worker.settings.conflicts import find_conflicts
from worker.settings.schema import DrainSettings, Settings


def test_the_example_of_the_design_is_usable() -> None:
    """The least a person must give is enough."""
    assert find_conflicts(a_settings()) == []


M = {"models": ["m"]}


def routes(*several: dict[str, Any]) -> dict[str, Any]:
    """Routes with an address, in front of the short form."""
    return {"routes": [{"base_url": "http://a", **route} for route in several]}


def targets(*several: Any, **more: Any) -> dict[str, Any]:
    """The short form with several servers."""
    return {"backend": {"base_url": "", "base_urls": list(several), **more}}


def subscriptions(*several: dict[str, Any]) -> dict[str, Any]:
    return {"pubsub": {"request_subscription": "", "subscriptions": list(several)}}


QUERY = {"query": "sum(up)", "whole_at": 0, "closed_at": 1}


def gated(**gate: Any) -> dict[str, Any]:
    """The short form with a metric gate."""
    return {"backend": {"metric_gate": gate}}


CONFLICTS: dict[str, tuple[dict[str, Any], str]] = {
    "subscription": ({"pubsub": {"request_subscription": ""}}, "pubsub.request_subscription: is required"),
    "topic": ({"pubsub": {"response_topic": ""}}, "pubsub.response_topic: is required"),
    "base_url": ({"backend": {"base_url": ""}}, "backend.base_url: is required"),
    "route without URL": ({"routes": [{"name": "a", "match": M}]}, "routes[a].base_url: is required"),
    "same name": (
        {"routes": [{"name": "a", "base_url": "http://a", "match": M}] * 2},
        "routes: the name 'a' is used twice",
    ),
    "a route called default": (
        {"routes": [{"name": "default", "base_url": "http://a", "match": M}]},
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
    "window above in flight": (
        {"pubsub": {"max_in_flight": 63}, "backend": {"window": {"max": 64}}},
        "backend.window.max: 64 exceeds",
    ),
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
    "tenants that nobody names": (
        {"tenants": {"windows": "shared"}},
        "tenants: needs request.tenant_attribute or request.tenant_metadata_key",
    ),
    "weights of separate windows": (
        {"tenants": {"weights": {"a": 2}}, "request": {"tenant_attribute": "t"}},
        "tenants.weights: need tenants.windows shared",
    ),
    "limits of one tenant twice": (
        {"tenants": {"limits": [{"tenant": "a"}] * 2}, "request": {"tenant_attribute": "t"}},
        "tenants.limits: the tenant 'a' stands twice",
    ),
    "limits in no Redis": (
        {"tenants": {"store": "redis"}, "request": {"tenant_attribute": "t"}},
        "tenants.redis_url: is required with tenants.store redis",
    ),
    "a header of no tenant": (
        {"backend": {"header_rules": {"tenant": "x-t"}}},
        "backend.header_rules.tenant: nothing names the tenant of a request",
    ),
    "a price behind another": (
        {"prices": [{"model": m, "input": 1, "output": 1} for m in ("llama*", "llama-3")]},
        "prices: 'llama-3' can never be used, 'llama*' takes all its models before it",
    ),
    "payloads": (
        {"payloads": {"request_prefixes": ["gs://bucket"], "max_bytes": 300_000_000}},
        "payloads.max_bytes: must not exceed pubsub.max_in_flight_bytes",
    ),
    "one and several subscriptions": (
        {"pubsub": {"subscriptions": [{"name": "a"}]}},
        "pubsub.subscriptions: excludes pubsub.request_subscription",
    ),
    "a subscription twice": (
        subscriptions({"name": "a"}, {"name": "projects/p/subscriptions/a"}),
        "pubsub.subscriptions: the name 'a' stands twice",
    ),
    "window above all subscriptions": (
        {
            **subscriptions({"name": "a", "max_in_flight": 30}, {"name": "b", "max_in_flight": 33}),
            "backend": {"window": {"max": 64}},
        },
        "backend.window.max: 64 exceeds pubsub.max_in_flight of all subscriptions (63)",
    ),
    "one and several servers": (
        {"backend": {"base_urls": ["http://b"]}},
        "backend.base_urls: excludes base_url",
    ),
    "a server twice": (targets("http://b/", "http://b"), "backend.base_urls: http://b stands twice"),
    "a name twice": (
        targets({"url": "http://b", "name": "2"}, "http://c"),
        "backend.base_urls: the name '2' is used twice",
    ),
    "some weights": (
        targets({"url": "http://b", "weight": 1}, "http://c"),
        "backend.base_urls: a weight for every server or for none",
    ),
    "a gate without its type": (
        {"backend": {"metric_gate": {"url": "http://p"}}},
        "backend.metric_gate.type: is required",
    ),
    "a query without an address": (
        gated(type="prometheus", signals=[QUERY]),
        "backend.metric_gate.url: is required, of Prometheus",
    ),
    "an endpoint without metrics": (
        {"backend": {"base_url": "", "sagemaker": {"endpoint": "e"}, "metric_gate": {"type": "vllm"}}},
        "backend.metric_gate.url: is required, since an endpoint of SageMaker has no page of metrics",
    ),
    "a key for the server's own page": (
        gated(type="vllm", api_key="k"),
        "backend.metric_gate.api_key: needs url",
    ),
    "two keys of a gate": (
        gated(type="vllm", url="http://m", api_key="k", api_key_file="/f"),
        "backend.metric_gate.api_key: excludes api_key_file",
    ),
    "a gate's certificates without TLS": (
        gated(type="vllm", url="http://m", tls={"ca_file": "/f"}),
        "backend.metric_gate.tls: needs a url that begins with https",
    ),
    "a gate's key of no certificate": (
        gated(type="vllm", url="https://m", tls={"key_file": "/f"}),
        "backend.metric_gate.tls.key_file: needs tls.cert_file",
    ),
    "stale between two readings": (
        gated(type="vllm", interval_s=14),
        "backend.metric_gate.stale_after_s: must be at least interval_s + timeout_s",
    ),
    "a gate without signals": (gated(type="metrics"), "backend.metric_gate.signals: at least one is required"),
    "a query of a page": (
        gated(type="metrics", signals=[QUERY]),
        "backend.metric_gate.signals.0: needs metric alone with type metrics",
    ),
    "a metric of Prometheus": (
        gated(type="prometheus", url="http://p", signals=[{**QUERY, "metric": "m"}]),
        "backend.metric_gate.signals.0: needs query alone with type prometheus",
    ),
    "labels beside a query": (
        gated(type="prometheus", url="http://p", signals=[{**QUERY, "labels": {"a": "b"}}]),
        "backend.metric_gate.signals.0.labels: belong into the query",
    ),
    "a signal that says nothing": (
        gated(type="metrics", signals=[{"metric": "m", "whole_at": 1, "closed_at": 1}]),
        "backend.metric_gate.signals.0.closed_at: must differ from whole_at",
    ),
    "one name for two signals": (
        gated(type="metrics", signals=[{"metric": "m", "whole_at": 1, "closed_at": 2}] * 2),
        "backend.metric_gate.signals: the name 'm' is used twice",
    ),
    "certificates without TLS at several": (
        targets("http://b", "http://c", tls={"ca_file": "/f"}),
        "backend.tls: needs a base_url that begins with https",
    ),
    "default and override": (
        {"backend": {"body": {"defaults": {"n": 1}, "overrides": {"n": 2}}}},
        "backend.body.defaults: 'n' is overridden anyway",
    ),
    "model as override": (
        {"backend": {"body": {"overrides": {"model": "x"}}}},
        "backend.body.overrides: the model is replaced by the key model",
    ),
    "model as default": (
        {"backend": {"body": {"defaults": {"model": "x"}}, "model": "y"}},
        "backend.body.defaults: the model is replaced anyway",
    ),
    "a header of two origins": (
        {"backend": {"header_rules": {"from_attributes": {"X-A": "a"}, "from_metadata": {"x-a": "b"}}}},
        "backend.header_rules.from_metadata: 'x-a' comes from an attribute already",
    ),
    "behind a route for everything": (
        routes({"name": "a"}),
        "backend: can never be used, routes[a] takes all its requests before it",
    ),
    "behind a wider pattern": (
        routes({"name": "a", "match": {"models": ["x", "llama-*"]}}, {"name": "b", "match": {"models": ["llama-3*"]}}),
        "routes[b]: can never be used, routes[a] takes all its requests before it",
    ),
    "behind a key that is there": (
        routes(
            {"name": "a", "match": {"attributes": {"team": []}}},
            {"name": "b", "match": {"attributes": {"team": ["x"], "tier": ["y"]}}},
        ),
        "routes[b]: can never be used, routes[a] takes all its requests before it",
    ),
    "a path that is not allowed": (
        routes({"name": "a", "match": {"paths": ["/v1/embedding"]}}),
        "routes[a].match.paths: can never be used, request.allowed_paths has none of them",
    ),
    "a fallback that is none": (
        {"backend": {"fallback": "cloud"}},
        "backend.fallback: there is no route 'cloud'",
    ),
    "its own fallback": (
        {"backend": {"fallback": "default"}},
        "backend.fallback: goes in a circle: default -> default",
    ),
    "a fallback that nobody names": (
        routes({"name": "a", "only_fallback": True}),
        "routes[a].only_fallback: no route names it as its fallback",
    ),
    "a fallback with a match": (
        {**routes({"name": "a", "only_fallback": True, "match": M}), "backend": {"fallback": "a"}},
        "routes[a].match: a route that is only a fallback takes no requests of its own",
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
        {"pubsub": {"max_in_flight": 64}, "backend": {"window": {"max": 64}}},
        {"pubsub": {"max_in_flight": 8}},
        {"pubsub": {"max_lease_duration_s": 600}},
        {"policy": {"hold_max_s": 21_600}},
        {"backend": {"timeouts": {"first_byte_s": 480, "connect_s": 480}}},
        subscriptions({"name": "a", "max_in_flight": 30}, {"name": "b", "level": 1, "weight": 2, "max_in_flight": 34}),
        targets("http://b", "http://c"),
        targets({"url": "http://b", "weight": 9}, {"url": "http://b", "weight": 1, "model": "new"}),
        targets("http://b", "https://c", tls={"ca_file": "/f"}),
        routes({"name": "a", "match": {"models": ["a?"]}}, {"name": "b", "match": {"models": ["a*"]}}),
        routes(
            {"name": "a", "match": {"models": ["a"], "paths": ["/v1/*"]}}, {"name": "b", "match": {"models": ["a"]}}
        ),
        routes({"name": "a", "match": {"metadata": {"k": ["x"]}}}, {"name": "b", "match": {"metadata": {"k": []}}}),
        routes({"name": "a", "match": {"paths": ["/v1/embed*"]}}),
        {**routes({"name": "a", "only_fallback": True}), "backend": {"fallback": "a", "fallback_after_s": 0}},
    ],
    ids=str,
)
def test_what_just_works_is_no_conflict(sections: dict[str, Any]) -> None:
    """The borders belong to the usable side; a shorter lease alone needs no second setting."""
    assert find_conflicts(a_settings(**sections)) == []


def test_backend_conflicts_are_found_on_every_route() -> None:
    """A route is checked like the short form, under its own name."""
    settings = a_settings(routes=[{"name": "b", "base_url": "http://b", "match": M, "window": {"max": 500}}])
    assert find_conflicts(settings) == ["routes[b].window.max: 500 exceeds pubsub.max_in_flight (384)"]


def test_a_circle_of_fallbacks_is_named_by_each_of_its_routes() -> None:
    """And by no route that only leads into it."""
    steps = [("a", "b"), ("b", "c"), ("c", "b")]
    several = [{"name": name, "fallback": fallback, "match": {"models": [name]}} for name, fallback in steps]
    assert find_conflicts(a_settings(**routes(*several))) == [
        "routes[b].fallback: goes in a circle: b -> c -> b",
        "routes[c].fallback: goes in a circle: c -> b -> c",
    ]


def test_something_must_take_requests() -> None:
    """Fallbacks alone serve nobody."""
    settings = Settings.model_validate(
        {
            "pubsub": {"request_subscription": "s", "response_topic": "t"},
            "routes": [{"name": "a", "base_url": "http://a", "only_fallback": True}],
        }
    )
    assert find_conflicts(settings)[-1] == "routes: every one is only a fallback, none takes a request"


def test_the_pod_needs_time_beyond_the_grace() -> None:
    """Defaults add up to less than ten minutes, what the manifests give."""
    assert DrainSettings().grace_s + DrainSettings().settle_s < 600
