"""
Settings: what people configure, and the only knowledge of environment names.

Precedence, lowest first: defaults, the YAML file (a ConfigMap), `WORKER_*` environment variables, command-line flags.
A variable's name is the key's path with two underscores between sections: `WORKER_PUBSUB__PROJECT_ID` is
`pubsub.project_id`.  Unknown keys fail wherever they stand, and so do combinations that cannot work; every fault is
named in one message.  Values are frozen; secrets never survive `repr`.

`docs/settings.md` is generated from the docstrings below (`make docs`), and `make check` fails when it is stale.
Loading is in `worker.settings_load`; this module reads nothing.
"""

from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator

Seconds = Annotated[float, Field(gt=0, le=31 * 86400)]
"""A duration in seconds; 31 days is the longest that Pub/Sub keeps a message."""

INFERENCE_PATHS = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/embeddings",
    "/v1/moderations",
    "/v1/rerank",
    "/v1/score",
    "/v1/images/generations",
    "/v1/audio/speech",
)
"""The OpenAI inference paths that take JSON, with the two that vLLM, SGLang and TGI add (rerank, score)."""


class Section(BaseModel):
    """Base of every section: frozen, unknown keys refused, docstrings below fields are their documentation."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True)


class PublishSettings(Section):
    """How answers are put on the response topic."""

    timeout_s: Seconds = 10.0
    """Bound of one publish RPC.  The broker answers in milliseconds; past this the publish is tried again."""
    batch_messages: Annotated[int, Field(ge=1, le=1000)] = 100
    """Answers sent in one RPC at most; Pub/Sub takes 1,000."""
    batch_bytes: Annotated[int, Field(ge=1_000, le=9_000_000)] = 1_000_000
    """Bytes sent in one RPC at most, unless a single answer is larger; Pub/Sub takes 10 MB."""
    batch_delay_s: Annotated[float, Field(ge=0, le=1)] = 0.005
    """How long an answer may wait for others to share its RPC."""


class PubSubSettings(Section):
    """Where requests come from and answers go."""

    project_id: str | None = None
    """Google Cloud project.  Default: the one of the credentials."""
    request_subscription: str = ""
    """Subscription id, or the full `projects/P/subscriptions/S`.  Required."""
    response_topic: str = ""
    """Topic id, or the full `projects/P/topics/T`.  Required."""
    emulator_host: str | None = None
    """`host:port` of an emulator or of the embedded server; no credentials are used then.  `PUBSUB_EMULATOR_HOST`
    sets it too."""
    max_in_flight: Annotated[int, Field(ge=1, le=10_000)] = 128
    """Deliveries leased at once.  2-3 x the window for requests of less than a second, since a slot frees only after
    its ack; about the window for long ones, since more only hoards."""
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


class TimeoutSettings(Section):
    """Bounds of one attempt against the backend."""

    connect_s: Seconds = 5.0
    """TCP and TLS."""
    first_byte_s: Seconds | None = None
    """From the request to the response's headers.  Default: `total_s`, because a server that does not stream sends
    its headers only when the answer is complete."""
    idle_s: Seconds = 120.0
    """Longest silence inside a response body, once it has begun."""
    total_s: Seconds = 480.0
    """The whole attempt.  Must be less than `drain.grace_s`, or a rollout would cut requests."""


class WindowSettings(Section):
    """The adaptive number of requests that may run at once against one backend."""

    initial: Annotated[int, Field(ge=1, le=10_000)] = 8
    """Where it starts after a start of the process."""
    min: Annotated[int, Field(ge=1, le=10_000)] = 1
    max: Annotated[int, Field(ge=1, le=10_000)] = 64
    """Must not exceed `pubsub.max_in_flight`."""


class BreakerSettings(Section):
    """When a backend is left alone, and how its return is noticed."""

    failures: Annotated[int, Field(ge=1, le=1000)] = 5
    """Counted failures in a row that open it.  Refused connections open it after 3; bad credentials, exhausted quota
    and a model that is still loading at once."""
    probe_interval_s: Seconds = 1.0
    """First wait before one message is let through as a probe; doubles with every failed probe."""
    max_probe_interval_s: Seconds = 5.0
    """Longest wait between probes: full rate again at most this long after the backend's recovery."""
    health_path: str | None = None
    """Path asked with GET every second while the breaker is open, for example `/health`; when it begins to answer
    2xx, a probe is let through at once."""


class RouteMatch(Section):
    """Which requests a route takes; every list that is given must match, by shell pattern, case-sensitive."""

    models: list[str] = []
    """Patterns for the body's `model`."""
    paths: list[str] = []
    """Patterns for the request's path."""


