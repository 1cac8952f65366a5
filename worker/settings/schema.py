"""
Settings: what people configure, and the only knowledge of environment names.

Precedence, lowest first: defaults, the YAML file (a ConfigMap), `WORKER_*` environment variables, command-line flags.
A variable's name is the key's path with two underscores between sections: `WORKER_PUBSUB__PROJECT_ID` is
`pubsub.project_id`.  Unknown keys fail wherever they stand, and so do combinations that cannot work; every fault is
named in one message.  Values are frozen; secrets never survive `repr`.

`docs/settings.md` is generated from the docstrings below (`make docs`), in the order of `Settings`, which is the order
of the classes as well; `make check` fails when the page is stale.  Loading is in `worker.settings.load`; this module
reads nothing.
"""

import base64
import json
from collections.abc import Iterable
from typing import Annotated, Any, Literal, TypeVar
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    field_validator,
    model_validator,
)

from worker.wire.http import is_header, is_usable_key
from worker.wire.object_uri import parse_object_prefix
from worker.wire.placeholders import Template
from worker.wire.sagemaker import FIELDS, public_address

DAY_S = 86_400
NO_BACKEND = "http://unused"
"""Base URL of settings that name no backend, for commands that call none."""
MIN_RETENTION_S = 600
MAX_RETENTION_S = 31 * DAY_S
"""The longest that Pub/Sub keeps a message."""

INFERENCE_PATHS = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/embeddings",
    "/v1/moderations",
    "/v1/rerank",
    "/v1/score",
    "/v1/images/generations",
    "/v1/images/edits",
    "/v1/videos",
)
"""The OpenAI inference paths that take JSON, with the two that vLLM, SGLang and TGI add (rerank, score)."""

Seconds = Annotated[float, Field(gt=0, le=MAX_RETENTION_S)]
"""A duration in seconds, at most as long as Pub/Sub keeps a message."""
SubscriptionName = Annotated[str, Field(pattern=r"^(?:[^/\s]*|projects/[^/\s]+/subscriptions/[^/\s]+)$")]
TopicName = Annotated[str, Field(pattern=r"^(?:[^/\s]*|projects/[^/\s]+/topics/[^/\s]+)$")]
Retention = Annotated[int, Field(ge=MIN_RETENTION_S, le=MAX_RETENTION_S)]
RetryBackoff = Annotated[float, Field(ge=0, le=600)]
"""Bounds of the service
(https://cloud.google.com/pubsub/docs/reference/rest/v1/projects.subscriptions), like those of `Retention`."""
StreamMode = Literal["auto", "always", "never", "as_requested"]
_OffIsText = BeforeValidator(lambda value: "off" if value is False else value)
"""YAML reads `off` without quotes as false."""
ContinuationMode = Literal["off", "vllm", "sglang", "prompt"]

_OWN_HEADERS = {"authorization", "connection", "content-length", "host", "transfer-encoding"}
"""What the worker sets itself: the key, and what frames one request on a connection
(https://datatracker.ietf.org/doc/html/rfc9112#section-6.3)."""

_Names = TypeVar("_Names", bound=Iterable[str])


def refuse_own_headers(names: _Names) -> _Names:
    """
    Return the names of headers, all of which an operator or a requester may choose.

    Raises:
        ValueError: One of them is the worker's own.
    """
    for name in names:
        if name.lower() in _OWN_HEADERS:
            raise ValueError(f"{name!r} is set by the worker itself")
    return names


