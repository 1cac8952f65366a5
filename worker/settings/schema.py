"""
Settings: what people configure, and the only knowledge of environment names.

Precedence, lowest first: defaults, the YAML file (a ConfigMap), `WORKER_*` environment variables, command-line flags.
A variable's name is the key's path with two underscores between sections: `WORKER_PUBSUB__PROJECT_ID` is
`pubsub.project_id`.  Unknown keys fail wherever they stand, and so do combinations that cannot work; every fault is
named in one message.  Values are frozen; secrets never survive `repr`.

`docs/settings.md` is generated from the docstrings below (`make docs`), and `make check` fails when it is stale.
Loading is in `worker.settings.load`; this module reads nothing.
"""

from typing import Annotated, Any, Literal

from pydantic import Field, SecretStr, field_validator

from worker.settings.backend import (
    BackendSettings,
    BreakerSettings,
    ContinuationMode,
    RouteMatch,
    RouteSettings,
    Seconds,
    Section,
    StreamMode,
    TimeoutSettings,
    WindowSettings,
    refuse_own_headers,
)
from worker.settings.setup import SetupSettings
from worker.settings.tracing import TracingSettings
from worker.wire.http import is_header

__all__ = [
    "INFERENCE_PATHS",
    "BackendSettings",
    "BreakerSettings",
    "ContinuationMode",
    "DamageSettings",
    "DeadLetterSettings",
    "DedupeSettings",
    "DrainSettings",
    "HttpSettings",
    "LogSettings",
    "PolicySettings",
    "PubSubSettings",
    "PublishSettings",
    "ReplySettings",
    "RequestSettings",
    "RouteMatch",
    "RouteSettings",
    "Settings",
    "SetupSettings",
    "StreamMode",
    "TimeoutSettings",
    "TracingSettings",
    "WindowSettings",
]

SubscriptionName = Annotated[str, Field(pattern=r"^(?:[^/\s]*|projects/[^/\s]+/subscriptions/[^/\s]+)$")]
TopicName = Annotated[str, Field(pattern=r"^(?:[^/\s]*|projects/[^/\s]+/topics/[^/\s]+)$")]

INFERENCE_PATHS = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/embeddings",
    "/v1/moderations",
    "/v1/rerank",
    "/v1/score",
    "/v1/images/generations",
)
"""The OpenAI inference paths that take JSON, with the two that vLLM, SGLang and TGI add (rerank, score)."""


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
    request_subscription: SubscriptionName = ""
    """Subscription id, or the full `projects/P/subscriptions/S`.  Required."""
    response_topic: TopicName = ""
    """Topic id, or the full `projects/P/topics/T`.  Required."""
    emulator_host: Annotated[str, Field(pattern=r"^[^\s/]+:\d{1,5}$")] | None = None
    """`host:port` of an emulator or of the embedded server; no credentials are used then.  `PUBSUB_EMULATOR_HOST`
    sets it too."""
    max_in_flight: Annotated[int, Field(ge=1, le=10_000)] = 128
    """Deliveries leased at once.  2-3 x the window for requests of less than a second, since a slot frees only after
    its ack; about the window for long ones, since more only hoards.  Up to twice as many for a while after a stream
    broke under them."""
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


class RequestSettings(Section):
    """What a request message may ask for."""

    allowed_paths: list[str] = Field(default_factory=lambda: list(INFERENCE_PATHS))
    """Paths that are forwarded, by shell pattern; any other is answered with a 400."""
    allowed_headers: list[str] = Field(default_factory=list)
    """Names a message's `headers` may set, in any case.  None by default: routers trust some headers."""
    idempotency_key: bool = False
    """Send `Idempotency-Key: <message id>`, the same for every attempt, for the few proxies that deduplicate."""

    @field_validator("allowed_headers")
    @classmethod
    def _plain_names(cls, value: list[str]) -> list[str]:
        for name in value:
            if not is_header(name, ""):
                raise ValueError(f"{name!r} is not the name of a header")
        return refuse_own_headers([name.lower() for name in value])


class ReplySettings(Section):
    """What stands in an answer beside the backend's own words."""

    copy_attributes: list[str] = Field(default_factory=list)
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

    rules: list[dict[str, Any]] = Field(default_factory=list)
    """Operators' rules, tried before the built-in table; first match wins."""
    hook_timeout_s: Seconds = 0.25
    """Longest time a hook (entry point `inference_worker.error_policy`) may take; the table decides after that."""
    hold_max_s: Seconds | None = None
    """How long a delivery may wait in-process for a backend that is down, throttled or refusing credentials.  Default:
    `pubsub.max_lease_duration_s`, so that an outage shorter than the lease burns no delivery attempt."""
    reply_on_last_attempt: bool = True
    """Answer with the last error instead of letting the message be dead-lettered silently."""
    damage: DamageSettings = DamageSettings()


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
    """Lowest level written: info for an answer, warning for what is handed back or held, error for what a person must
    look at.  Libraries write from warning on."""


class Settings(Section):
    """Everything."""

    pubsub: PubSubSettings = PubSubSettings()
    backend: BackendSettings | None = None
    """The short form of one route named `default`; with `routes`, the route for what none of them takes."""
    routes: list[RouteSettings] = Field(default_factory=list)
    """Several backends, first match wins."""
    request: RequestSettings = RequestSettings()
    reply: ReplySettings = ReplySettings()
    policy: PolicySettings = PolicySettings()
    dedupe: DedupeSettings = DedupeSettings()
    dead_letter: DeadLetterSettings = DeadLetterSettings()
    drain: DrainSettings = DrainSettings()
    http: HttpSettings = HttpSettings()
    log: LogSettings = LogSettings()
    tracing: TracingSettings = TracingSettings()
    setup: SetupSettings = SetupSettings()

    def all_routes(self) -> tuple[RouteSettings, ...]:
        """Return every route in matching order; the short form, named `default`, comes last."""
        if self.backend is None:
            return tuple(self.routes)
        short = RouteSettings(
            name="default", **{name: getattr(self.backend, name) for name in BackendSettings.model_fields}
        )
        return (*self.routes, short)