class BackendSettings(Section):
    """One OpenAI-compatible server, or a service in front of several."""

    base_url: str = ""
    """`http://host:port`, with a prefix if the server has one.  A prefix that ends in `/v1` is not doubled with the
    `/v1` of the request's path.  Required."""
    api_key: SecretStr | None = None
    """Sent as `Authorization: Bearer`.  Prefer `api_key_file`."""
    api_key_file: str | None = None
    """File that holds the key; read again when it changes, so that rotating a Secret needs no restart."""
    headers: dict[str, str] = {}
    """Headers added to every request."""
    timeouts: TimeoutSettings = TimeoutSettings()
    window: WindowSettings = WindowSettings()
    breaker: BreakerSettings = BreakerSettings()
    max_response_bytes: Annotated[int, Field(ge=1_000, le=1_000_000_000)] = 64_000_000
    """A longer response is cut off and answered as an error; bounds memory."""

    @field_validator("base_url")
    @classmethod
    def _usable_url(cls, value: str) -> str:
        if not value:
            return value
        parts = urlsplit(value)
        if parts.scheme not in {"http", "https"} or not parts.hostname:
            raise ValueError("must be http://host[:port] or https://host[:port]")
        if parts.username or parts.password or parts.query or parts.fragment:
            raise ValueError("must not carry credentials, a query or a fragment")
        return value.rstrip("/")

    @field_validator("headers")
    @classmethod
    def _plain_headers(cls, value: dict[str, str]) -> dict[str, str]:
        for name, text in value.items():
            if not name.replace("-", "").replace("_", "").isalnum() or any(char in text for char in "\r\n\0"):
                raise ValueError(f"{name!r} is not a usable header")
            if name.lower() in {"authorization", "content-length", "host", "transfer-encoding"}:
                raise ValueError(f"{name!r} is set by the worker itself")
        return value


class RouteSettings(BackendSettings):
    """One of several backends."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,39}$")]
    """Stands in metrics, logs and the reply's attribute `backend`."""
    match: RouteMatch = RouteMatch()


class RequestSettings(Section):
    """What a request message may ask for."""

    allowed_paths: list[str] = list(INFERENCE_PATHS)
    """Paths that are forwarded, by shell pattern; any other is answered with a 400."""
    allowed_headers: list[str] = []
    """Names a message's `headers` may set, lower case.  None by default: routers trust some headers."""
    idempotency_key: bool = False
    """Send `Idempotency-Key: <message id>`, the same for every attempt, for the few proxies that deduplicate."""


class ReplySettings(Section):
    """What stands in an answer beside the backend's own words."""

    copy_attributes: list[str] = []
    """Attributes of the request copied to the answer's, by shell pattern."""
    include_stats: bool = False
    """Add a `stats` object with the measured times and tokens."""


class DamageSettings(Section):
    """When most answers are errors of one class, somebody should look before a million more are given."""

    window_s: Seconds = 300.0
    """Stretch of time looked at."""
    min_answers: Annotated[int, Field(ge=1)] = 100
    """Fewer answers than this in the window say nothing."""
    warn_share: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Share of one error class from which it is logged and shown."""
    pause_share: Annotated[float, Field(gt=0, le=1)] | None = None
    """Share from which no further message is started until the window has emptied; `null`: never."""


class PolicySettings(Section):
    """What is done about errors: see docs/error-policy.md."""

    rules: list[dict[str, Any]] = []
    """Operators' rules, tried before the built-in table; first match wins."""
    hook_timeout_s: Seconds = 0.25
    """Longest time a hook (entry point `inference_worker.error_policy`) may take; the table decides after that."""
    hold_max_s: Seconds = 21_600.0
    """How long a delivery may wait in-process for a backend that is down, throttled or refusing credentials.  The
    lease budget by default, so that an outage shorter than it burns no delivery attempt."""
    reply_on_last_attempt: bool = True
    """Answer with the last error instead of letting the message be dead-lettered silently."""
    damage: DamageSettings = DamageSettings()


class DedupeSettings(Section):
    """Not answering twice what was answered once, across redeliveries."""

    store: Literal["none", "memory", "redis"] = "memory"
    """`memory` sees this process only; `redis` (extra `redis`) all of them."""
    ttl_s: Seconds = 3_600.0
    capacity: Annotated[int, Field(ge=1)] = 20_000
    """Entries of the memory store."""
    redis_url: SecretStr | None = None
    """`redis://host:port/db`."""
    metadata_key: str | None = None
    """Key of the metadata that identifies a request; default: the message id."""


class DeadLetterSettings(Section):
    """An optional copy of what failed for good."""

    topic: str | None = None
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
    port: Annotated[int, Field(ge=0, le=65535)] = 8080
    """0 takes any free port and logs it."""