class Section(BaseModel):
    """Base of every section: frozen, unknown keys refused, docstrings below fields are their documentation."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    @model_validator(mode="before")
    @classmethod
    def _empty_is_default(cls, data: Any) -> Any:
        """Take a known key without a value for its default: a section whose lines are all commented out is `null`."""
        if not isinstance(data, dict):
            return data
        return {key: value for key, value in data.items() if value is not None or key not in cls.model_fields}


class PublishSettings(Section):
    """How answers are put on the response topic."""

    timeout_s: Seconds = 10.0
    """Time for one publish.  The broker answers in milliseconds; past this the publish is tried again, with twice the
    time (up to a minute), while the first RPC goes on: what is confirmed first counts."""
    batch_messages: Annotated[int, Field(ge=1, le=1000)] = 100
    """Answers sent in one RPC at most; Pub/Sub takes 1,000."""
    batch_bytes: Annotated[int, Field(ge=1_000, le=9_000_000)] = 1_000_000
    """Bytes sent in one RPC at most, unless a single answer is larger; Pub/Sub takes 10 MB."""
    batch_delay_s: Annotated[float, Field(ge=0, le=1)] = 0.005
    """How long an answer may wait for others to share its RPC."""


class SubscriptionSettings(Section):
    """One of several subscriptions that a worker pulls from."""

    name: Annotated[SubscriptionName, Field(min_length=1)]
    """Subscription id, or the full `projects/P/subscriptions/S`."""
    level: Annotated[int, Field(ge=0, le=100)] = 0
    """Requests of a lower level start before all of a higher one: 0 for what people wait for, 1 for batches."""
    weight: Annotated[float, Field(gt=0, le=1e6)] = 1.0
    """Part of the window, in proportion to the other subscriptions of the level; what one does not use the others
    get."""
    max_in_flight: Annotated[int, Field(ge=1, le=10_000)] | None = None
    """Deliveries of this subscription leased at once.  Default: `pubsub.max_in_flight`."""
    topic: TopicName | None = None
    """For `setup` alone: the topic it is subscribed to.  Default: as that of `pubsub.request_subscription`."""
    filter: Annotated[str, Field(max_length=256)] = ""
    """For `setup` alone: the messages it gets, for example `attributes.model = "llama"`; all by default.  It cannot be
    changed once the subscription exists."""


class PubSubSettings(Section):
    """Where requests come from and answers go."""

    project_id: str | None = None
    """Google Cloud project.  Default: the one of the credentials."""
    request_subscription: SubscriptionName = ""
    """Subscription id, or the full `projects/P/subscriptions/S`.  Required, or `subscriptions`."""
    subscriptions: list[SubscriptionSettings] = []
    """Several subscriptions instead, by level and weight: see docs/traffic.md."""
    response_topic: TopicName = ""
    """Topic id, or the full `projects/P/topics/T`.  Required."""
    control_topic: TopicName | None = None
    """Topic id, or the full `projects/P/topics/T`, on which requests are cancelled: see docs/traffic.md.  Each worker
    makes a subscription of its own to it, and removes it when it stops."""
    control_remember_s: Seconds = 86_400.0
    """How long a cancellation is remembered, and how far back a worker that starts listens."""
    emulator_host: Annotated[str, Field(pattern=r"^[^\s/]+:\d{1,5}$")] | None = None
    """`host:port` of an emulator or of the embedded server; no credentials are used then.  `PUBSUB_EMULATOR_HOST`
    sets it too."""
    max_in_flight: Annotated[int, Field(ge=1, le=10_000)] = 384
    """Deliveries leased at once.  2-3 x the window for requests of less than a second, since a slot frees only after
    its ack; about the window for long ones, since more only hoards.  Up to eight times as many while messages for a
    stopped model wait and others are served."""
    max_in_flight_bytes: Annotated[int, Field(ge=1_000_000)] = 268_435_456
    """Bytes of request data leased at once; bounds memory."""
    max_lease_duration_s: Annotated[float, Field(ge=60, le=7 * 86400)] = 21_600.0
    """How long one delivery may be kept, waiting and working together.  Six hours.  Our own limit: Pub/Sub itself
    has none."""
    max_delivery_attempts: Literal["auto"] | Annotated[int, Field(ge=1, le=100)] = "auto"
    """`auto` reads it from the subscription's dead-letter policy (needs `pubsub.subscriptions.get`).  On the last
    attempt a retryable error is answered instead of nacked."""
    max_message_age_s: Seconds = 604_800.0
    """Bounds retries where attempts are not counted: a try that fails on a message older than this is answered, not
    nacked.  A message that was never tried is not refused for its age."""
    publish: PublishSettings = PublishSettings()

    def sources(self) -> tuple["PubSubSettings", ...]:
        """Return these settings for each subscription alone; the bytes are shared out in proportion to the messages."""
        if not self.subscriptions:
            return (self,)
        caps = [each.max_in_flight or self.max_in_flight for each in self.subscriptions]
        return tuple(
            self.model_copy(
                update={
                    "request_subscription": each.name,
                    "subscriptions": [],
                    "max_in_flight": cap,
                    "max_in_flight_bytes": self.max_in_flight_bytes * cap // sum(caps),
                }
            )
            for each, cap in zip(self.subscriptions, caps, strict=True)
        )

    @property
    def most_in_flight(self) -> int:
        """Deliveries of all subscriptions leased at once."""
        return sum(source.max_in_flight for source in self.sources())


class TimeoutSettings(Section):
    """Bounds of one attempt against the backend."""

    connect_s: Seconds = 5.0
    """TCP and TLS."""
    first_byte_s: Seconds | None = None
    """From the request to the first sign of the answer: the response's headers, and of a stream the first generated
    text, since servers send headers before they begin.  Default: `total_s`, because a server that does not stream
    sends its headers only when the answer is complete."""
    idle_s: Seconds = 120.0
    """Longest silence inside an answer that has begun.  In a stream only data counts, keep-alive comments do not; set
    it above the longest thinking that the server does without showing it."""
    total_s: Seconds = 480.0
    """The whole attempt.  Must be less than `drain.grace_s`, or a rollout would cut requests."""


class WindowSettings(Section):
    """The adaptive number of requests that may run at once against one backend."""

    initial: Annotated[int, Field(ge=1, le=10_000)] = 8
    """Where it starts after a start of the process."""
    min: Annotated[int, Field(ge=1, le=10_000)] = 1
    """It never shrinks below this, however overloaded the backend is."""
    max: Annotated[int, Field(ge=1, le=10_000)] = 256
    """It never grows beyond this, nor beyond the messages that are leased.  If it is set, it must not exceed
    `pubsub.max_in_flight`.  One GPU with an 8B model gains up to 200 and more requests at once; set what one worker may
    ever use of a server that shares its processor instead of queueing."""


class BreakerSettings(Section):
    """When a backend gets no more requests, and how its recovery is noticed."""

    failures: Annotated[int, Field(ge=1, le=1000)] = 5
    """Counted failures in a row that open it.  Refused connections open it after 3; bad credentials, exhausted quota
    and a model that is still loading at once."""
    probe_interval_s: Seconds = 1.0
    """First wait before one message is let through as a probe; doubles with every failed probe."""
    max_probe_interval_s: Seconds = 4.0
    """Longest wait between probes; with the probe itself, full rate again within 5 s of the backend's recovery."""
    health_path: Annotated[str, Field(pattern=r"^/[!-~]*$")] | None = None
    """Path asked with GET every second while the breaker is open, for example `/health`; when it begins to answer
    2xx, a probe is let through at once.  It follows `base_url` without the `/v1` at its end."""


class TlsSettings(Section):
    """How a backend with an `https` URL is recognised, and how the worker says who it is."""

    ca_file: str | None = None
    """Certificates (PEM) that are trusted in place of the system's: an authority's, or the server's own."""
    cert_file: str | None = None
    """Certificate (PEM) that the worker shows, with those between it and its authority: mutual TLS."""
    key_file: str | None = None
    """The private key of `cert_file`, without a password.  Default: it is in `cert_file` as well.  All three files are
    read again when they have changed, for the connections that are made from then on."""


SageMakerField = Literal[
    "custom_attributes",
    "target_variant",
    "target_model",
    "target_container_hostname",
    "inference_component_name",
    "session_id",
    "inference_id",
    "prefix_aware_id",
    "enable_explanations",
]
"""Fields of a request that a message may set where an operator allows it."""


