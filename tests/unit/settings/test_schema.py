"""Settings: their values, what each refuses, and what they hide."""

import datetime as dt
from typing import Any

import pytest
from pydantic import SecretStr, ValidationError

from tests.support.required_settings import a_settings
from worker.settings.schema import (
    BackendSettings,
    BreakerSettings,
    PolicySettings,
    PubSubSettings,
    RequestSettings,
    RouteSettings,
    Settings,
)


def test_settings_are_frozen() -> None:
    """What was logged at start is what holds."""
    with pytest.raises(ValidationError, match="frozen"):
        a_settings().pubsub.max_in_flight = 7  # type: ignore[misc]


@pytest.mark.parametrize("field", ["api_key", "headers", "redis_url"])
def test_secrets_never_survive_repr(field: str) -> None:
    """Neither `repr`, `str` nor a dump shows a secret; the value itself is there."""
    if field == "redis_url":
        settings = a_settings(dedupe={"store": "redis", "redis_url": "redis://:sk-secret@h"})
    else:
        value: Any = {"x-api-key": "sk-secret"} if field == "headers" else "sk-secret"
        settings = a_settings(backend={field: value}, routes=[{"name": "r", "base_url": "http://r", field: value}])
    for text in (repr(settings), str(settings), str(settings.model_dump()), settings.model_dump_json()):
        assert "sk-secret" not in text
    assert "**********" in repr(settings)


@pytest.mark.parametrize(
    "section",
    [
        {"endpoint": "a b"},
        {"endpoint": "e", "custom_attributes": "{nothing}"},
        {"endpoint": "e", "inference_id": "{message_id"},
        {"endpoint": "e", "variants": {"a b": 1}},
        {"endpoint": "e", "variants": {"a": 0}},
        {"endpoint": "e", "accept": "a\nb"},
        {"endpoint": "e", "message_fields": ["content_type"]},
        {"endpoint": "e", "answers": "xml"},
        {"endpoint": "e", "region": "Ireland"},
    ],
)
def test_what_no_endpoint_of_sagemaker_can_be_asked_with(section: dict[str, Any]) -> None:
    """Found at the start, not by the first message."""
    with pytest.raises(ValidationError, match="sagemaker"):
        BackendSettings.model_validate({"sagemaker": section})


def test_header_values_are_readable_by_the_backend() -> None:
    """A masked header still has its value."""
    headers = a_settings(backend={"headers": {"X-Key": "a b"}}).all_routes()[0].headers
    assert headers == {"X-Key": SecretStr("a b")}
    assert headers["X-Key"].get_secret_value() == "a b"


@pytest.mark.parametrize(
    ("url", "kept"),
    [
        ("http://h", "http://h"),
        ("https://h:8443/", "https://h:8443"),
        ("http://10.0.0.1:80/openai/v1/", "http://10.0.0.1:80/openai/v1"),
        ("http://[::1]:8000", "http://[::1]:8000"),
        ("http://vllm.ns.svc.cluster.local:8000//", "http://vllm.ns.svc.cluster.local:8000"),
    ],
)
def test_base_urls_lose_their_trailing_slash(url: str, kept: str) -> None:
    """The request's path brings its own."""
    assert BackendSettings(base_url=url).base_url == kept


@pytest.mark.parametrize(
    "url",
    [
        *("h:8000", "ftp://h", "http://", "http:///x", "http://h?x=1", "http://h#f", "http://u:p@h", "http://u@h"),
        *("http://h:99999", "http://h:0", "http://h:port", "http://h h", "http://h/a b", "http://[::1", " http://h"),
    ],
)
def test_unusable_base_urls_are_refused(url: str) -> None:
    """What would fail at every request fails at start."""
    with pytest.raises(ValidationError):
        BackendSettings(base_url=url)


@pytest.mark.parametrize(
    "headers",
    [
        *({"a b": "x"}, {"": "x"}, {"é": "x"}, {"a": "é"}, {"a": "x\r\nb: c"}, {"a": "\0"}, {"a:": "x"}),
        *({"Authorization": "x"}, {"content-length": "1"}, {"HOST": "x"}, {"Transfer-Encoding": "x"}),
        {"connection": "close"},
    ],
)
def test_unusable_headers_are_refused(headers: dict[str, str]) -> None:
    """Headers that would break a request, or that the worker sets itself."""
    with pytest.raises(ValidationError) as caught:
        BackendSettings(headers={name: SecretStr(value) for name, value in headers.items()})
    assert caught.value.error_count() == 1


def test_allowed_headers_are_compared_in_lower_case() -> None:
    """An operator may write a name as it is usually written."""
    assert RequestSettings(allowed_headers=["X-Tenant"]).allowed_headers == ["x-tenant"]


@pytest.mark.parametrize("name", ["Authorization", "content-length", "host", "x y", "", "x\n"])
def test_requesters_may_not_frame_the_request(name: str) -> None:
    """Nobody can allow requesters to set the key or the length of a request."""
    with pytest.raises(ValidationError):
        RequestSettings(allowed_headers=[name])


@pytest.mark.parametrize("path", ["health", "", "http://h/health", "/a b", "/é"])
def test_a_health_path_begins_with_a_slash(path: str) -> None:
    """A probe's address must be one."""
    with pytest.raises(ValidationError):
        BreakerSettings(health_path=path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("request_subscription", "projects/p/topics/t"),
        ("request_subscription", "projects/p/subscriptions/"),
        ("request_subscription", "a/b"),
        ("response_topic", "projects/p/subscriptions/s"),
        ("response_topic", "a b"),
        ("emulator_host", "http://localhost:8085"),
        ("emulator_host", "localhost"),
        ("max_in_flight", 0),
        ("max_in_flight", 10_001),
        ("max_lease_duration_s", float("nan")),
        ("max_lease_duration_s", float("inf")),
        ("max_message_age_s", 0),
        ("max_delivery_attempts", "many"),
        ("max_delivery_attempts", 0),
        ("max_delivery_attempt", 5),
    ],
)
def test_unusable_values_of_pubsub_are_refused(key: str, value: object) -> None:
    """Names of the wrong kind, numbers out of range, NaN, unknown keys."""
    with pytest.raises(ValidationError):
        PubSubSettings.model_validate({key: value})