class LogSettings(Section):
    """Structured logs on standard error."""

    format: Literal["auto", "json", "console"] = "auto"
    """`auto`: JSON unless standard error is a terminal."""
    level: Literal["debug", "info", "warning", "error"] = "info"


class Settings(Section):
    """Everything."""

    pubsub: PubSubSettings = PubSubSettings()
    backend: BackendSettings | None = None
    """The short form of one route named `default`; with `routes`, the route for what none of them takes."""
    routes: list[RouteSettings] = []
    """Several backends, first match wins."""
    request: RequestSettings = RequestSettings()
    reply: ReplySettings = ReplySettings()
    policy: PolicySettings = PolicySettings()
    dedupe: DedupeSettings = DedupeSettings()
    dead_letter: DeadLetterSettings = DeadLetterSettings()
    drain: DrainSettings = DrainSettings()
    http: HttpSettings = HttpSettings()
    log: LogSettings = LogSettings()

    def all_routes(self) -> tuple[RouteSettings, ...]:
        """Return every route in matching order; the short form, named `default`, comes last."""
        if self.backend is None:
            return tuple(self.routes)
        short = RouteSettings(
            name="default", **{name: getattr(self.backend, name) for name in BackendSettings.model_fields}
        )
        return (*self.routes, short)


def find_conflicts(settings: Settings) -> list[str]:
    """Return every combination of settings that cannot work, one sentence each; empty when there is none."""
    faults: list[str] = []
    pubsub, drain = settings.pubsub, settings.drain
    if not pubsub.request_subscription:
        faults.append("pubsub.request_subscription: is required (WORKER_PUBSUB__REQUEST_SUBSCRIPTION)")
    if not pubsub.response_topic:
        faults.append("pubsub.response_topic: is required (WORKER_PUBSUB__RESPONSE_TOPIC)")
    if settings.backend is None and not settings.routes:
        faults.append("backend.base_url: is required (WORKER_BACKEND__BASE_URL), or at least one of routes")
    if settings.policy.hold_max_s > pubsub.max_lease_duration_s:
        faults.append("policy.hold_max_s: must not exceed pubsub.max_lease_duration_s, the lease ends first")
    limit = drain.termination_grace_period_s
    if limit is not None and drain.grace_s + drain.settle_s >= limit:
        faults.append(
            f"drain: grace_s + settle_s ({drain.grace_s + drain.settle_s:g} s) must be less than "
            f"the pod's termination grace period ({limit:g} s), or SIGKILL ends the drain"
        )
    if settings.dedupe.store == "redis" and settings.dedupe.redis_url is None:
        faults.append("dedupe.redis_url: is required with dedupe.store redis")
    names = [route.name for route in settings.all_routes()]
    faults += [f"routes: the name {name!r} is used twice" for name in sorted({n for n in names if names.count(n) > 1})]
    for route in settings.all_routes():
        where = "backend" if route.name == "default" and settings.backend is not None else f"routes[{route.name}]"
        faults += [f"{where}.{fault}" for fault in _route_conflicts(route, settings)]
    return faults


def _route_conflicts(route: RouteSettings, settings: Settings) -> list[str]:
    faults: list[str] = []
    timeouts, window, drain = route.timeouts, route.window, settings.drain
    if not route.base_url:
        faults.append("base_url: is required")
    if route.api_key is not None and route.api_key_file is not None:
        faults.append("api_key: excludes api_key_file")
    faults += [
        f"timeouts.{name}: must not exceed timeouts.total_s ({timeouts.total_s:g} s)"
        for name in ("connect_s", "first_byte_s")
        if (getattr(timeouts, name) or 0) > timeouts.total_s
    ]
    if timeouts.total_s > settings.pubsub.max_lease_duration_s:
        faults.append("timeouts.total_s: must not exceed pubsub.max_lease_duration_s")
    if drain.grace_s <= timeouts.total_s and not drain.cut_longer_requests:
        faults.append(
            f"timeouts.total_s: {timeouts.total_s:g} s is not less than drain.grace_s ({drain.grace_s:g} s), so a "
            "shutdown would cut requests; lower it, raise the grace, or accept it with drain.cut_longer_requests"
        )
    if not window.min <= window.initial <= window.max:
        faults.append("window: needs min <= initial <= max")
    if window.max > settings.pubsub.max_in_flight:
        faults.append(f"window.max: {window.max} exceeds pubsub.max_in_flight ({settings.pubsub.max_in_flight})")
    if route.breaker.probe_interval_s > route.breaker.max_probe_interval_s:
        faults.append("breaker.probe_interval_s: must not exceed breaker.max_probe_interval_s")
    return faults