class SageMakerSettings(Section):
    """
    An endpoint of Amazon SageMaker in place of an OpenAI-compatible server: see docs/sagemaker.md.

    Needs the extra `sagemaker`.  Credentials come by AWS's own chain: environment, files, web identity, container,
    machine.
    """

    endpoint: Annotated[str, Field(pattern=rf"^(?:{FIELDS['target_variant'].pattern})?$", max_length=63)] = ""
    """Name of the endpoint, in the region and account of the credentials.  Empty: the backend is not SageMaker."""
    region: Annotated[str, Field(pattern=r"^[a-z0-9]+(?:-[a-z0-9]+)+$")] | None = None
    """Default: `AWS_REGION` or `AWS_DEFAULT_REGION` of the environment, or the profile's."""
    profile: str | None = None
    """Profile of AWS's configuration files, for example one that assumes a role.  Default: `AWS_PROFILE`, or none."""
    answers: Literal["openai", "json", "text"] = "openai"
    """What the container answers.  `openai`: the APIs that request paths name, streams as server-sent events; `json`:
    any JSON, `text`: any text, both on any path, as the `output` of the reply's body unless that is an object
    already."""
    response_stream: bool = False
    """Invoke with a response stream also where no stream is asked for, so that a whole answer may take longer than the
    60 s that SageMaker otherwise allows."""
    content_type: str = "application/json"
    """`ContentType` of the request."""
    accept: str | None = None
    """`Accept`.  Default: `text/event-stream` where a stream is asked for, else `application/json`."""
    custom_attributes: str = ""
    """`CustomAttributes`, at most 1,024 visible ASCII characters: the one text beside the body that reaches the
    container.  Like all fields below a template: `{message_id}`, `{attempt_id}` (another one for each attempt),
    `{traceparent}`, `{model}`, `{metadata.KEY}` with dots for inner keys.  A field whose text is empty is not sent."""
    target_variant: str = ""
    """`TargetVariant`: the production variant that answers.  Empty: SageMaker chooses by the variants' weights."""
    variants: dict[str, Annotated[float, Field(gt=0)]] = {}
    """Names of production variants and their weights, to compare them: `{blue: 9, green: 1}`.  A message has the same
    one in every attempt.  In place of `target_variant`."""
    target_model: str = ""
    """`TargetModel`: the file of a multi-model endpoint.  Such a request is never streamed."""
    target_container_hostname: str = ""
    """`TargetContainerHostname` of a multi-container endpoint."""
    inference_component_name: str = ""
    """`InferenceComponentName`; required by endpoints that host inference components."""
    session_id: str = ""
    """`SessionId` of a stateful session; `NEW_SESSION` opens one."""
    inference_id: str = "{message_id}"
    """`InferenceId`, at most 64 characters: stands in the endpoint's captured data."""
    prefix_aware_id: str = ""
    """`PrefixAwareId`: requests with the same one are sent to the same instance, for its cache of prefixes."""
    enable_explanations: str = ""
    """`EnableExplanations` of SageMaker Clarify.  Such a request is never streamed."""
    message_fields: list[SageMakerField] = []
    """Fields that a message may set in its `headers`, under the names of the service's headers
    (`X-Amzn-SageMaker-Target-Variant`); they win over the ones above.  None by default: a requester could reach other
    models."""

    @field_validator(*(name for name in FIELDS if name not in {"content_type", "accept"}))
    @classmethod
    def _usable_template(cls, value: str) -> str:
        Template(value)
        return value

    @field_validator("content_type", "accept")
    @classmethod
    def _usable_type(cls, value: str | None) -> str | None:
        fault = None if value is None else FIELDS["accept"].fault(value)
        if fault is not None:
            raise ValueError(fault)
        return value

    @field_validator("variants")
    @classmethod
    def _usable_variants(cls, value: dict[str, float]) -> dict[str, float]:
        for name in value:
            fault = FIELDS["target_variant"].fault(name)
            if fault is not None:
                raise ValueError(f"{name!r} {fault}")
        return value


def _check_base_url(value: str) -> str:
    """
    Return the address of a server without a slash at its end.

    Raises:
        ValueError: It cannot be one.
    """
    if not value:
        return value
    parts = urlsplit(value)
    if parts.scheme not in {"http", "https"} or not parts.hostname or any(char.isspace() for char in value):
        raise ValueError("must be http://host[:port] or https://host[:port]")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise ValueError("must not carry credentials, a query or a fragment")
    try:
        parts.hostname.encode("idna")
    except UnicodeError:
        raise ValueError("must name a host that can be looked up") from None
    if parts.port == 0:  # reading the port raises ValueError for what is none
        raise ValueError("must name a port from 1 to 65535")
    return value.rstrip("/")


def _check_key(value: SecretStr) -> SecretStr:
    """
    Return a bearer token.

    Raises:
        ValueError: It cannot be sent.
    """
    if not is_usable_key(value.get_secret_value().strip()):
        raise ValueError("is empty, or holds characters that cannot stand in a header")
    return value


def _check_proxy(value: SecretStr) -> SecretStr:
    """
    Return the address of an HTTP proxy.

    Raises:
        ValueError: It cannot be one.
    """
    parts = urlsplit(value.get_secret_value())
    try:
        is_usable = parts.scheme == "http" and parts.hostname is not None and parts.port != 0
    except ValueError:  # what is no port
        is_usable = False
    if not is_usable or parts.path.strip("/") or parts.query or parts.fragment:
        raise ValueError("must be http://[user:password@]host:port")
    return value


def _check_headers(value: dict[str, SecretStr]) -> dict[str, SecretStr]:
    """
    Return headers that an operator adds.

    Raises:
        ValueError: One of them cannot be sent, or is the worker's own.
    """
    for name, text in value.items():
        if not is_header(name, text.get_secret_value()):
            raise ValueError(f"{name!r} is not a usable header")
    return refuse_own_headers(value)


ServerUrl = Annotated[str, AfterValidator(_check_base_url)]
BearerToken = Annotated[SecretStr, AfterValidator(_check_key)]
ProxyUrl = Annotated[SecretStr, AfterValidator(_check_proxy)]
AddedHeaders = Annotated[dict[str, SecretStr], AfterValidator(_check_headers)]


class TargetSettings(Section):
    """One of several servers; a text alone is its `url`."""

    url: Annotated[ServerUrl, Field(min_length=1)]
    """As `base_url`."""
    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,39}$")] | None = None
    """Stands after the route's name and a slash in metrics, logs and the reply's attribute `backend`.  Default: its
    place in the list, from 1."""
    weight: Annotated[float, Field(gt=0, le=1e6)] | None = None
    """Share of the requests, in proportion to the other weights: a message goes to the same server whenever it is
    delivered, as long as that server is not stopped.  All servers of a route have one, or none; then each request goes
    to the least loaded."""
    model: Annotated[str, Field(min_length=1)] | None = None
    """The name that this server has for the model; replaces the route's `model`."""

    @model_validator(mode="before")
    @classmethod
    def _text_is_url(cls, data: Any) -> Any:
        return {"url": data} if isinstance(data, str) else data


class BodySettings(Section):
    """What is changed in the bodies of a route's requests; without it they arrive byte for byte.  Top level only."""

    defaults: dict[str, Any] = {}
    """Keys that are added where the body does not have them."""
    overrides: dict[str, Any] = {}
    """Keys that are set whatever the body says."""

    @field_validator("defaults", "overrides")
    @classmethod
    def _json(cls, value: dict[str, Any]) -> dict[str, Any]:
        for key, each in value.items():
            try:
                json.dumps(each, allow_nan=False)
            except (TypeError, ValueError):
                raise ValueError(f"{key!r} is not JSON") from None
        return value