@pytest.mark.parametrize("host", ["localhost:8085", "[::1]:8432", "pubsub.test.svc:8085"])
def test_emulator_hosts_have_a_port(host: str) -> None:
    """As the emulators print them."""
    assert PubSubSettings(emulator_host=host).emulator_host == host


def test_the_short_form_is_the_last_route() -> None:
    """`backend` is the route `default`, for what no other takes."""
    settings = a_settings(backend={"api_key": "k"}, routes=[{"name": "a", "base_url": "http://a"}])
    assert [route.name for route in settings.all_routes()] == ["a", "default"]
    short = settings.all_routes()[1]
    assert isinstance(short, RouteSettings)
    assert (short.base_url, short.api_key) == ("http://h:8000", SecretStr("k"))


def test_no_backend_is_no_route() -> None:
    """Without the short form there are only the routes."""
    assert Settings().all_routes() == ()


def test_unknown_rules_of_the_policy_are_left_to_it() -> None:
    """The policy checks its own rules; here they are only mappings."""
    with pytest.raises(ValidationError):
        PolicySettings.model_validate({"rules": ["x"]})


@pytest.mark.parametrize("url", ["http://p:3128", "http://p", "http://me:p%40ss@p:3128/", "http://[::1]:3128"])
def test_a_proxy_is_an_address(url: str) -> None:
    """Its password is masked."""
    settings = BackendSettings.model_validate({"base_url": "https://h", "proxy": url})
    assert settings.proxy is not None
    assert settings.proxy.get_secret_value() == url
    assert "p%40ss" not in repr(settings)


@pytest.mark.parametrize(
    "url",
    ["https://p", "socks5://p:1", "p:3128", "http://", "http://p:0", "http://p:99999", "http://p/x", "http://p?a", ""],
)
def test_unusable_proxies_are_refused(url: str) -> None:
    """With the shape that is wanted, and without the password."""
    with pytest.raises(ValidationError, match=r"must be http://\[user:password@\]host:port"):
        BackendSettings.model_validate({"base_url": "https://h", "proxy": url})


# Several subscriptions.


def test_each_subscription_has_its_own_limits() -> None:
    """Messages as it says, and bytes in proportion; the short form is one of them."""
    several = [{"name": "a", "max_in_flight": 30}, {"name": "b"}]
    pubsub = PubSubSettings.model_validate({"subscriptions": several, "max_in_flight_bytes": 414_000_000})
    first, second = pubsub.sources()
    assert (first.request_subscription, first.max_in_flight, first.max_in_flight_bytes) == ("a", 30, 30_000_000)
    assert (second.request_subscription, second.max_in_flight, second.max_in_flight_bytes) == ("b", 384, 384_000_000)
    assert pubsub.most_in_flight == 414
    alone = PubSubSettings(request_subscription="s")
    assert alone.sources() == (alone,)


# Several servers, bodies, headers.


def test_a_server_is_a_text_or_a_section() -> None:
    """The text is its address; names count from 1, and a weight or a model is its own."""
    route = RouteSettings.model_validate(
        {
            "name": "r",
            "model": "m",
            "base_urls": ["http://a/", {"url": "http://b", "name": "new", "weight": 2, "model": "m2"}],
            "timeouts": {"total_s": 7},
        }
    )
    first, second = route.targets()
    assert (first.name, first.base_url, first.model, first.base_urls) == ("r/1", "http://a", "m", [])
    assert (second.name, second.base_url, second.model, second.timeouts.total_s) == ("r/new", "http://b", "m2", 7)
    assert RouteSettings(name="r", base_url="http://a").targets() == (RouteSettings(name="r", base_url="http://a"),)


@pytest.mark.parametrize(
    "target",
    [
        "",
        "ftp://h",
        "http://u:p@h",
        {"url": "http://h", "weight": 0},
        {"url": "http://h", "weight": -1},
        {"url": "http://h", "weight": float("inf")},
        {"url": "http://h", "weight": float("nan")},
        {"url": "http://h", "name": "a/b"},
        {"url": "http://h", "model": ""},
        {"name": "a"},
    ],
    ids=str,
)
def test_a_server_that_could_get_nothing_is_refused(target: Any) -> None:
    """An address that is none, a weight of 0, a name that is no label."""
    with pytest.raises(ValidationError):
        BackendSettings.model_validate({"base_urls": [target]})


@pytest.mark.parametrize("value", [float("nan"), dt.date(2026, 1, 1), {"a": float("inf")}], ids=str)
def test_a_change_of_bodies_is_json(value: Any) -> None:
    """YAML has values that JSON has not."""
    with pytest.raises(ValidationError, match="'k' is not JSON"):
        BackendSettings.model_validate({"body": {"overrides": {"k": value}}})


@pytest.mark.parametrize(
    "rules",
    [
        {"drop": ["a b"]},
        {"from_attributes": {"a:": "t"}},
        {"from_attributes": {"Authorization": "t"}},
        {"from_metadata": {"Host": "t"}},
    ],
    ids=str,
)
def test_header_rules_name_headers(rules: dict[str, Any]) -> None:
    """The worker's own are not for rules either."""
    with pytest.raises(ValidationError):
        BackendSettings.model_validate({"header_rules": rules})