class HeaderRuleSettings(Section):
    """Which headers the requests of a route have beside `headers`, which come last."""

    drop: list[str] = []
    """Names that a message may set elsewhere (`request.allowed_headers`) and that are not sent here, in any case."""
    from_attributes: dict[str, str] = {}
    """Headers by name, each from the attribute of the message that has this name; not sent where it is absent."""
    from_metadata: dict[str, str] = {}
    """The same from keys of the request's metadata."""
    tenant: str | None = None
    """Header that names the request's tenant to a router, for example `x-gateway-inference-fairness-id` (llm-d)."""
    priority: str | None = None
    """Header with the request's `priority`, a whole number."""
    time_left_ms: str | None = None
    """Header with the time until the request's `deadline` at the start of the attempt, milliseconds."""

    @field_validator("drop")
    @classmethod
    def _plain_names(cls, value: list[str]) -> list[str]:
        return [_header_name(name) for name in value]

    @field_validator("tenant", "priority", "time_left_ms")
    @classmethod
    def _plain_name(cls, value: str | None) -> str | None:
        return refuse_own_headers([_header_name(value)])[0] if value else None

    @field_validator("from_attributes", "from_metadata")
    @classmethod
    def _plain_keys(cls, value: dict[str, str]) -> dict[str, str]:
        return refuse_own_headers({_header_name(name): source for name, source in value.items()})


def _header_name(name: str) -> str:
    if not is_header(name, ""):
        raise ValueError(f"{name!r} is not the name of a header")
    return name.lower()


class MetricSignalSettings(Section):
    """One number that a metric gate reads: where it stands, and what it means."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_:.-]{1,60}$")] | None = None
    """Stands in metrics and `/readyz`.  Default: the first of `metric`, or the place in the list, from 1."""
    metric: list[Annotated[str, Field(pattern=r"^[a-zA-Z_:][a-zA-Z0-9_:]*$")]] = []
    """Name of the metric on the page; of several the first that is there, since engines rename theirs."""
    labels: dict[str, str] = {}
    """Only series with exactly these labels; others of theirs are ignored."""
    combine: Literal["sum", "max"] = "sum"
    """What several series make, such as those of an engine's ranks."""
    query: Annotated[str, Field(max_length=4000)] = ""
    """PromQL in place of `metric`, for `type: prometheus`: a scalar, or a vector of one element."""
    whole_at: Annotated[float, Field(allow_inf_nan=False)]
    """The number at which the whole window may be used; also on the side that `closed_at` is not on."""
    closed_at: Annotated[float, Field(allow_inf_nan=False)]
    """The number at which nothing starts, and beyond it.  Between the two the part changes evenly.  It may be the
    smaller one, for numbers that say how much is free."""
    without_own: bool = False
    """Subtract this worker's own requests that run at the server, so that only the load of others counts.  With
    several workers at one server, subtract `sum(inference_worker_model_in_flight)` in a query instead."""

    @field_validator("metric", mode="before")
    @classmethod
    def _text_is_one(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value


_WAITING = {"whole_at": 0.0, "closed_at": 4.0}
_CACHE = {"whole_at": 0.8, "closed_at": 0.95, "combine": "max"}
PRESET_SIGNALS: dict[str, list[MetricSignalSettings]] = {
    "vllm": [
        MetricSignalSettings(metric=["vllm:num_requests_waiting"], **_WAITING),
        MetricSignalSettings(metric=["vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc"], **_CACHE),
    ],
    "sglang": [
        MetricSignalSettings(metric=["sglang:num_queue_reqs"], **_WAITING),
        MetricSignalSettings(metric=["sglang:token_usage"], **_CACHE),
    ],
}
"""What an engine's gate reads unless the settings say otherwise: requests that wait, and the share of the key-value
cache that is in use.  The names: https://docs.vllm.ai/en/stable/usage/metrics/ (`gpu_cache_usage_perc` before 0.9) and
https://docs.sglang.io/references/production_metrics.html; the numbers: ADR 28."""


class MetricGateSettings(Section):
    """How much of the window may be used beside the load of others, by a metric: see docs/traffic.md."""

    type: Annotated[Literal["off", "vllm", "sglang", "metrics", "prometheus"], _OffIsText] = "off"
    """Where the numbers come from.  `vllm`, `sglang`: the server's own `/metrics`, with signals of their own (SGLang
    needs `--enable-metrics`); `metrics`: any page in Prometheus' text form; `prometheus`: queries."""
    url: ServerUrl = ""
    """Address of Prometheus, of which `/api/v1/query` is asked, or of the page.  Default for a page: `/metrics` of each
    server of the route, read with its key, headers, certificates and proxy."""
    signals: list[MetricSignalSettings] = []
    """The least part that one of them leaves counts.  Default for `vllm` and `sglang`: requests that wait, whole at 0
    and closed at 4, and the share of the key-value cache in use, whole at 0.8 and closed at 0.95."""
    without_data: Literal["closed", "open"] = "closed"
    """What holds without a recent reading, also at the start: `closed` starts nothing, `open` leaves the whole
    window."""
    interval_s: Annotated[float, Field(ge=0.1, le=3600)] = 1.0
    """Between two readings."""
    timeout_s: Annotated[float, Field(gt=0, le=600)] = 2.0
    """For one reading."""
    stale_after_s: Annotated[float, Field(gt=0, le=86_400)] = 15.0
    """A reading counts for this long."""
    rise_s: Annotated[float, Field(ge=0, le=86_400)] = 10.0
    """Time in which the part of the window rises from nothing to all, at the fastest.  It falls at once."""
    api_key: BearerToken | None = None
    """Sent to `url` as `Authorization: Bearer`.  Prefer `api_key_file`."""
    api_key_file: str | None = None
    """File that holds the key for `url`; read again when it changes."""
    headers: AddedHeaders = {}
    """Headers for `url`, for example `X-Scope-OrgID`; shown masked."""
    tls: TlsSettings = TlsSettings()
    proxy: ProxyUrl | None = None
    """As `backend.proxy`, for `url`."""

    @property
    def all_signals(self) -> list[MetricSignalSettings]:
        """Those of the settings, or else those of the engine."""
        return self.signals or PRESET_SIGNALS.get(self.type, [])

    def named_signals(self) -> list[tuple[str, MetricSignalSettings]]:
        """Return all signals with the names by which they are shown."""
        return [
            (each.name or (each.metric[0] if each.metric else str(number)), each)
            for number, each in enumerate(self.all_signals, 1)
        ]

    @property
    def is_used(self) -> bool:
        """Whether there is a gate."""
        return self.type != "off"


class BackendSettings(Section):
    """One OpenAI-compatible server or several, a service in front of them, or an endpoint of Amazon SageMaker."""

    base_url: ServerUrl = ""
    """`http://host:port`, with a prefix if the server has one.  A prefix that ends in `/v1` is not doubled with the
    `/v1` of the request's path.  Required, or `base_urls`, but for SageMaker: there the default is the region's public
    address.  A name with several addresses (a headless Service) has its connections spread over them."""
    base_urls: list[TargetSettings] = []
    """Several servers instead, each with a window and a breaker of its own: see docs/traffic.md."""
    sagemaker: SageMakerSettings = SageMakerSettings()
    model: Annotated[str, Field(min_length=1)] | None = None
    """The name that the server has for the model: replaces that of the body.  Metrics and logs keep the requester's."""
    body: BodySettings = BodySettings()
    header_rules: HeaderRuleSettings = HeaderRuleSettings()
    fallback: str | None = None
    """Name of the route (or `default`) that takes over what waits here when this one has been stopped for longer than
    `fallback_after_s`: all its servers' breakers are open, for all or for the request's model."""
    fallback_after_s: Annotated[float, Field(ge=0, le=MAX_RETENTION_S)] = 30.0
    """Longer than a restart of the server, as a rule.  One message after the other is still sent here as a probe, and
    what comes after its success stays here."""
    api_key: BearerToken | None = None
    """Sent as `Authorization: Bearer`.  Prefer `api_key_file`."""
    api_key_file: str | None = None
    """File that holds the key; read again when it changes, so that rotating a Secret needs no restart."""
    headers: AddedHeaders = {}
    """Headers added to every request; shown masked, since some servers take their key in one."""
    tls: TlsSettings = TlsSettings()
    proxy: ProxyUrl | None = None
    """`http://[user:password@]host:port` of an HTTP proxy by which the backend is reached: by CONNECT for `https`.
    `HTTP_PROXY` and its like are not obeyed.  Masked, for the password."""
    timeouts: TimeoutSettings = TimeoutSettings()
    window: WindowSettings = WindowSettings()
    breaker: BreakerSettings = BreakerSettings()
    metric_gate: MetricGateSettings = MetricGateSettings()
    group_by_prefix_bytes: Annotated[int, Field(ge=0, le=1_000_000)] = 0
    """Among leased requests of the same priority without deadlines, those whose prompts (the JSON of `messages`,
    `prompt` or `input`) begin with the same so many bytes start one after the other, so that the engine finds them in
    its prefix cache: see docs/traffic.md.  2,000 is a good number for long documents; 0 is off."""
    stream: StreamMode = "as_requested"
    """Which chat completions, completions and responses the backend is asked to stream; the worker assembles the
    answer, and the requester gets one JSON body in any case.  `as_requested`: those whose body says `"stream": true`;
    every other body reaches the backend byte for byte.  `auto`: those whose assembled answer equals the whole one, if
    the server does not refuse; it notices a generation that hangs and measures the time to the first token.  `always`:
    also with tools, log probabilities and several choices, and a refusal is the answer.  `never`: none.  See
    docs/streaming.md."""
    continuation: Annotated[ContinuationMode, _OffIsText] = "off"
    """Whether the attempt after a broken stream goes on from the text that came, instead of generating it again.
    `vllm`, `sglang`: in that server's own way, for chats and completions; `prompt`: completions only, on any server."""
    max_response_bytes: Annotated[int, Field(ge=1_000, le=1_000_000_000)] = 64_000_000
    """A longer response, of a stream all its events together, is cut off and answered as an error; bounds memory."""

    @property
    def is_sagemaker(self) -> bool:
        """Whether it is an endpoint of SageMaker."""
        return bool(self.sagemaker.endpoint)

    @property
    def address(self) -> str:
        """The base URL; of SageMaker without one that of the region, and empty where no setting names that either."""
        if self.base_url or self.sagemaker.region is None:
            return self.base_url
        return public_address(self.sagemaker.region)

    @field_validator("fallback")
    @classmethod
    def _empty_is_none(cls, value: str | None) -> str | None:
        return value or None  # a flag can take the fallback away


class RouteMatch(Section):
    """Which requests a route takes; every list that is given must match, by shell pattern, case-sensitive."""

    models: list[str] = []
    """Patterns for the body's `model`."""
    paths: list[str] = []
    """Patterns for the request's path."""
    metadata: dict[str, list[str]] = {}
    """Patterns by key of the request's metadata; what is no text is compared as JSON.  With an empty list the key must
    be there, and not null."""
    attributes: dict[str, list[str]] = {}
    """The same by attribute of the message."""


class RouteSettings(BackendSettings):
    """One of several backends."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,39}$")]
    """Stands in metrics, logs and the reply's attribute `backend`."""
    match: RouteMatch = RouteMatch()
    only_fallback: bool = False
    """It takes no requests of its own, only those of the routes that name it as `fallback`."""

    def targets(self) -> tuple["RouteSettings", ...]:
        """Return a route to one server for each server: the route itself where it has one `base_url`."""
        if not self.base_urls:
            return (self,)
        return tuple(
            self.model_copy(
                update={
                    "name": f"{self.name}/{target.name or number}",
                    "base_url": target.url,
                    "base_urls": [],
                    "model": target.model or self.model,
                }
            )
            for number, target in enumerate(self.base_urls, 1)
        )


class RequestSettings(Section):
    """What a request message may ask for."""

    allowed_paths: list[str] = [*INFERENCE_PATHS]
    """Paths that are forwarded, by shell pattern; any other is answered with a 400."""
    allowed_headers: list[str] = []
    """Names a message's `headers` may set, in any case.  None by default: routers trust some headers."""
    tenant_attribute: str | None = None
    """Attribute of the message that names its tenant.  Each tenant then has, for each model, its own window, breaker
    and queue at every backend, so that one that is refused or at its limit keeps no other back.  `window.max` is a
    tenant's.  64 pairs of tenant and model at most, all others share one."""
    tenant_metadata_key: str | None = None
    """The same by a key of the request's metadata.  At most one of the two; `tenants` says what each gets."""
    idempotency_key: bool = False
    """Send `Idempotency-Key: <message id>`, the same for every attempt, for the few proxies that deduplicate."""

    @field_validator("allowed_headers")
    @classmethod
    def _plain_names(cls, value: list[str]) -> list[str]:
        return refuse_own_headers([_header_name(name) for name in value])


class TenantLimitSettings(Section):
    """The limits of one tenant, in place of those of all."""

    tenant: Annotated[str, Field(min_length=1)]
    """Its name."""
    requests_per_minute: Annotated[float, Field(gt=0)] | None = None
    """`null`: no limit, also where all others have one."""
    tokens_per_minute: Annotated[float, Field(gt=0)] | None = None
    """The same for tokens."""


class TenantSettings(Section):
    """What each tenant gets; who it is says `request.tenant_attribute` or `request.tenant_metadata_key`."""

    windows: Literal["separate", "shared"] = "separate"
    """`separate`: each tenant has windows, breakers and queues of its own, for gateways that limit tenants one by one.
    `shared`: all tenants share those of the model, each by its weight."""
    weights: dict[str, Annotated[float, Field(gt=0, le=1e6)]] = {}
    """Part of a shared window by name of a tenant, in proportion to the other weights; what one does not use the
    others get."""
    default_weight: Annotated[float, Field(gt=0, le=1e6)] = 1.0
    """Of every other tenant; requests without a tenant are one of them."""
    requests_per_minute: Annotated[float, Field(gt=0)] | None = None
    """Of each tenant.  What is over it waits, with its lease extended; nothing is refused."""
    tokens_per_minute: Annotated[float, Field(gt=0)] | None = None
    """The same for tokens of input and output together."""
    limits: list[TenantLimitSettings] = []
    """Tenants with limits of their own."""
    store: Literal["memory", "redis"] = "memory"
    """`memory`: the limits are those of each worker; `redis` (extra `redis`): those of all workers together."""
    redis_url: SecretStr | None = None
    """`redis://host:port/db`."""

    @property
    def has_limits(self) -> bool:
        """Whether any tenant has one."""
        if self.requests_per_minute is not None or self.tokens_per_minute is not None:
            return True
        return any(each.requests_per_minute or each.tokens_per_minute for each in self.limits)


class PriceSettings(Section):
    """What a model's tokens cost, for a million, in any currency."""

    model: Annotated[str, Field(min_length=1)]
    """Shell pattern for the requested model, case-sensitive; the first that matches counts."""
    input: Annotated[float, Field(ge=0)]
    """Tokens of the request."""
    output: Annotated[float, Field(ge=0)]
    """Generated tokens."""
    input_cached: Annotated[float, Field(ge=0)] | None = None
    """Tokens of the request that came from the server's cache.  Default: as `input`."""


class ReplySettings(Section):
    """What stands in an answer beside the backend's own words."""

    copy_attributes: list[str] = []
    """Attributes of the request copied to the answer's, by shell pattern."""
    include_stats: bool = False
    """Add a `stats` object with the measured times and tokens."""


class PayloadSettings(Section):
    """Bodies in object storage instead of a message: see docs/payloads.md.  Buckets need the extra `payloads`."""

    request_prefixes: list[str] = []
    """Where a request's `body_uri` may point: `gs://bucket/folder`, `s3://bucket/folder`, `az://container/folder`,
    `file:///folder`.  Empty: requests must carry their bodies."""
    reply_prefix: str | None = None
    """Where the body of an answer goes that is too large for a message; the answer then has its `body_uri`.  Default:
    such an answer becomes a small `reply_too_large`."""
    max_bytes: Annotated[int, Field(ge=1_000, le=1_000_000_000)] = 64_000_000
    """A larger object is refused.  Must not exceed `pubsub.max_in_flight_bytes`, which bounds all bodies in memory
    together."""
    connect_s: Seconds = 5.0
    """TCP and TLS."""
    timeout_s: Seconds = 60.0
    """One read or write of an object, from the connection to the last byte."""
    gs_options: dict[str, SecretStr] = {}
    """Options of obstore for `gs://`, for example `base_url` of an emulator.  Credentials come by default from the
    environment: the metadata server, or `GOOGLE_APPLICATION_CREDENTIALS`."""
    s3_options: dict[str, SecretStr] = {}
    """The same for `s3://`, for example `region` and `endpoint`; by default `AWS_*` of the environment, and the
    identity of pod or machine."""
    az_options: dict[str, SecretStr] = {}
    """The same for `az://`, for example `account_name`, which is needed; by default `AZURE_*` of the environment."""

    @field_validator("request_prefixes")
    @classmethod
    def _usable_prefixes(cls, value: list[str]) -> list[str]:
        for text in value:
            _check_prefix(text)
        return value

    @field_validator("reply_prefix")
    @classmethod
    def _usable_prefix(cls, value: str | None) -> str | None:
        if value is not None:
            _check_prefix(value)
        return value

    @property
    def is_used(self) -> bool:
        """Whether any body may stand in object storage."""
        return bool(self.request_prefixes) or self.reply_prefix is not None


def _check_prefix(text: str) -> None:
    prefix = parse_object_prefix(text)
    if prefix.scheme == "file" and not prefix.key:
        raise ValueError("must name a folder below the root of the file system")


class ErrorLimitSettings(Section):
    """When one error class dominates the answers: a bad deployment would answer a million messages with errors."""

    window_s: Seconds = 300.0
    """Length of the sliding window whose answers are counted."""
    min_answers: Annotated[int, Field(ge=1)] = 100
    """With fewer answers than this in the window nothing is concluded."""
    warn_share: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Share of one error class from which an error is logged."""
    pause_share: Annotated[float, Field(gt=0, le=1)] | None = None
    """Share from which no further message is started until the window has emptied; `null`: never."""


class PolicySettings(Section):
    """How errors are handled: see docs/error-policy.md."""

    rules: list[dict[str, Any]] = []
    """Operators' rules, tried before the built-in table; first match wins."""
    hook_timeout_s: Seconds = 0.25
    """Longest time a hook (entry point `inference_worker.error_policy`) may take; the table decides after that."""
    hold_max_s: Seconds | None = None
    """How long a delivery may wait in-process for a backend that is down, throttled or refusing credentials.  Default:
    `pubsub.max_lease_duration_s`, so that an outage shorter than the lease burns no delivery attempt."""
    deadline_chance: Annotated[float, Field(ge=0, le=0.5)] = 0.1
    """A request with a `deadline` is sent only if more than this share of the recent answers of its model took less
    time than it has left; else it is answered at once, `deadline_exceeded`.  0: it is sent whatever they took."""
    reply_on_last_attempt: bool = True
    """Answer with the last error instead of letting the message be dead-lettered silently."""
    error_limit: ErrorLimitSettings = ErrorLimitSettings()


class DedupeSettings(Section):
    """Not answering twice what was answered once, across redeliveries."""

    store: Literal["none", "memory", "redis"] = "memory"
    """`memory` sees this process only; `redis` (extra `redis`) all of them."""
    ttl_s: Seconds = 3_600.0
    """How long an answered request is remembered."""
    capacity: Annotated[int, Field(ge=1)] = 20_000
    """Entries of the memory store."""
    redis_url: SecretStr | None = None
    """`redis://host:port/db`."""
    metadata_key: str | None = None
    """Key of the metadata that identifies a request; default: the message id."""


class DeadLetterSettings(Section):
    """An optional copy of what failed for good."""

    topic: TopicName | None = None
    """Topic that gets the original bytes of every request answered with a retryable class's error or a bad message,
    with the reason in attributes; `inference-worker replay` sends them back."""


class DrainSettings(Section):
    """How the worker stops."""

    grace_s: Seconds = 540.0
    """Time after SIGTERM in which running requests are finished; what remains is cancelled and nacked."""
    settle_s: Seconds = 40.0
    """Time after the grace for publishing the last answers and flushing acks."""
    cut_longer_requests: bool = False
    """Accept that a request longer than `grace_s` is cut by a shutdown and runs again elsewhere (Spot nodes: 15 s)."""
    termination_grace_period_s: Seconds | None = None
    """The pod's `terminationGracePeriodSeconds`, passed in so that the budget can be checked at start."""


class HttpSettings(Section):
    """The worker's own HTTP port: /livez /readyz /startupz /metrics."""

    host: str = "0.0.0.0"  # noqa: S104 - probes and scrapers come from outside the pod
    """Address to listen on; probes and scrapers come from outside the pod."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8080
    """0 takes any free port and logs it."""


class LogSettings(Section):
    """Structured logs on standard error."""

    format: Literal["auto", "json", "console"] = "auto"
    """`auto`: JSON unless standard error is a terminal."""
    level: Literal["debug", "info", "warning", "error"] = "info"
    """Lowest level written: info for an answer, warning for a delivery that is nacked or held, error for what an
    operator must look at.  Libraries write from warning on.  Lines about the worker itself (started, draining, drained,
    a breaker closed) are written at every level."""
    answer_ratio: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Share of good answers whose line is written: 0.01 is every hundredth, 0 none.  Answers that are errors, nacks and
    holds always have their line."""


class TracingSettings(Section):
    """OpenTelemetry traces of every message: see docs/tracing.md.  Needs the extra `otel`."""

    enabled: bool = False
    """Continue the trace that a request brings along, and send spans.  Off, none of it is even imported."""
    endpoint: Annotated[str, Field(pattern=r"^https?://[^\s/@]+(?:/[^\s@]*)?$")] | None = None
    """Where spans are sent by OTLP over HTTP, without `/v1/traces`: `http://collector:4318`.  Default:
    `OTEL_EXPORTER_OTLP_ENDPOINT`, or else port 4318 of this host.  Credentials belong into
    `OTEL_EXPORTER_OTLP_HEADERS`."""
    sample_ratio: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Share of traces that are recorded, among those that begin here; where a request brings a trace along, its
    publisher has decided.  An unrecorded trace is passed on all the same."""
    service_name: Annotated[str, Field(min_length=1, max_length=255)] = "inference-worker"
    """`service.name` of the spans."""


class SetupSettings(Section):
    """What `inference-worker setup` creates, for those without Terraform; the worker itself does not read it."""

    request_topic: TopicName | None = None
    """Topic that requests are published to.  Default: the request subscription's id without a `-worker` at its end;
    `setup` asks for one where it has none."""
    response_subscription: SubscriptionName | None = None
    """A subscription to the response topic, from which the answers are collected; `null`: none is created."""
    dead_letter_topic: TopicName | None = None
    """Where Pub/Sub puts what was delivered `max_delivery_attempts` times.  Default: the request topic's id with
    `-dead-letters`; empty text: no dead-letter policy.  It gets a subscription named like it, with `-hold`: without one
    the messages would be gone."""
    dead_letter_retention_s: Retention = MAX_RETENTION_S
    """How long the hold subscriptions keep a message; 31 days is the longest that Pub/Sub allows."""
    max_delivery_attempts: Annotated[int, Field(ge=5, le=100)] = 20
    """Deliveries before a message is dead-lettered.  Every nack costs one, also after a Spot eviction; the worker
    answers the last one itself."""
    minimum_backoff_s: RetryBackoff = 10
    """First wait before a nacked message is delivered again."""
    maximum_backoff_s: RetryBackoff = 600
    """Longest wait before a nacked message is delivered again."""
    ack_deadline_s: Annotated[int, Field(ge=10, le=600)] = 20
    """How long the first lease of a delivery is, and so until the messages of a killed worker are delivered again:
    between half of it and all of it, and up to a minute for what was held for longer than half of it, since a running
    worker extends those leases to a minute."""
    retention_s: Retention = 7 * DAY_S
    """How long a message that is not acked is kept."""
    worker_member: Annotated[str, Field(pattern=r"^[^\s'\"$`]*$")] = ""
    """The worker's identity as IAM writes it (`serviceAccount:…`, `principal://…`): `setup` then prints which of its
    roles are missing.  Empty: the credentials that run `setup` are checked instead."""
    batches_member: Annotated[str, Field(pattern=r"^[^\s'\"$`]*$")] = ""
    """The same for `batches serve`, whose subscriptions are made where `batches.response_subscription` names one."""


class BatchesSettings(Section):
    """
    The OpenAI-compatible Files and Batches API (`batches serve`); the worker itself does not read it.

    Needs the extra `batches`.
    """

    host: str = "0.0.0.0"  # noqa: S104 - clients come from outside the pod
    """Address on which the API listens."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """0 takes any free port and logs it."""
    database_url: SecretStr = SecretStr("sqlite:///batches.db")
    """Where batches, results that have arrived and API keys are kept: `sqlite:///FILE` for one machine, or
    `postgresql://USER:PASSWORD@HOST/DATABASE` for several replicas."""
    database_url_file: str | None = None
    """A file that holds `database_url` instead, for example of a mounted Secret; read at start."""
    files: str = "batches-files"
    """Where the contents of files are kept: a folder, `file:///folder`, or a prefix of a bucket (`gs://bucket/folder`,
    `s3://bucket/folder`, `az://container/folder`; needs the extra `payloads`, and `payloads.*_options` hold for it).
    Every replica must see the same."""
    request_topic: TopicName = ""
    """Topic that lines are published to: the one of the worker's request subscription."""
    response_subscription: SubscriptionName = ""
    """A subscription to the worker's response topic that only this API consumes; its filter may be
    `hasPrefix(attributes.run_id, "batch_")`."""
    dead_letter_subscription: SubscriptionName = ""
    """A subscription to the dead-letter topic of the worker's request subscription, with the same filter, that only
    this API consumes: a line whose request is dead-lettered fails with `dead_lettered`.  Without it the line's batch
    waits for a result until it expires."""
    endpoints: list[str] = [
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/responses",
        "/v1/embeddings",
        "/v1/moderations",
        "/v1/images/generations",
        "/v1/images/edits",
        "/v1/videos",
    ]
    """Endpoints that a batch may name, by default OpenAI's list.  A line for one that the backend does not serve fails
    with the backend's 404; a batch that names an endpoint that is not in this list is refused when it is created."""
    models_url: Annotated[str, Field(pattern=r"^https?://[^\s?#]+$")] | None = None
    """Server whose `/v1/models` is passed through and names the models that lines may ask for.  Default: the `base_url`
    of `backend`, if there is one; without either every model is accepted."""
    check_models: bool = True
    """Fail a batch that asks for a model that is not in the list; off, the backend answers such lines with an error
    (models that are loaded on demand)."""
    auth: Literal["keys", "none"] = "keys"
    """`keys`: requests carry a key of `batches keys add`.  `none`: all who reach the port are one tenant."""
    max_lines: Annotated[int, Field(ge=1, le=10_000_000)] = 50_000
    """Lines of one input file; OpenAI's limit."""
    max_file_bytes: Annotated[int, Field(ge=1_000, le=100_000_000_000)] = 209_715_200
    """Bytes of one input file; OpenAI's 200 MB."""
    max_embedding_inputs: Annotated[int, Field(ge=1)] = 50_000
    """Inputs of one embeddings batch over all its lines; OpenAI's limit."""
    window_s: Seconds = 86_400.0
    """How long a batch may take before it expires, whatever `completion_window` says, which must be `24h`."""
    file_retention_s: Annotated[int, Field(ge=3_600)] = 30 * DAY_S
    """How long a file is kept, unless its upload or its batch asks for less; OpenAI's 30 days."""
    outstanding_lines: Annotated[int, Field(ge=1, le=1_000_000)] = 2_000
    """Published lines without a result, over all batches.  They are shared between tenants and their batches, so that a
    small batch does not wait for a large one, and a cancelled batch leaves little behind.  Several times as many as the
    workers handle at once; no scaler sees a longer queue."""
    drain_s: Seconds = 600.0
    """How long a cancelled or expired batch waits for the results of its published lines."""
    max_enqueued_tokens: Annotated[int, Field(ge=1)] | None = None
    """Prompt tokens of one tenant's unfinished batches, estimated from the size of their files; beyond it a batch is
    refused with a 429."""
    requests_per_minute: Annotated[int, Field(ge=0)] = 6_000
    """Requests of one tenant to one replica of the API; 0: any number."""
    uploads_per_minute: Annotated[int, Field(ge=0)] = 1_000
    """Uploads of one tenant to one replica; OpenAI's limit.  0: any number."""
    creates_per_hour: Annotated[int, Field(ge=0)] = 2_000
    """Batches that one tenant may create; OpenAI's limit.  0: any number."""
    webhook_url: Annotated[str, Field(pattern=r"^https?://[^\s]+$")] | None = None
    """Where an event is posted when a batch ends, in OpenAI's shape and signed like theirs."""
    webhook_signing_key: SecretStr | None = None
    """`whsec_` and the signing key in base64; needed with `webhook_url`."""
    webhook_signing_key_file: str | None = None
    """A file that holds `webhook_signing_key` instead; read at start."""
    event_topic: TopicName | None = None
    """Topic that the same events are published to."""
    lease_s: Annotated[float, Field(ge=0.5, le=300)] = 10.0
    """How long after the death of the coordinating replica another one takes over."""

    @field_validator("endpoints")
    @classmethod
    def _usable_endpoints(cls, value: list[str]) -> list[str]:
        for text in value:
            if not text.startswith("/v1/"):
                raise ValueError(f"{text!r} does not begin with /v1/")
        return value

    @field_validator("database_url")
    @classmethod
    def _usable_database(cls, value: SecretStr) -> SecretStr:
        if value.get_secret_value().partition(":")[0] not in {"sqlite", "postgresql", "postgres"}:
            raise ValueError("must be sqlite:///FILE or postgresql://USER:PASSWORD@HOST/DATABASE")
        return value

    @field_validator("webhook_signing_key")
    @classmethod
    def _usable_secret(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None:
            prefix, _, key = value.get_secret_value().partition("_")
            try:
                is_usable = prefix == "whsec" and bool(base64.b64decode(key, validate=True))
            except ValueError:
                is_usable = False
            if not is_usable:
                raise ValueError("must be whsec_ and a key in base64")
        return value


class Settings(Section):
    """Everything."""

    pubsub: PubSubSettings = PubSubSettings()
    backend: BackendSettings | None = None
    """The short form of one route named `default`; with `routes`, the route for what none of them takes."""
    routes: list[RouteSettings] = []
    """Several backends, first match wins."""
    request: RequestSettings = RequestSettings()
    tenants: TenantSettings = TenantSettings()
    prices: list[PriceSettings] = []
    """For the metrics and `stats` of cost; without one there are none."""
    reply: ReplySettings = ReplySettings()
    payloads: PayloadSettings = PayloadSettings()
    policy: PolicySettings = PolicySettings()
    dedupe: DedupeSettings = DedupeSettings()
    dead_letter: DeadLetterSettings = DeadLetterSettings()
    drain: DrainSettings = DrainSettings()
    http: HttpSettings = HttpSettings()
    log: LogSettings = LogSettings()
    tracing: TracingSettings = TracingSettings()
    setup: SetupSettings = SetupSettings()
    batches: BatchesSettings = BatchesSettings()

    def all_routes(self) -> tuple[RouteSettings, ...]:
        """Return every route in matching order; the short form, named `default`, comes last."""
        if self.backend is None:
            return tuple(self.routes)
        short = RouteSettings(
            name="default", **{name: getattr(self.backend, name) for name in BackendSettings.model_fields}
        )
        return (*self.routes, short)
